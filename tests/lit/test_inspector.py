"""The inspector writes what it says, of the averaged weights, and the same on two processes."""

import io
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grn_lightning.datasets.order import ValidationBatchSampler
from grn_lightning.lit.callbacks import Inspector
from grn_lightning.lit.callbacks import inspector as inspector_module
from grn_lightning.lit.checkpoints import find_checkpoint
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import load_generator
from grn_lightning.pipelines.inspection import inspect_accuracy, inspect_refinement
from grn_lightning.samplers import RefineConfig
from tests.tiny_runs import (
    TINY_DIGITS,
    call_grn,
    callback,
    fit,
    generator_config,
    kill,
    logged,
    logger,
    source,
    start_grn,
    tokenizer_config,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*used to create the checkpoint need", "ignore:samples at step"
)

REFINE = {"num_steps": 10}
PICTURES = {
    "maps", "strip", "elements", "entropy", "flips", "accuracy", "accuracy_map", "bit_balance",
    "complexity_by_sample", "steps_by_sample",
}  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "inspector.md"


def inspected(folder: Path, digits: Path, tokenizer: Path, kind: str, **settings: Any) -> dict:
    media = "image" if kind == "class" else "video"
    options = {"num_samples": 4, "num_held_out": 6, "num_times": 3, "refine": REFINE}
    return generator_config(
        folder,
        digits,
        tokenizer,
        kind=kind,
        sources=[source(digits, media, 3)],
        callbacks=[callback("EMA", decay=0.5), callback("Inspector", **options | settings)],
        trainer={"max_steps": 2, "val_check_interval": 1},
    )


@pytest.fixture(scope="module")
def events(
    digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EventAccumulator]:
    """What two steps of a class-conditional and one of a text-conditional run have written."""
    found = {}
    for kind in ("class", "text"):
        folder = tmp_path_factory.mktemp(kind)
        config = inspected(folder, digits, tokenizer_run, kind)
        config["trainer"]["logger"] = logger("TensorBoardLogger", folder)
        config["trainer"]["max_steps"] = 2 if kind == "class" else 1
        fit(folder, config)
        sizes = {"images": 0, "scalars": 0, "tensors": 0, "histograms": 0}
        found[kind] = EventAccumulator(str(folder / "log"), size_guidance=sizes).Reload()
    return found


@pytest.mark.parametrize("kind", ["class", "text"])
def test_every_panel_arrives_at_every_validation(kind: str, events: dict) -> None:
    found = events[kind]
    assert set(found.Tags()["images"]) == {f"inspect/{name}" for name in PICTURES}
    for tag in found.Tags()["images"]:
        steps = [event.step for event in found.Images(tag)]
        assert steps == ([1, 2] if kind == "class" else [1]), tag
    film = Image.open(io.BytesIO(found.Images("inspect/maps")[-1].encoded_image_string))
    assert film.format == "GIF"
    assert film.n_frames == 10  # type: ignore[attr-defined]  # a step each; the last one longer


@pytest.mark.parametrize("kind", ["class", "text"])
def test_histograms_count_all_samples(kind: str, events: dict) -> None:
    found = events[kind]
    for name in ("complexity", "steps"):
        for event in found.Histograms(f"inspect/{name}_histogram"):
            assert event.histogram_value.num == 4
            assert sum(event.histogram_value.bucket) == 4
    steps = found.Histograms("inspect/steps_histogram")[-1].histogram_value
    assert 2 <= steps.min <= steps.max <= 10
    assert steps.sum / steps.num == pytest.approx(5, abs=1.01)  # half of the steps


@pytest.mark.parametrize("kind", ["class", "text"])
def test_every_tag_is_explained_on_the_page(kind: str, events: dict) -> None:
    page, tags = PAGE.read_text(), events[kind].Tags()
    text = [tag.removesuffix("/text_summary") for tag in tags["tensors"] if "__" not in tag]
    scalars = [tag for tag in tags["scalars"] if not tag.startswith("train_accuracy/t")]
    for tag in [*tags["images"], *tags["histograms"], *text, *scalars]:
        known = tag.rstrip("0123456789.") if tag.startswith(("val_accuracy", "train_acc")) else tag
        assert f"`{known}" in page, tag


