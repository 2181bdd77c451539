"""What callbacks write can be read back, and what they judge is what is there."""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from grn_lightning.datasets.digits import load_scans
from grn_lightning.lit.callbacks import (
    DigitFeatures,
    EvaluateSamples,
    SampleSheet,
)
from grn_lightning.lit.checkpoints import find_checkpoint, read_checkpoint
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.strategies import ZeRO
from grn_lightning.metrics import Moments, Protocol, ReferenceStatistics
from grn_lightning.metrics.digits import DigitJudge
from grn_lightning.samplers import AdaptiveSteps, RefineConfig
from tests.tiny_runs import (
    TINY_DIGITS,
    call_grn,
    callback,
    checkpoints,
    fit,
    generator_config,
    logger,
    source,
    tokenizer_config,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*used to create the checkpoint need")

PROMPTS = ["the digit one moves left", "the digit two moves up"]
FEW_STEPS = {"num_steps": 2}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a judge that was fitted for a moment: what it says matters less than who says it."""
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    scans = load_scans("train")
    DigitJudge.fit(
        scans.images, scans.labels, digit_size=TINY_DIGITS.digit_size, num_steps=40
    ).save(file)
    return file


def events(folder: Path) -> EventAccumulator:
    """Everything that a run has written for TensorBoard."""
    return EventAccumulator(str(folder / "log"), size_guidance={"images": 0, "scalars": 0}).Reload()


def pictures(folder: Path, tag: str) -> list[Image.Image]:
    """Pictures of a tag, oldest first."""
    return [
        Image.open(io.BytesIO(event.encoded_image_string)) for event in events(folder).Images(tag)
    ]


def watched(config: dict[str, Any], folder: Path, **trainer: Any) -> dict[str, Any]:
    """The run with TensorBoard and a validation every two steps."""
    settings = {"logger": logger("TensorBoardLogger", folder), "val_check_interval": 2}
    config["trainer"] |= settings | {"max_steps": 4} | trainer
    return config


def logged_by_validation(folder: Path, config: dict[str, Any], run: Path) -> dict[str, float]:
    """What `grn validate` logs of a trained run."""
    args = ("-c", write_yaml(folder, config), "--ckpt_path", find_checkpoint(run))
    trainer = call_grn("validate", *args).trainer
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def held_out(config: dict[str, Any]) -> Any:
    """The one validation batch of a run."""
    data = ShardData(**config["data"]["init_args"])
    data.setup("validate")
    (batch,) = data.val_dataloader()
    return batch


# --- sheets ---------------------------------------------------------------------------------------


def test_reconstructions_of_stills_and_films_arrive_in_the_event_file(digits, tmp_path):
    sheet = callback("ReconstructionSheet", num_samples=2, max_rounds=3)
    config = tokenizer_config(tmp_path, digits, callbacks=[sheet])
    fit(tmp_path, watched(config, tmp_path))

    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {"images", "clips"}
    assert [event.step for event in found.Images("clips")] == [2, 4]
    cell = TINY_DIGITS.canvas_size
    for film in pictures(tmp_path, "clips"):  # three rows for each of two samples
        assert film.width >= TINY_DIGITS.num_frames * cell
        assert film.height >= 2 * 3 * cell
    for still in pictures(tmp_path, "images"):
        assert still.width * still.height >= 2 * 3 * cell**2
    curve = {tag for tag in found.Tags()["scalars"] if tag.startswith("psnr_by_rounds/")}
    assert curve == {f"psnr_by_rounds/{name}" for name in ("m1", "m2", "m3", "unquantized")}
    # Two rounds are what the tokenizer has: that point is the PSNR of the first batches.
    at_two = found.Scalars("psnr_by_rounds/m2")[-1].value
    assert at_two == pytest.approx(found.Scalars("val/psnr")[-1].value, abs=2)


def test_a_reconstruction_sheet_shows_what_it_says(digits, tokenizer_run, tmp_path, monkeypatch):
    """Rows are the clip, the tokenizer's reconstruction and half their difference."""
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        "grn_lightning.lit.callbacks.sheets.film_strip",
        lambda cells, labels: shown.update(cells=cells, labels=labels) or Image.new("RGB", (1, 1)),
    )
    config = tokenizer_config(
        tmp_path,
        digits,
        sources=[source(digits, "video", 6)],
        callbacks=[callback("EMA"), callback("ReconstructionSheet", num_samples=2)],
    )
    logged_by_validation(tmp_path, config, tokenizer_run)
    assert shown["labels"] == ["original", "reconstruction", "difference"] * 2
    clips = (held_out(config)["clips"][:2] + 1) * 127.5
    original, reconstruction, difference = shown["cells"].unflatten(0, (2, 3)).unbind(1)
    assert original.equal(clips.round().to(torch.uint8).transpose(1, 2))
    half = (reconstruction.float() - original.float()) / 2 + 127.5
    torch.testing.assert_close(difference.float(), half, rtol=0, atol=1.0)  # each was rounded


