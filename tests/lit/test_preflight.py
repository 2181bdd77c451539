"""Every check before a training passes on a sound run, and tells its sentence on a spoilt one."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit import preflight
from grn_lightning.lit.callbacks import Preflight
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.preflight import (
    CHECKS,
    CheckReport,
    Finding,
    Status,
    check_module,
    merge_reports,
)
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.grn_text import TextCondition
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.pipelines import GeneratorPipeline
from tests.tiny_runs import (
    TINY_DIGITS,
    call_grn,
    checkpoints,
    fit,
    generator_config,
    source,
    tokenizer_config,
    write_yaml,
)

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def batches(digits: Path) -> dict[str, Batch]:
    """A batch of images and one of clips, with classes and captions."""
    made = {}
    for media in ("image", "video"):
        data = ShardData(
            [ShardSource(**source(digits, media, 4))],
            image_size=TINY_DIGITS.canvas_size,
            with_captions=True,
            with_classes=True,
        )
        data.setup("fit")
        made[media] = next(iter(data.train_dataloader()))
    return made


@pytest.fixture(params=["class", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def generator(generator_runs: dict[str, Path], kind: str) -> LitGenerator:
    return load_generator(generator_runs[kind])


@pytest.fixture
def text_generator(generator_runs: dict[str, Path]) -> LitGenerator:
    return load_generator(generator_runs["text"])


@pytest.fixture
def batch(batches: dict[str, Batch], kind: str) -> Batch:
    return dict(batches["image" if kind == "class" else "video"])


@pytest.fixture
def clips(batches: dict[str, Batch]) -> Batch:
    return dict(batches["video"])


@pytest.fixture
def tokenizer(tokenizer_run: Path) -> LitTokenizer:
    module = LitTokenizer.load_from_checkpoint(
        next(iter(tokenizer_run.rglob("last.ckpt"))), map_location="cpu", weights_only=True
    )
    module.configure_model()
    return module


def found(report: CheckReport, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def assert_wrong(report: CheckReport, name: str, sentence: str) -> None:
    finding = found(report, name)
    assert finding.status is Status.WRONG, finding
    assert sentence in finding.text
    assert not report.is_fine
    assert report.exit_code == 1


# --- sound runs -----------------------------------------------------------------------------------


def test_a_sound_generator_passes_every_check_that_concerns_it(generator, batch, kind):
    report = check_module(generator, batch)
    assert report.is_fine, str(report)
    assert [finding.name for finding in report.findings] == [*CHECKS]
    skipped = {finding.name for finding in report.findings if finding.status is Status.SKIPPED}
    assert skipped == ({"text length", "streaming"} if kind == "class" else set())
    assert report.exit_code == 0
    assert "nothing is wrong" in str(report)


def test_a_sound_tokenizer_passes_the_checks_of_codes(tokenizer, clips):
    report = check_module(tokenizer, clips)
    assert report.is_fine, str(report)
    for name in ("pixels", "size", "code format", "bit order", "streaming"):
        assert found(report, name).status is Status.OK


def test_checking_leaves_modes_and_random_numbers_as_they_are(text_generator, clips):
    text_generator.train()
    text_generator.generator.head.eval()
    modes = [part.training for part in text_generator.modules()]
    state = torch.get_rng_state()
    check_module(text_generator, clips)
    assert [part.training for part in text_generator.modules()] == modes
    assert torch.get_rng_state().equal(state)
    assert not text_generator.generator._forward_hooks


def test_networks_that_a_strategy_has_cut_are_not_called(text_generator, clips):
    def refuse(*_: Any) -> None:
        raise AssertionError("called")

    text_generator.generator.register_forward_pre_hook(refuse)
    text_generator.text_encoder.register_forward_pre_hook(refuse)
    report = check_module(text_generator, clips, can_forward=False)
    done = {finding.name for finding in report.findings if finding.status is not Status.SKIPPED}
    assert done == {"pixels", "size", "tokenizer"}


# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: (x + 1) * 127.5, "pixels must be in [-1, 1], got [0.00, 255.00]; scale them"),
        (lambda x: ((x + 1) * 127.5).byte(), "clips must be float in [-1, 1], got torch.uint8"),
    ],
)
def test_pixels_of_another_range_are_wrong(tokenizer, clips, change, sentence):
    original = clips["clips"].clamp(-1, 1)
    original[0, 0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    clips["clips"] = change(original)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        preflight.check_pixels(preflight.Subject(tokenizer, clips))


def test_pixels_between_zero_and_one_are_noted(text_generator, clips):
    clips["clips"] = (clips["clips"] + 1) / 2
    finding = found(check_module(text_generator, clips), "pixels")
    assert finding.status is Status.NOTE
    assert "are they in [0, 1]?" in finding.text


def test_a_size_that_does_not_fit_the_tokenizer_is_wrong(tokenizer, clips):
    clips["clips"] = clips["clips"][..., :12]
    assert_wrong(check_module(tokenizer, clips), "size", "must be positive multiples of 8")


def test_a_size_that_does_not_fit_the_grid_of_the_classes_is_wrong(generator_runs, batches):
    batch = dict(batches["image"])
    batch["clips"] = torch.nn.functional.pad(batch["clips"], (0, 8, 0, 8))
    report = check_module(load_generator(generator_runs["class"]), batch)
    assert_wrong(report, "size", "`generator.grid_size` must be the 3 x 3 positions of one frame")
    assert found(report, "sampler").text == "until the size is right"


def test_a_grid_that_does_not_fit_the_positions_of_text_models_is_wrong(text_generator, clips):
    for columns, is_fine in ((200, True), (300, False)):
        wide = clips | {"clips": torch.zeros(4, 3, 1, 16, columns * 8)}
        report = check_module(text_generator, wide, can_forward=False)
        assert report.is_fine is is_fine
    assert_wrong(report, "size", "must fit into 74 x 225 positions, got 2 x 300")


@pytest.mark.parametrize("kind", ["class", "text"], indirect=True)
def test_samples_without_a_condition_are_wrong(generator, batch, kind):
    field, option = {
        "class": ("class_labels", "with_classes"),
        "text": ("captions", "with_captions"),
    }[kind]
    del batch[field]
    assert_wrong(check_module(generator, batch), "condition", f"set `data.{option}: true`")


def test_classes_that_the_generator_does_not_know_are_wrong(generator_runs, batches):
    batch = dict(batches["image"])
    batch["class_labels"] = batch["class_labels"] + 10
    report = check_module(load_generator(generator_runs["class"]), batch)
    assert_wrong(report, "condition", "`class_labels` must be in [0, 10), got 1")


def test_captions_that_are_cut_are_noted(text_generator, clips):
    clips["captions"] = ["the digit " * 20] + clips["captions"][1:]
    finding = found(check_module(text_generator, clips), "text length")
    assert finding.status is Status.NOTE
    assert "1 of 2 captions fill all 9 tokens" in finding.text


def test_an_encoder_with_more_tokens_than_positions_is_wrong(text_generator, clips, monkeypatch):
    encoder = type(text_generator.text_encoder)
    monkeypatch.setattr(encoder, "context_length", property(lambda self: 600))
    with pytest.raises(ValueError, match="must be at most 512, the positions before the time"):
        preflight.check_text_length(preflight.Subject(text_generator, clips))


# --- codes ----------------------------------------------------------------------------------------


def cached(module: LitGenerator, batch: Batch) -> Batch:
    """The batch as it comes from shards of codes."""
    codes = module.tokenizer.tokenize(batch["clips"])
    rest = {name: value for name, value in batch.items() if name != "clips"}
    size = tuple(batch["clips"].shape[2:])
    return {**rest, "codes": codes, "clip_size": size, "tokenizer_hash": module.tokenizer_hash}


def test_cached_codes_are_checked_like_clips(text_generator, clips):
    report = check_module(text_generator, cached(text_generator, clips))
    assert report.is_fine, str(report)
    assert "which has made the cached codes" in found(report, "tokenizer").text
    assert found(report, "sampler").status is Status.OK


def test_codes_of_another_tokenizer_are_wrong(text_generator, clips):
    batch = cached(text_generator, clips) | {"tokenizer_hash": "0123456789abcdef"}
    report = check_module(text_generator, batch)
    assert_wrong(report, "tokenizer", "the cache was made by tokenizer 0123456789abcdef, but")


def test_codes_that_change_in_the_packed_format_are_wrong(text_generator, clips, monkeypatch):
    def reversed_bits(data: bytes, entry: Any) -> Any:
        return original(bytes(data[::-1]), entry | {"crc32": preflight_crc(data[::-1], entry)})

    from grn_lightning.datasets import codes

    def preflight_crc(data: bytes, entry: Any) -> int:
        plain = {name: value for name, value in entry.items() if name != "crc32"}
        return codes._checksum(plain, bytes(data))

    original = preflight.decode_codes
    monkeypatch.setattr(preflight, "decode_codes", reversed_bits)
    report = check_module(text_generator, clips)
    assert_wrong(report, "code format", "codes that were packed and unpacked are others")


def test_a_tokenizer_that_reconstructs_nothing_is_noted(text_generator, clips):
    with torch.no_grad():
        text_generator.tokenizer.decoder.head[2].weight.normal_(std=5)
    finding = found(check_module(text_generator, clips), "code format")
    assert finding.status is Status.NOTE
    assert "is the tokenizer trained, and on such data?" in finding.text


def test_bits_channel_by_channel_are_wrong(text_generator, clips, monkeypatch):
    tokenize = GeneratorPipeline.tokenize

    def channel_major(self: GeneratorPipeline, x: torch.Tensor) -> torch.Tensor:
        bits = tokenize(self, x)
        rounds = self.tokenizer.config.num_rounds
        return bits.unflatten(1, (rounds, -1)).transpose(1, 2).flatten(1, 2)

    monkeypatch.setattr(GeneratorPipeline, "tokenize", channel_major)
    report = check_module(text_generator, clips)
    assert_wrong(report, "bit order", "the generator's elements are not the codes of the tokenizer")


def test_bits_that_the_decoder_reads_in_reverse_are_wrong(text_generator, clips, monkeypatch):
    dequantize = HBQTokenizer.dequantize
    last = 2**text_generator.tokenizer.config.num_rounds - 1
    monkeypatch.setattr(
        HBQTokenizer, "dequantize", lambda self, codes: dequantize(self, last - codes)
    )
    report = check_module(text_generator, clips)
    assert_wrong(report, "bit order", "bits do not add up to the latents that the decoder reads")


def test_codes_that_are_not_those_of_the_latents_are_wrong(text_generator, clips, monkeypatch):
    encode = HBQTokenizer.encode
    calls: list[None] = []

    def other_latents(self: HBQTokenizer, x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return -encode(self, x)

    subject = preflight.Subject(text_generator, clips)
    codes = text_generator.tokenizer.tokenize(clips["clips"])
    monkeypatch.setattr(preflight, "_codes", lambda _: codes)
    monkeypatch.setattr(text_generator, "_elements", lambda _: text_generator_elements)
    text_generator_elements = preflight.codes_to_elements(codes, num_rounds=2, target="bit")
    monkeypatch.setattr(HBQTokenizer, "encode", other_latents)
    with pytest.raises(ValueError, match="away from the latents, more than half a bin"):
        preflight.check_bit_order(subject)
    assert calls


def test_a_stream_that_forgets_is_wrong(tokenizer, clips, monkeypatch):
    monkeypatch.setattr(HBQTokenizer, "encode_streaming", lambda self, x: self.encode(x) * 1.01)
    report = check_module(tokenizer, clips)
    assert_wrong(report, "streaming", "a clip encoded chunk by chunk differs by")


# --- sampling -------------------------------------------------------------------------------------


def test_a_sampler_with_another_null_condition_is_wrong(generator, batch, kind, monkeypatch):
    def another(self: GeneratorPipeline, batch_size: int, negative_prompt: str = "") -> Any:
        if kind == "class":
            return torch.zeros(batch_size, dtype=torch.long)
        return self.condition({"captions": ["no text"] * batch_size})

    trained = copy.deepcopy(generator.null_condition(1))
    monkeypatch.setattr(GeneratorPipeline, "null_condition", another)
    monkeypatch.setattr(generator, "null_condition", lambda number: trained)
    report = check_module(generator, batch)
    assert_wrong(report, "sampler", "the sampler's logits differ from those of training")


def test_a_text_cache_of_other_captions_is_wrong(text_generator, clips, monkeypatch):
    encode_text = type(text_generator.generator).encode_text

    def shifted(self: Any, condition: TextCondition) -> Any:
        return encode_text(self, condition._replace(embeds=condition.embeds.roll(1, dims=1)))

    monkeypatch.setattr(type(text_generator.generator), "encode_text", shifted)
    report = check_module(text_generator, clips)
    assert_wrong(
        report, "sampler", "The condition, the null condition or the text cache is another"
    )


def test_cached_text_features_of_another_encoder_are_wrong(text_generator, clips):
    features = text_generator.condition(clips)
    batch = clips | {"text_embeds": -features.embeds, "text_mask": features.mask}
    report = check_module(text_generator, batch)
    assert_wrong(report, "sampler", "cached text features must come from this text encoder")


# --- before the first step ------------------------------------------------------------------------


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def spoil() -> None:
        def wrong(_: Any) -> Any:
            raise ValueError("it is upside down; turn it.")

        monkeypatch.setitem(CHECKS, "pixels", wrong)

    return spoil


def test_a_training_checks_itself_once_before_its_first_step(
    digits, tokenizer_run, tmp_path, monkeypatch
):
    steps = []

    def count(subject: Any) -> Any:
        steps.append(subject.module.trainer.global_step)
        return preflight.Outcome(Status.OK, "seen")

    monkeypatch.setitem(CHECKS, "pixels", count)
    trainer = fit(tmp_path, generator_config(tmp_path, digits, tokenizer_run, kind="text"))
    assert steps == [0]
    assert trainer.global_step == 4


def test_a_training_with_something_wrong_stops_before_its_first_step(
    digits, tmp_path, spoilt, capsys
):
    spoilt()
    with pytest.raises(SystemExit):
        fit(tmp_path, tokenizer_config(tmp_path, digits))
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the checks before the first step found something wrong: [pixels] it is upside" in said
    assert "`--preflight.enabled=false` trains all the same" in said


def test_the_checks_can_be_turned_off(digits, tmp_path, spoilt):
    spoilt()
    config = tokenizer_config(tmp_path, digits, trainer={"max_steps": 1})
    trainer = fit(tmp_path, config, "--preflight.enabled=false")
    assert trainer.global_step == 1


def test_checking_no_sample_is_refused():
    with pytest.raises(ValueError, match=r"`preflight.num_samples` must be at least 1, got 0"):
        Preflight(num_samples=0)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_checks_runs_and_trainings(
    digits, tokenizer_run, generator_runs, tmp_path, capsys
):
    for run in (tokenizer_run, *generator_runs.values()):
        report = call_grn("check", run)
        assert report.is_fine, str(report)
        assert [finding.name for finding in report.findings] == ["loading", "data", *CHECKS]
    config = generator_config(tmp_path, digits, tokenizer_run, kind="class")
    report = call_grn("check", "-c", write_yaml(tmp_path, config))
    assert report.is_fine
    assert [finding.name for finding in report.findings] == [*CHECKS]
    assert str(report) in capsys.readouterr().out
    assert not (tmp_path / "log").exists()  # nothing was started


def test_the_command_fails_where_something_is_wrong(
    digits, tokenizer_run, generator_runs, tmp_path, capsys
):
    config = generator_config(tmp_path, digits, tokenizer_run, kind="class")
    yaml = write_yaml(tmp_path, config)
    with pytest.raises(SystemExit) as stop:
        call_grn("check", "-c", yaml, "--data.init_args.image_size=32")
    assert stop.value.code == 1
    assert "`generator.grid_size` must be the 4 x 4 positions" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        call_grn("check", "-c", yaml, "--model.init_args.tokeniser=x")
    assert stop.value.code == 2
    assert "did you mean 'tokenizer'?" in capsys.readouterr().err


def test_a_run_with_another_tokenizer_is_told_both_hashes(digits, generator_runs, tmp_path, capsys):
    other = tmp_path / "other"
    fit(
        other,
        tokenizer_config(
            other, digits, trainer={"max_steps": 1}, callbacks=[checkpoints(other, 1)]
        ),
    )
    with pytest.raises(SystemExit) as stop:
        call_grn("check", generator_runs["class"], "--tokenizer", other)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "loading  WRONG" in said
    assert "the checkpoint was trained on codes of tokenizer" in said


def test_an_export_is_checked_on_shards(digits, generator_runs, tokenizer_run, tmp_path):
    call_grn("export", tokenizer_run, "--out", tmp_path / "tokenizer")
    for kind, run in generator_runs.items():
        call_grn("export", run, "--out", tmp_path / kind)
        shards = digits / ("clips" if kind == "text" else "images")
        report = call_grn("check", tmp_path / kind, "--data", shards)
        assert report.is_fine, str(report)
        assert found(report, "data") == Finding("data", Status.OK, str(shards))
    with pytest.raises(SystemExit) as stop:
        call_grn("check", tmp_path / "tokenizer", "--num_samples", 0)
    assert stop.value.code == 2


def test_made_up_samples_stand_in_for_data_that_is_gone(generator_runs, tokenizer_run, monkeypatch):
    from grn_lightning.scripts import check

    class Gone:
        def __init__(self, **_: Any) -> None:
            raise ValueError("no shards here.")

    monkeypatch.setattr(check, "ShardData", Gone)
    for run in (tokenizer_run, *generator_runs.values()):
        report = call_grn("check", run)
        assert report.is_fine, str(report)
        finding = found(report, "data")
        assert finding.status is Status.NOTE
        assert finding.text.startswith("no shards here. Made-up samples are checked instead")


def test_of_several_batches_the_worst_finding_of_each_check_is_told():
    def report(*statuses: Status) -> CheckReport:
        pairs = zip("ab", statuses, strict=True)
        return CheckReport(tuple(Finding(name, status, status.name) for name, status in pairs), 1.0)

    merged = merge_reports(
        [
            report(Status.OK, Status.SKIPPED),
            report(Status.WRONG, Status.OK),
            report(Status.NOTE, Status.NOTE),
        ]
    )
    assert [finding.status for finding in merged.findings] == [Status.WRONG, Status.NOTE]
    assert merged.seconds == 3
    assert str(merged).endswith("2 checks in 3.0 s: 1 wrong")


def test_the_page_explains_every_check_and_shows_the_table():
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["check", "loading", *CHECKS]
    shown = page[page.index("\nloading ") :].splitlines()[1:12]
    assert [line[:12].strip() for line in shown] == ["loading", "data", *CHECKS]
