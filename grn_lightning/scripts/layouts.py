"""Folders as GenEval and VBench read them: which prompt becomes which file, and the job of drawing.

GenEval (djghosh13/geneval, evaluation/evaluate_images.py) walks over numbered folders, one per line
of its `evaluation_metadata.jsonl`, each with that line as `metadata.jsonl` and the pictures in
`samples/`. VBench (Vchitect/VBench, standard mode) takes one flat folder of `PROMPT-INDEX.mp4`, and
the suffix of whatever lies first in it for that of all videos. So nothing else is written there:
what was drawn how stands beside, in `OUT/samples.json`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from grn_lightning.datasets.manifest import atomic_file, write_json
from grn_lightning.media.images import decode_image, encode_png, to_uint8
from grn_lightning.media.video import write_mp4
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.recipes import LIST_FILE
from grn_lightning.scripts.draw_plan import SamplePlan
from grn_lightning.scripts.parts import PartJob, Progress, part_sizes

GENEVAL_FOLDER = "images"
"""What GenEval's scorer is pointed to, inside of the output."""
VBENCH_FOLDER = "videos"
"""What VBench is pointed to, inside of the output."""

_METADATA = "metadata.jsonl"
_UNFINISHED = "unfinished"
_MAX_NAME = 255  # bytes of a file's name on ext4, XFS, NTFS, APFS
_RESERVED = "/\\"
_PART = 16  # samples that a process takes at a time, at least


@dataclass(frozen=True)
class Prompted:
    """A prompt of a benchmark."""

    text: str
    """As the benchmark writes it."""
    shown: str
    """As the generator reads it: the same, or rewritten."""
    line: str = ""
    """For GenEval, the line of metadata."""


# --- prompts --------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"there is no file of prompts at '{file}'.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is no text in UTF-8.") from error


def read_geneval(file: Path) -> list[Prompted]:
    """Read GenEval's `evaluation_metadata.jsonl`, one object with a `prompt` a line.

    Raises:
        ValueError: If a line is none.
    """
    found = []
    for number, line in enumerate(_read(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str) or not prompt.strip():
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of '{file}' is no JSON object with a `prompt`; give GenEval's "
                "evaluation_metadata.jsonl."
            ) from error
        found.append(Prompted(prompt, prompt, line.strip()))
    return _some(found, file)


def read_vbench(file: Path) -> list[Prompted]:
    """Read VBench's `VBench_full_info.json`, or a text file with one prompt a line.

    A prompt that occurs several times (under several dimensions) has one file, and is drawn once.

    Raises:
        ValueError: If it is neither, or a prompt cannot be the name of a file.
    """
    text = _read(file)
    if file.suffix == ".json":
        try:
            prompts = [row["prompt_en"] for row in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{file}' is no list of objects with `prompt_en`; give VBench_full_info.json, or "
                "a text file with one prompt a line."
            ) from error
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    check_names(prompts, file)
    return _some([Prompted(prompt, prompt) for prompt in dict.fromkeys(prompts)], file)


def _some(prompts: list[Prompted], file: Path) -> list[Prompted]:
    if not prompts:
        raise ValueError(f"'{file}' holds no prompt.")
    return prompts


def check_names(prompts: Sequence[str], file: Path, *, suffix: str = "-0000.mp4") -> None:
    """Refuse prompts that no file can be called.

    Raises:
        ValueError: If one holds a slash, is too long or starts with a dot, or two differ by case
            alone, which are one file on many disks; it names the first of them.
    """
    folded: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        reason = ""
        if not isinstance(prompt, str) or not prompt:
            reason = "is no text"
        elif any(letter in _RESERVED or not letter.isprintable() for letter in prompt):
            reason = "holds a slash or a letter that does not print"
        elif prompt.startswith("."):
            reason = "starts with a dot, which hides a file"
        elif (size := len((prompt + suffix).encode())) > _MAX_NAME:
            reason = f"makes a name of {size} bytes, and file systems take {_MAX_NAME}"
        elif (other := folded.setdefault(prompt.casefold(), prompt)) != prompt:
            reason = f"differs from {other!r} by case alone, and many disks do not tell them apart"
        if reason:
            raise ValueError(
                f"the prompt {prompt!r} of '{file}' cannot name a video: it {reason}; take it out "
                "or shorten it."
            )


def rewritten(prompts: Sequence[Prompted], file: Path | None) -> list[Prompted]:
    """Let the generator read other texts than the benchmark writes.

    Args:
        prompts: Those of the benchmark.
        file: One text a line, as many as there are prompts and in their order; None changes
            nothing.

    Raises:
        ValueError: If there are more or fewer.
    """
    if file is None:
        return list(prompts)
    lines = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if len(lines) != len(prompts):
        raise ValueError(
            f"'{file}' must hold a rewritten prompt a line for each of the {len(prompts)} prompts, "
            f"got {len(lines)}."
        )
    return [Prompted(p.text, line, p.line) for p, line in zip(prompts, lines, strict=True)]