def test_samples_of_films_arrive_as_a_film_with_all_frames(digits, tokenizer_run, tmp_path):
    sheet = callback(
        "SampleSheet",
        prompts=PROMPTS,
        num_frames=TINY_DIGITS.num_frames,
        image_size=TINY_DIGITS.canvas_size,
        refine=FEW_STEPS,
        fps=4.0,
    )
    config = generator_config(tmp_path, digits, tokenizer_run, kind="text", callbacks=[sheet])
    fit(tmp_path, watched(config, tmp_path))
    films = pictures(tmp_path, "samples")
    assert len(films) == 2
    for film in films:
        assert film.format == "GIF"
        assert film.n_frames == TINY_DIGITS.num_frames  # type: ignore[attr-defined]
        assert film.info["duration"] == 250
        assert film.width * film.height >= len(PROMPTS) * TINY_DIGITS.canvas_size**2


def test_samples_of_classes_arrive_as_a_picture(digits, tokenizer_run, tmp_path):
    sheet = callback("SampleSheet", class_labels=[0, 3, 9], image_size=16, refine=FEW_STEPS)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="class", callbacks=[sheet])
    fit(tmp_path, watched(config, tmp_path))
    for picture in pictures(tmp_path, "samples"):
        assert picture.format == "PNG"
        assert picture.width * picture.height >= 3 * 16**2


def test_the_same_weights_draw_the_same_samples(digits, tokenizer_run, generator_runs, tmp_path):
    """Fixed seeds, and the average: two validations of one checkpoint show the same bytes."""
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        sheet = callback("SampleSheet", prompts=PROMPTS, num_frames=5, image_size=16,
                         refine=FEW_STEPS)  # fmt: skip
        config = generator_config(
            folder, digits, tokenizer_run, kind="text", callbacks=[callback("EMA"), sheet]
        )
        logged_by_validation(folder, watched(config, folder), generator_runs["text"])
        found.append(events(folder).Images("samples")[0].encoded_image_string)
    assert found[0] == found[1]


def test_a_single_debugging_step_writes_no_film_and_does_not_fail(digits, tokenizer_run, tmp_path):
    sheet = callback("SampleSheet", prompts=PROMPTS, num_frames=5, image_size=16, refine=FEW_STEPS)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="text", callbacks=[sheet])
    fit(tmp_path, watched(config, tmp_path), "--trainer.fast_dev_run=true")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("asked", [{}, {"prompts": PROMPTS, "class_labels": [1]}])
def test_samples_of_nothing_or_of_both_are_refused(asked):
    with pytest.raises(ValueError, match="either `prompts` or `class_labels`"):
        SampleSheet(**asked)


# --- judging --------------------------------------------------------------------------------------


def judged(judge: Path, **settings: Any) -> dict[str, Any]:
    extractor = {
        "class_path": "grn_lightning.lit.callbacks.DigitFeatures",
        "init_args": {"path": str(judge)},
    }
    return callback("EvaluateSamples", extractor=extractor, refine=FEW_STEPS, **settings)