def test_charts_of_several_scalars_name_tags_that_are_there(events: dict) -> None:
    tags = events["text"].Tags()["scalars"]
    for title, expressions in inspector_module._LAYOUT.items():
        if title != "judges":  # of another callback
            found = [tag for tag in tags for one in expressions if re.fullmatch(one, tag)]
            assert len(found) >= 2, title
    assert "custom_scalars__config__" in events["text"].Tags()["tensors"]


@pytest.mark.parametrize("kind", ["class", "text"])
def test_what_is_logged_is_what_the_averaged_weights_do(
    kind: str,
    digits: Path,
    tokenizer_run: Path,
    generator_runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Against the Python API on the loaded run: the same samples, the same accuracies."""
    config = inspected(tmp_path, digits, tokenizer_run, kind)
    checkpoint = find_checkpoint(generator_runs[kind])
    args = ("-c", write_yaml(tmp_path, config), "--ckpt_path", checkpoint)
    metrics = call_grn("validate", *args).trainer.callback_metrics

    pipeline = load_generator(generator_runs[kind]).pipeline
    config["data"]["init_args"]["sources"][0]["batch_size"] = 6
    data = ShardData(**config["data"]["init_args"])
    data.setup("validate")
    (batch,) = data.val_dataloader()
    name = "captions" if kind == "text" else "class_labels"
    asked = list(batch[name]) if kind == "text" else batch[name].tolist()
    size = tuple(batch["clips"].shape[2:])
    drawn = inspect_refinement(
        pipeline, asked[:4], torch.arange(4), size=size, config=RefineConfig(**REFINE)
    )
    assert float(metrics["inspect/complexity"]) == pytest.approx(float(drawn.entropy[5].mean()))
    assert float(metrics["inspect/flips_last"]) == pytest.approx(float(drawn.flips[-1].mean()))
    assert float(metrics["inspect/open_bits_first"]) == pytest.approx(float(drawn.bits[0].mean()))
    known = inspect_accuracy(pipeline, pipeline.tokenize(batch["clips"]), asked, num_times=3)
    for number, accuracy in enumerate(known.result.by_round.mean(0).tolist()):
        assert float(metrics[f"val_accuracy/round{number}"]) == pytest.approx(accuracy)


SOURCES = (((1, 8, 8), 7), ((5, 8, 8), 3), ((1, 8, 8), 4))  # sizes, and samples of each


def counted(
    num_held_out: int, batch_size: int, num_ranks: int, rank: int
) -> tuple[list[int], list[int]]:
    """Numbers of the samples that count on one process, and the batches that it asks about."""
    inspector = Inspector(num_samples=2, num_held_out=num_held_out, num_times=2)
    counts = [count for _, count in SOURCES]
    batches = ValidationBatchSampler(counts, [batch_size] * 3, rank=rank, num_ranks=num_ranks)
    trainer: Any = SimpleNamespace(
        sanity_checking=False,
        world_size=num_ranks,
        val_dataloaders=SimpleNamespace(batch_sampler=batches),
        state=SimpleNamespace(fn=TrainerFn.VALIDATING),
    )
    module: Any = SimpleNamespace(
        device="cpu",
        pipeline=None,
        tokenizer=SimpleNamespace(config=SimpleNamespace(num_rounds=1)),
        tokenize=lambda clips: torch.zeros(len(clips), 1, 1, 1, 1, dtype=torch.long),
        condition=lambda batch: None,
    )
    numbers: list[int] = []
    asked: list[int] = []

    def count(*_: Any, sample_index: torch.Tensor, weights: torch.Tensor) -> None:
        numbers.extend(sample_index[weights > 0].tolist())
        asked.append(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspector_module, "accuracy_at_times", count)
        patch.setattr(inspector_module, "LitGenerator", SimpleNamespace)
        inspector.on_validation_start(trainer, module)
        for number, requests in enumerate(batches):
            size = SOURCES[requests[0].source][0]
            batch = {
                "clips": torch.zeros(len(requests), 3, *size),
                "keys": [str(request.index) for request in requests],
                "sample_index": torch.tensor([request.number for request in requests]),
                "weights": torch.tensor([request.weight for request in requests]),
            }
            inspector.on_validation_batch_end(trainer, module, None, batch, number)
    return numbers, asked


@pytest.mark.parametrize(
    ("num_held_out", "expected"),
    [
        (2, [0, 1, 7, 8]),
        (5, [0, 1, 2, 3, 4, 7, 8, 9]),
        (9, [*range(10)]),  # the third source begins with number 10, ten behind the first
        (12, [*range(12)]),
        (99, [*range(14)]),
    ],
)
def test_which_samples_count_is_said_by_their_numbers(
    num_held_out: int, expected: list[int]
) -> None:
    for batch_size in (1, 2, 3, 4, 16):
        for num_ranks in (1, 2, 3, 5, 8):
            each = [counted(num_held_out, batch_size, num_ranks, r) for r in range(num_ranks)]
            assert sorted(n for numbers, _ in each for n in numbers) == expected
            assert all(asked == each[0][1] for _, asked in each)  # sharded weights need all


def test_a_collapse_warns_and_stands_in_tensorboard(
    digits: Path, tokenizer_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that are all one."""
    real = inspector_module.compare_codes
    monkeypatch.setattr(
        inspector_module,
        "compare_codes",
        lambda drawn, true, **rest: real(drawn[:1].expand_as(drawn), true, **rest),
    )
    config = inspected(tmp_path, digits, tokenizer_run, "class")
    config["trainer"] |= {"logger": logger("TensorBoardLogger", tmp_path), "max_steps": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, config)
    texts = [str(one.message) for one in caught if "samples at step 1" in str(one.message)]
    assert any("differ from one another 0% as much" in text for text in texts)
    found = EventAccumulator(str(tmp_path / "log")).Reload()
    assert found.Scalars("inspect/num_alarms")[0].value == len(texts)
    [event] = found.Tensors("inspect/alarms/text_summary")
    assert "0% as much" in event.tensor_proto.string_val[0].decode()


def test_watching_now_and_then_does_not_change_the_training(
    digits: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    for name in ("with", "without"):
        config = inspected(tmp_path / name, digits, tokenizer_run, "class", every_n_validations=2)
        config["trainer"]["max_steps"] = 3
        if name == "without":
            config["trainer"]["callbacks"].pop()
        fit(tmp_path / name, config)
    for quantity in ("train/loss", "val/loss"):
        found = logged(tmp_path / "with", quantity)
        assert list(found) == [0, 1, 2]
        assert found == logged(tmp_path / "without", quantity)
    assert list(logged(tmp_path / "with", "inspect/complexity")) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 1}, "`num_samples` must be at least 2, got 1"),
        ({"num_held_out": 8}, "`num_held_out` must be at least 16, got 8"),
        ({"num_times": 1}, "`num_times` must be at least 2, got 1"),
        ({"every_n_validations": 0}, "`every_n_validations` must be at least 1, got 0"),
    ],
)
def test_looking_at_nothing_is_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Inspector(**settings)


