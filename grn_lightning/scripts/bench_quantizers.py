"""`grn bench quantizers`: the arms of the quantizer switch on the same data, steps, bits, seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.scripts.bench_parts import RESULT_FILE, require_bench
from grn_lightning.scripts.quantizer_arms import run_arm
from grn_lightning.scripts.quantizer_records import (
    Arm,
    ArmResult,
    QuantizerBenchConfig,
    read_result,
    shared_facts,
)
from grn_lightning.scripts.quantizer_table import Row, alarms, draw, markdown, rows_of
from grn_lightning.scripts.records import environment, now
from grn_lightning.scripts.runs import choose_device

_ARMS = ["hbq", "none", "fsq", "lfq", "bsq", "vq"]
_FORMAT = 1


@dataclass(frozen=True)
class QuantizerBench:
    """The comparison so far."""

    rows: tuple[Row, ...]
    """An arm each, all finished seeds."""
    folder: Path
    """Where `bench.json`, `bench.md` and `bench.png` lie."""

    def __str__(self) -> str:
        """Return the table."""
        lines = [markdown(self.rows), *alarms(self.rows)]
        return "\n".join([*lines, f"table, numbers and drawing lie in '{self.folder}'"])


def _finished(output: Path) -> list[ArmResult]:
    """Read all records of a bench, also of arms that were not asked for this time."""
    results = []
    for file in sorted(output.glob(f"*/m*/seed*/{RESULT_FILE}")):
        name, rounds, seed = file.parent.relative_to(output).parts
        arm = Arm(name, int(rounds.removeprefix("m")), int(seed.removeprefix("seed")))
        result = read_result(output, arm)
        assert result is not None
        results.append(result)
    return results


def _check_comparable(
    results: Sequence[ArmResult], config: QuantizerBenchConfig, data: Path, output: Path
) -> None:
    """Refuse to mix arms that saw other data, sizes or settings.

    Raises:
        ValueError: If a record differs; the message says in what.
    """
    ours = shared_facts(config, data)
    for result in results:
        other = [key for key in ours if result.shared.get(key) != ours[key]]
        if result.arm in (*config.settings, *_ARMS):
            is_same = result.quantizer == asdict(config.quantizer(result.arm))
            other += [] if is_same else [f"quantizer of {result.arm!r}"]
        if other:
            found = {key: (result.shared.get(key), ours.get(key)) for key in other if key in ours}
            raise ValueError(
                f"'{output}' holds arms with other settings: {', '.join(other)} {found or ''}. "
                "Give another output folder, or the settings of that one."
            )


def _write(rows: Sequence[Row], folder: Path, config: QuantizerBenchConfig) -> None:
    """Write table, numbers and drawing of what is finished."""
    facts = {
        "format": _FORMAT,
        "date": now(),
        "environment": environment(choose_device(config.device)),
        "results": [asdict(result) for row in rows for result in row.results],
        "alarms": alarms(rows),
    }
    write_json(folder / "bench.json", facts)
    (folder / "bench.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    draw(rows, folder / "bench.png")


def bench_quantizers(
    output: Path,
    *,
    data: Path = Path("data/digits/images"),
    arms: list[str] = _ARMS,
    seeds: list[int] = [0, 1, 2],  # noqa: B006  (read only; a list is what a YAML file holds)
    num_rounds: list[int] = [4],  # noqa: B006
    config: QuantizerBenchConfig = QuantizerBenchConfig(),  # noqa: B008  (frozen)
) -> QuantizerBench:
    """Train the quantizers of the switch on the same data, steps, bits and seeds; compare them.

    Every arm is a tokenizer of the same encoder and decoder with its own quantizer and (at most)
    `num_rounds * tokenizer.latent_channels` bits per position, trained by the real trainer and
    judged with averaged weights on the split "val". Arms and seeds that are already finished in
    the output folder are kept, so a bench can be done in pieces and goes on after an interruption;
    table (`bench.md`), numbers (`bench.json`) and drawing (`bench.png`) show all of them.

    Args:
        output: Folder of the bench; a new one, or one of the same settings.
        data: Folder of shards with splits "train" and "val".
        arms: Names of quantizers, or of arms described in `settings`.
        seeds: One training per arm and seed.
        num_rounds: One budget of bits each.
        config: What all arms share.

    Raises:
        ValueError: If an arm is unknown, or the folder holds arms with other settings.
    """
    choose_device(config.device)
    require_bench(output)
    for split in ("train", "val"):
        ShardSet.open(data, split)
    asked = [Arm(name, m, seed) for m in num_rounds for seed in seeds for name in arms]
    for arm in asked:
        config.tokenizer_of(arm)  # refuses unknown names and bits that do not divide
    _check_comparable(_finished(output), config, data, output)
    missing = [arm for arm in asked if read_result(output, arm) is None]
    with tqdm(total=len(missing) * config.max_steps, unit="step") as bar:
        for arm in missing:
            bar.set_description(str(arm))
            run_arm(config, data, arm, output=output, bar=bar)
            _write(rows_of(_finished(output)), output, config)
    rows = rows_of(_finished(output))
    if not rows:
        raise ValueError("there is nothing to compare: give at least one arm, seed and num_rounds.")
    _write(rows, output, config)
    return QuantizerBench(tuple(rows), output)