def test_training_logs_distance_and_accuracies_under_the_judge_s_name(
    digits, tokenizer_run, judge, tmp_path
):
    evaluate = judged(judge, num_samples=4, every_n_validations=2)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="text", callbacks=[evaluate])
    fit(tmp_path, watched(config, tmp_path, max_steps=6))
    found = events(tmp_path)
    for tag in ("val/FID[digits-cnn,4]", "val/digit_accuracy", "val/direction_accuracy"):
        assert [event.step for event in found.Scalars(tag)] == [1, 5], tag  # not at step 3
    assert all(event.value > 0 for event in found.Scalars("val/FID[digits-cnn,4]"))
    assert all(0 <= event.value <= 1 for event in found.Scalars("val/digit_accuracy"))
    assert len(found.Scalars("val/loss")) == 3


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_real_samples_have_no_distance_and_go_where_they_say(
    kind, digits, tokenizer_run, generator_runs, judge, tmp_path, monkeypatch
):
    """An oracle that draws the held-out clips themselves; six in batches of 4 and 2."""
    monkeypatch.setattr(LitGenerator, "draw_clips", lambda _, batch, *args, **rest: batch["clips"])
    media = "image" if kind == "class" else "video"
    config = generator_config(
        tmp_path, digits, tokenizer_run, kind=kind,
        sources=[source(digits, media, 4)], callbacks=[judged(judge)],
    )  # fmt: skip
    found = logged_by_validation(tmp_path, config, generator_runs[kind])
    # Six samples have a singular covariance; its square root is what is left of the distance.
    assert found["val/FID[digits-cnn,6]"] == pytest.approx(0, abs=1e-3)
    config["data"]["init_args"]["sources"][0]["batch_size"] = 6
    batch = held_out(config)
    right = DigitJudge.load(judge).classify(batch["clips"]) == batch["class_labels"]
    assert found["val/digit_accuracy"] == pytest.approx(float(right.float().mean()))
    if kind == "text":
        assert found["val/direction_accuracy"] == 1
    else:
        assert "val/direction_accuracy" not in found


def test_a_sample_that_goes_the_other_way_is_wrong(
    digits, tokenizer_run, generator_runs, judge, tmp_path, monkeypatch
):
    """Time reversed: every digit moves against its caption."""
    monkeypatch.setattr(
        LitGenerator, "draw_clips", lambda _, batch, *args, **rest: batch["clips"].flip(2)
    )
    config = generator_config(
        tmp_path, digits, tokenizer_run, kind="text",
        sources=[source(digits, "video", 6)], callbacks=[judged(judge)],
    )  # fmt: skip
    found = logged_by_validation(tmp_path, config, generator_runs["text"])
    assert found["val/direction_accuracy"] == 0
    assert found["val/FID[digits-cnn,6]"] == pytest.approx(0, abs=1e-3)  # the same frames


class Brightness(nn.Module):
    """Two features of every clip; no judge of digits."""

    name = "brightness"
    num_features = 2

    def forward(self, clips: Tensor) -> Tensor:
        return torch.stack([clips.mean((1, 2, 3, 4)), clips.std((1, 2, 3, 4))], 1)


def draw_through(callback: EvaluateSamples) -> tuple[dict[str, float], list[int]]:
    """Let a callback judge nine clips in batches of three, the last of each padding; its log."""
    log: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, v, **_: log.update({name: v}), drawn=[]
    )
    trainer: Any = SimpleNamespace(
        sanity_checking=False, world_size=1, global_step=1, val_dataloaders=None,
        state=SimpleNamespace(fn=TrainerFn.VALIDATING),
    )  # fmt: skip

    def draw_clips(batch: Any, sample_index: Tensor, **_: Any) -> Tensor:
        module.drawn.append(sample_index)
        return batch["clips"] + 0.5

    module.draw_clips = draw_clips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grn_lightning.lit.callbacks.evaluate.LitGenerator", SimpleNamespace)
        callback.on_validation_start(trainer, module)  # type: ignore[arg-type]
        for number, start in enumerate((0, 3, 6)):
            clips = torch.rand(3, 3, 1, 4, 4)
            weights = torch.tensor([1.0, 1.0, 0.0])
            clips[2] = 1000.0
            batch = {"clips": clips, "weights": weights,
                     "sample_index": torch.arange(start, start + 3)}  # fmt: skip
            callback.on_validation_batch_end(trainer, module, None, batch, number)  # type: ignore[arg-type]
        callback.on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    return log, torch.cat(module.drawn).tolist()


def test_any_features_make_a_distance_and_padding_does_not_count():
    """The samples are the first ones by number: of the second batch one, of the third none."""
    log, drawn = draw_through(EvaluateSamples(Brightness(), num_samples=4))
    assert drawn == [0, 1, 2, 3, 4, 5]  # whole batches, as all processes draw them
    assert log.keys() == {"val/FID[brightness,3]"}
    # The mean of the first feature moves by 0.5, the covariances are equal.
    assert log["val/FID[brightness,3]"] == pytest.approx(0.25, abs=1e-6)