def test_a_tokenizer_run_is_refused(digits: Path, tmp_path: Path) -> None:
    config = tokenizer_config(tmp_path, digits, callbacks=[callback("Inspector")])
    with pytest.raises((ValueError, SystemExit)):
        fit(tmp_path, config)


@pytest.mark.scale
@pytest.mark.slow
def test_two_processes_see_what_one_sees(
    digits: Path, tokenizer_run: Path, generator_runs: dict[str, Path], tmp_path: Path
) -> None:
    """Held-out samples are divided; samples, curves and accuracies are not."""
    checkpoint = find_checkpoint(generator_runs["text"])
    rows = {}
    for name, batch_size in (("one", 4), ("two", 3)):
        folder = tmp_path / name
        config = inspected(folder, digits, tokenizer_run, "text", num_held_out=5)
        config["data"]["init_args"]["sources"][0]["batch_size"] = batch_size
        file = write_yaml(folder, config)
        args = ["validate", "-c", file, "--ckpt_path", checkpoint]
        if name == "two":
            args += ["--trainer.devices=2", "--trainer.strategy=ddp"]
        if name == "one":
            call_grn(*args)
        else:
            process = start_grn(*args, log=folder / "output.txt")
            try:
                assert process.wait(150) == 0, (folder / "output.txt").read_text()
            finally:
                kill(process)
        lines = (folder / "log" / "metrics.csv").read_text().splitlines()
        values = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
        rows[name] = {k: float(v) for k, v in values.items() if "inspect/" in k or "/round" in k}
    assert rows["one"].keys() == rows["two"].keys()
    assert len(rows["one"]) >= 8
    for tag, value in rows["one"].items():
        assert rows["two"][tag] == pytest.approx(value, rel=1e-5, abs=1e-6), tag
    assert TINY_DIGITS.num_val_clips == 6  # two batches of four, the second one filled up
