"""`grn predict` writes each sample once, whatever is interrupted and however many processes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.callbacks import WritePredictions
from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.prediction import PredictionPlan
from grn_lightning.media.images import decode_image, to_uint8
from grn_lightning.media.notes import read_note
from grn_lightning.media.video import decode_video
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.samplers import RefineConfig
from tests.tiny_runs import (
    call_grn,
    callback,
    generator_config,
    kill,
    source,
    start_grn,
    write_yaml,
)

# The run has saved checkpoints by a callback that a prediction has no use for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    # Lightning cannot know that our sampler leaves nothing out; this file tests it.
    pytest.mark.filterwarnings("ignore:You are using a custom batch sampler"),
]

REFINE = {"num_steps": 2, "guidance_scale": 2.0}
PATIENCE_SECONDS = 180


def command(
    folder: Path, digits: Path, runs: dict[str, Path], tokenizer: Path, kind: str, **options: Any
) -> list[Any]:
    """The arguments of a prediction into `folder/out`."""
    media = "image" if kind == "class" else "video"
    options = {"refine": REFINE} | options
    writer = callback("WritePredictions", folder=str(folder / "out"), **options)
    calls = len(list(folder.glob("call*")))  # every call keeps its configuration
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind=kind,
        sources=[source(digits, media, 2)],
        callbacks=[callback("EMA", decay=0.9), writer],
        trainer={"logger": False, "default_root_dir": str(folder / f"call{calls}")},
    )
    checkpoint = runs[kind] / "checkpoints" / "last.ckpt"
    (folder / f"call{calls}").mkdir(parents=True)
    return ["predict", "-c", write_yaml(folder, config), f"--ckpt_path={checkpoint}"]


@pytest.fixture
def arguments(digits: Path, generator_runs: dict[str, Path], tokenizer_run: Path) -> Any:
    def make(folder: Path, kind: str = "class", **options: Any) -> list[Any]:
        return command(folder, digits, generator_runs, tokenizer_run, kind, **options)

    return make


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "out").iterdir())}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the samples that are drawn, as they are."""
    numbers: list[int] = []
    draw = GeneratorPipeline.draw

    def watched(self: Any, condition: Any, sample_index: torch.Tensor, **rest: Any) -> Any:
        numbers.extend(sample_index.tolist())
        return draw(self, condition, sample_index, **rest)

    monkeypatch.setattr(GeneratorPipeline, "draw", watched)
    return numbers


@pytest.mark.parametrize("kind", ["class", "text"])
def test_every_held_out_condition_gets_its_samples(
    arguments: Any, generator_runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    call_grn(*arguments(tmp_path, kind, samples_per_condition=2, num_samples=9))
    suffix = ".png" if kind == "class" else ".mp4"
    files = files_in(tmp_path)
    assert list(files) == [*(f"000000{n}{suffix}" for n in range(9)), "predictions.json"]
    pipeline = load_generator(generator_runs[kind]).pipeline
    for number in (0, 1, 8):
        file = tmp_path / "out" / f"000000{number}{suffix}"
        note = read_note(file)
        assert note is not None
        recipe = json.loads(note)
        assert recipe["sample_index"] == number
        expected = pipeline.draw(
            pipeline.condition({name: [value] for name, value in recipe["condition"].items()}),
            torch.tensor([number]),
            size=tuple(recipe["size"]),
            config=RefineConfig(num_steps=2, guidance_scale=2.0),
        ).clips[0]
        if kind == "class":
            pixels = decode_image(file.read_bytes()).unsqueeze(0)
        else:
            pixels = decode_video(file, fps=None, num_frames=None)
        assert pixels.equal(to_uint8(expected).transpose(0, 1))
    conditions = [
        json.loads(read_note(tmp_path / "out" / name) or "{}").get("condition")
        for name in list(files)[:2]
    ]
    assert conditions[0] == conditions[1]  # of one held-out sample


@pytest.mark.scale
def test_an_interrupted_prediction_goes_on_with_what_is_missing(
    arguments: Any, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_grn(*arguments(tmp_path / "whole"))
    assert sorted(drawn) == list(range(6))
    whole = files_in(tmp_path / "whole")

    drawn.clear()
    write, count = WritePredictions._write, [0]

    def killed(self: Any, *args: Any) -> None:
        if count[0] == 3:
            raise KeyboardInterrupt
        count[0] += 1
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(WritePredictions, "_write", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            call_grn(*arguments(tmp_path / "cut"))
    (tmp_path / "cut" / "out" / ".0000005.png.part").write_bytes(b"half of a pict")
    assert sum(name.endswith(".png") for name in files_in(tmp_path / "cut")) == 3

    drawn.clear()
    call_grn(*arguments(tmp_path / "cut"))
    assert sorted(drawn) == [3, 4, 5]
    assert files_in(tmp_path / "cut") == whole

    drawn.clear()
    call_grn(*arguments(tmp_path / "cut"))
    assert drawn == []
    assert files_in(tmp_path / "cut") == whole


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"refine": {"num_steps": 3, "guidance_scale": 2.0}},
            "refine .*'num_steps': 2.*would have",
        ),
        ({"samples_per_condition": 2}, "holds samples with samples_per_condition 1, .*have 2"),
    ],
)
def test_a_folder_takes_samples_of_one_kind(
    arguments: Any, tmp_path: Path, options: dict[str, Any], match: str, capsys: Any
) -> None:
    call_grn(*arguments(tmp_path, num_samples=1))
    before = files_in(tmp_path)
    with pytest.raises(SystemExit):
        call_grn(*arguments(tmp_path, **options))
    assert re.search(match, capsys.readouterr().err)
    assert files_in(tmp_path) == before


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        WritePredictions("x", samples_per_condition=0)


def test_rows_that_fill_up_a_batch_draw_nothing() -> None:
    batch = {"sample_index": torch.tensor([4, 0, 2]), "weights": torch.tensor([1.0, 0.0, 1.0])}
    plan = PredictionPlan(samples_per_condition=3, is_done=lambda number: number == 7)
    assert plan.missing(batch) == [(0, 12), (0, 13), (0, 14), (2, 6), (2, 8)]
    assert PredictionPlan(num_samples=3).missing(batch) == [(2, 2)]


@pytest.mark.scale
@pytest.mark.slow
def test_two_processes_write_the_set_of_one(arguments: Any, tmp_path: Path) -> None:
    pair = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    two = arguments(tmp_path / "two", samples_per_condition=2, num_samples=11)
    process = start_grn(*two, *pair, log=tmp_path / "output.txt")
    try:
        call_grn(*arguments(tmp_path / "one", samples_per_condition=2, num_samples=11))
        assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "output.txt").read_text()
    finally:
        kill(process)
    one = files_in(tmp_path / "one")
    assert len(one) == 11 + 1
    assert files_in(tmp_path / "two") == one