def test_statistics_stand_for_the_real_samples(tmp_path):
    moments = Moments(torch.zeros(2).double(), torch.eye(2).double(), 50)
    protocol = Protocol(features="brightness", num_samples=50)
    file = tmp_path / "real.safetensors"
    ReferenceStatistics(moments=moments, protocol=protocol, source="some").save(file)
    callback = EvaluateSamples(Brightness(), num_samples=4, reference=str(file))
    [(tag, value)] = draw_through(callback)[0].items()
    [one] = callback.measurements()
    assert (tag, one.value) == ("val/FID[brightness,3]", value)
    assert one.protocol.reference.startswith("some-")
    assert value > 0.25  # far from the unit covariance
    with pytest.raises(ValueError, match="not made as the samples are judged"):
        EvaluateSamples(Brightness(), reference=str(_of_others(file)))


def _of_others(file: Path) -> Path:
    found = ReferenceStatistics.read(file)
    other = file.with_name("other.safetensors")
    replace(found, protocol=replace(found.protocol, features="darkness")).save(other)
    return other


class OfClips(Brightness):
    """A network of clips, whose distance is called FVD."""

    title = "FVD"


def test_a_distance_of_clips_is_called_so():
    log, _ = draw_through(EvaluateSamples(OfClips(), num_samples=4, metrics=("fid", "kid")))
    assert log.keys() == {"val/FVD[brightness,3]", "val/KID[brightness,3]"}


def test_a_number_that_cannot_be_had_is_missed_aloud():
    callback = EvaluateSamples(Brightness(), num_samples=4, metrics=("fid", "recall", "is"))
    with pytest.warns(UserWarning, match="EvaluateSamples: no ") as told:
        log, _ = draw_through(callback)
    assert log.keys() == {"val/FID[brightness,3]"}
    assert [str(one.message) for one in told] == [
        "EvaluateSamples: no IS: brightness has no classes.",
        "EvaluateSamples: no recall: each set must have at least 4, got 3 samples and 3 real ones.",
    ]


@pytest.mark.filterwarnings("ignore:EvaluateSamples. no IS. its 10 parts need .* got 6:UserWarning")
def test_a_validation_set_too_small_for_a_number_goes_without_it(
    digits, tokenizer_run, judge, tmp_path
):
    """Six pictures have no Inception score, nor have the two of a trial before the first step."""
    evaluate = judged(judge, metrics=["fid", "is", "precision"], every_n_steps=2)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="class", callbacks=[evaluate])
    config = watched(config, tmp_path, max_steps=2)
    config["trainer"]["num_sanity_val_steps"] = 1
    fit(tmp_path, config)
    tags = {tag for tag in events(tmp_path).Tags()["scalars"] if "digits-cnn" in tag}
    assert tags == {"val/FID[digits-cnn,6]", "val/precision[digits-cnn,6]"}


def test_samples_are_judged_every_so_many_steps(digits, tokenizer_run, judge, tmp_path):
    evaluate = judged(judge, num_samples=4, every_n_steps=4)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="class", callbacks=[evaluate])
    fit(tmp_path, watched(config, tmp_path, max_steps=8))  # with a validation every two
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("val/FID[digits-cnn,4]")] == [3, 7]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_training_counts_validations_on(digits, tokenizer_run, judge, tmp_path):
    """Every second of the validations at steps 2, 4, 6, in one piece and resumed behind step 2."""
    settings = {"num_samples": 4, "every_n_validations": 2}
    inspector = callback("Inspector", num_held_out=4, num_times=2, refine=FEW_STEPS, **settings)
    found: dict[tuple[str, int], EventAccumulator] = {}
    for place, stops in (("whole", [6]), ("parts", [2, 6])):
        config = generator_config(
            tmp_path / place, digits, tokenizer_run, kind="class",
            callbacks=[judged(judge, **settings), inspector, checkpoints(tmp_path / place, 2)],
        )  # fmt: skip
        for stop in stops:
            begun = stop > stops[0]
            resume = ["--ckpt_path", find_checkpoint(tmp_path / place)] if begun else []
            fit(tmp_path / place, watched(config, tmp_path / f"{place}{stop}", max_steps=stop),
                *resume)  # fmt: skip
            found[place, stop] = events(tmp_path / f"{place}{stop}")
    for tag in ("val/digit_accuracy", "inspect/complexity"):
        assert [event.step for event in found["whole", 6].Scalars(tag)] == [1, 5]
        assert [event.step for event in found["parts", 6].Scalars(tag)] == [5]