# --- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which file a sample becomes."""

    name: str
    """ "geneval" or "vbench"."""
    prompts: tuple[Prompted, ...]
    """In the order of the benchmark."""
    per_prompt: int
    """Samples of each."""

    @property
    def num_samples(self) -> int:
        """All samples."""
        return len(self.prompts) * self.per_prompt

    @property
    def folder(self) -> str:
        """What the benchmark is pointed to, inside of the output."""
        return GENEVAL_FOLDER if self.name == "geneval" else VBENCH_FOLDER

    def prompt_of(self, number: int) -> Prompted:
        """Return the prompt of a sample."""
        return self.prompts[number // self.per_prompt]

    def file_of(self, number: int) -> Path:
        """Return the file of a sample, relative to the output."""
        place, index = divmod(number, self.per_prompt)
        if self.name == "geneval":
            return Path(self.folder, f"{place:05d}", "samples", f"{index:04d}.png")
        return Path(self.folder, f"{self.prompts[place].text}-{index}.mp4")

    def grid_of(self, place: int) -> Path:
        """Return the file of all pictures of a prompt, relative to the output (GenEval)."""
        return Path(self.folder, f"{place:05d}", "grid.png")

    def prepare(self, out: Path) -> None:
        """Make the folders, and what stands in them besides samples."""
        (out / self.folder).mkdir(parents=True, exist_ok=True)
        if self.name != "geneval":
            return
        for place, prompt in enumerate(self.prompts):
            here = out / self.folder / f"{place:05d}"
            (here / "samples").mkdir(parents=True, exist_ok=True)
            if not (here / _METADATA).is_file():
                with atomic_file(here / _METADATA) as stream:
                    stream.write((prompt.line + "\n").encode())


@dataclass
class LayoutJob(PartJob):
    """Draws the samples of a layout; a part is done when its files are there."""

    folder: Path
    plan: SamplePlan
    layout: Layout
    title: str = field(default="sample", init=False)

    @property
    def _part_size(self) -> int:
        whole = max(_PART, self.plan.batch_size)
        return -(-whole // self.layout.per_prompt) * self.layout.per_prompt  # whole prompts

    @property
    def samples_per_part(self) -> list[int]:
        """Samples of every part."""
        return part_sizes(self.layout.num_samples, self._part_size)

    def _numbers(self, part: int) -> range:
        first = part * self._part_size
        return range(first, min(first + self._part_size, self.layout.num_samples))

    def _missing(self, part: int) -> list[int]:
        numbers = self._numbers(part)
        return [n for n in numbers if not (self.folder / self.layout.file_of(n)).is_file()]

    def has(self, number: int) -> bool:
        """Whether all files of a part are there."""
        return not self._missing(number)

    def start(self, device: torch.device) -> Callable[[int, Progress], None]:
        """Load the generator and return what draws a part and writes what is missing of it."""
        pipeline = self.plan.open(device)
        (self.folder / _UNFINISHED).mkdir(exist_ok=True)

        def do(part: int, progress: Progress) -> None:
            # All of them, so that batches, and with them the last bits, are those of one go.
            numbers, missing = self._numbers(part), set(self._missing(part))
            wanted = {"captions": [self.layout.prompt_of(n).shown for n in numbers]}
            for drawn in self.plan.draw(pipeline, wanted, numbers, progress=progress, decode=False):
                for row, elements, num_steps in zip(
                    drawn.rows, drawn.elements.split(1), drawn.num_steps.tolist(), strict=True
                ):
                    if numbers[row] in missing:
                        self._write(numbers[row], elements, num_steps, pipeline)

        return do

    def note_of(self, number: int, num_steps: int) -> str:
        """Return the recipe that travels in a file, for `grn replay`."""
        shown = self.layout.prompt_of(number).shown
        return self.plan.note_of("captions", shown, number=number, num_steps=num_steps)

    def _write(
        self, number: int, elements: Tensor, num_steps: int, pipeline: GeneratorPipeline
    ) -> None:
        """Decode one sample; its file appears when it is whole."""
        file, note = self.folder / self.layout.file_of(number), self.note_of(number, num_steps)
        chunks = (
            to_uint8(chunk[0].transpose(0, 1)).cpu() for chunk in pipeline.decode_chunks(elements)
        )
        if self.layout.name == "geneval":
            [frames] = chunks
            data = encode_png(frames[0], note=note)
            unfinished = self.folder / _UNFINISHED / f"{number}.png"
            unfinished.write_bytes(data)
        else:
            unfinished = self.folder / _UNFINISHED / f"{number}.mp4"
            unfinished.unlink(missing_ok=True)  # of a process that was killed
            write_mp4(unfinished, chunks, fps=self.plan.recipe.fps, note=note)
        unfinished.replace(file)

    def finish(self, job: Mapping[str, Any]) -> Path:
        """Write grids and the list of all samples; returns the file of the list."""
        layout = self.layout
        if layout.name == "geneval":
            for place in range(len(layout.prompts)):
                self._write_grid(place)
        rows = [
            {
                "sample_index": number,
                "prompt": layout.prompt_of(number).text,
                "shown": self.plan.shown(layout.prompt_of(number).shown),
                "seed": self.plan.recipe.seed,
                "files": [str(layout.file_of(number))],
            }
            for number in range(layout.num_samples)
        ]
        write_json(self.folder / LIST_FILE, {**job, "samples": rows})
        return self.folder / LIST_FILE

    def _write_grid(self, place: int) -> None:
        file = self.folder / self.layout.grid_of(place)
        if file.is_file():
            return
        first = place * self.layout.per_prompt
        files = [
            self.folder / self.layout.file_of(first + n) for n in range(self.layout.per_prompt)
        ]
        pictures = torch.stack([decode_image(one.read_bytes(), source=str(one)) for one in files])
        with atomic_file(file) as stream:
            columns = math.ceil(len(pictures) ** 0.5)
            stream.write(encode_png(make_grid(pictures, nrow=columns, padding=0)))
