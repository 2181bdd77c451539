"""`grn weights`: the published weights by name, and which of them lie here."""

from dataclasses import dataclass
from pathlib import Path

from grn_lightning.pipelines.registry import DEFAULT_FOLDER, WEIGHTS, find_local


@dataclass(frozen=True)
class WeightsRow:
    """One published network."""

    name: str
    """What `grn sample --weights` calls it."""
    file: str
    """Its published file, and where that is."""
    place: Path | None
    """Where it lies here."""
    note: str
    """What a user should know."""


@dataclass(frozen=True)
class WeightsList:
    """All published weights that are known."""

    folder: Path
    """Where they were looked for."""
    rows: tuple[WeightsRow, ...]
    """One for each."""

    def __str__(self) -> str:
        """Write two lines for each."""
        lines = []
        for row in self.rows:
            place = f"in '{row.place}'" if row.place else "not here"
            lines += [f"{row.name:<22} {place}; {row.file}", f"{'':<22} {row.note}"]
        here = sum(row.place is not None for row in self.rows)
        return "\n".join([*lines, f"{here} of {len(self.rows)} in '{self.folder}'"])


def weights(folder: Path = DEFAULT_FOLDER) -> WeightsList:
    """List the published weights by name: what they are, their files, and which lie here.

    Nothing is downloaded. A checksum, repository or file name that is not known is said so.

    Args:
        folder: Where to look.
    """
    return WeightsList(
        folder,
        tuple(
            WeightsRow(
                name,
                f"{row.file or 'file name unknown'} of {row.repository or 'unknown repository'}",
                find_local(name, folder),
                row.note,
            )
            for name, row in WEIGHTS.items()
        ),
    )