@pytest.mark.parametrize(
    ("between", "accumulated", "every", "is_met"),
    [(2, 1, 4, True), (4, 1, 5, False), (4, 1, 12, True), (4, 2, 6, True), (4, 1, 16, False)],
)
def test_steps_that_no_validation_meets_are_warned_of(between, accumulated, every, is_met):
    trainer: Any = SimpleNamespace(
        val_check_interval=between, accumulate_grad_batches=accumulated, max_steps=12
    )
    module: Any = None
    callback = EvaluateSamples(Brightness(), every_n_steps=every)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.on_fit_start(trainer, module)
    texts = [str(one.message) for one in caught]
    assert [f"multiple of `every_n_steps`={every}" in text for text in texts] == [True] * (
        not is_met
    )


@pytest.mark.filterwarnings("ignore:EvaluateSamples. no validation")
def test_judges_take_no_part_in_training_and_checkpoints(digits, tokenizer_run, judge, tmp_path):
    """Neither hooks of steps nor anything in a checkpoint; losses as if nothing were drawn."""
    hooks = [name for name in dir(L.Callback) if name.startswith(("on_train", "on_before"))]
    own = [name for name in hooks if getattr(EvaluateSamples, name) != getattr(L.Callback, name)]
    assert own == []

    losses = []
    for every in (2, 1000):
        folder, callbacks = tmp_path / str(every), [judged(judge, every_n_steps=every)]
        config = generator_config(
            folder, digits, tokenizer_run, kind="class",
            callbacks=[*callbacks, checkpoints(folder, 4)],
        )  # fmt: skip
        fit(folder, watched(config, folder))
        losses.append([event.value for event in events(folder).Scalars("train/loss")])
        checkpoint = read_checkpoint(find_checkpoint(folder))
        assert not [key for key in checkpoint["state_dict"] if "judge" in key or "trunk" in key]
        assert not [key for key in checkpoint["callbacks"] if "EvaluateSamples" in key]
    assert losses[0] == losses[1]


def test_divided_weights_need_steps_that_are_the_same_for_all():
    adaptive = AdaptiveSteps(slope=1.0, offset=9.0, decision_step=2, min_steps=4)
    callback = EvaluateSamples(Brightness(), refine=RefineConfig(num_steps=9, adaptive=adaptive))
    module = LitGenerator.__new__(LitGenerator)
    for strategy in (ZeRO(), "ddp", "auto"):
        trainer: Any = SimpleNamespace(strategy=strategy)
        if strategy in ("ddp", "auto"):
            callback.setup(trainer, module, "fit")
        else:
            with pytest.raises(ValueError, match="take `adaptive` out of `refine`"):
                callback.setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 1}, "`num_samples` must be at least 2, got 1"),
        ({"every_n_validations": 0}, "`every_n_validations` must be at least 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"metrics": ["psnr"]}, "metrics must be some of fid, .*, got psnr"),
    ],
)
def test_judging_nothing_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        EvaluateSamples(Brightness(), **settings)


def test_a_missing_judge_is_told_with_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"no judge at '.*none.safetensors'.*`grn digits`"):
        DigitFeatures(str(tmp_path / "none.safetensors"))


def test_callbacks_of_the_other_stage_are_refused(capsys, digits, tokenizer_run, judge, tmp_path):
    wrong = [
        generator_config(tmp_path / "0", digits, tokenizer_run, kind="class",
                         callbacks=[callback("ReconstructionSheet")]),
        tokenizer_config(tmp_path / "1", digits,
                         callbacks=[callback("SampleSheet", prompts=PROMPTS)]),
        tokenizer_config(tmp_path / "2", digits, callbacks=[judged(judge)]),
    ]  # fmt: skip
    for number, config in enumerate(wrong):
        with pytest.raises(SystemExit) as stop:
            call_grn("fit", "-c", write_yaml(tmp_path / str(number), config))
        assert stop.value.code == 2
        assert "take it out of `trainer.callbacks`." in capsys.readouterr().err.splitlines()[-1]
