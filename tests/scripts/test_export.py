"""`grn export`: what a run has learned, and that every door which takes a run takes the export."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import grn_lightning
from grn_lightning.lit.checkpoints import EMA_STATE, read_checkpoint, trained_state
from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import read_pretrained, write_pretrained
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.scripts.runs import open_run
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn, tensors_equal


@pytest.fixture(scope="module")
def exports(trained: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One folder of exports of the three runs."""
    folder = tmp_path_factory.mktemp("exports")
    for run, name in zip(trained, ("tok", "text", "classes"), strict=True):
        more = ["--sampling.num_steps", 3] if name != "tok" else []
        call_grn("export", run, "--out", folder / name, *more)
    return Runs(folder / "tok", folder / "text", folder / "classes")


def answer(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        call_grn(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.removeprefix("grn: ")


# --- what is in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Runs._fields)
def test_an_export_has_the_averaged_weights_of_the_run_and_nothing_else(name, trained, exports):
    run, export = getattr(trained, name), getattr(exports, name)
    stored, checkpoint = read_pretrained(export), read_checkpoint(run)
    parts = {"tokenizer": ["tokenizer"], "text": ["generator", "text_encoder"]}
    wanted = tuple(f"{part}." for part in parts.get(name, ["generator"]))
    shadows = checkpoint["callbacks"][EMA_STATE]["shadows"]
    expected = {
        key: shadows.get(key, value)
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(wanted)
    }
    assert tensors_equal(stored.tensors, expected)
    assert tensors_equal(trained_state(export), expected)
    assert any(not shadows[k].equal(checkpoint["state_dict"][k]) for k in shadows)


def test_the_last_weights_are_exported_when_asked_for(trained, tmp_path):
    report = call_grn("export", trained.classes, "--out", tmp_path / "x", "--weights", "last")
    assert report.weights == "last"
    state = read_checkpoint(trained.classes)["state_dict"]
    stored = read_pretrained(tmp_path / "x").tensors
    assert tensors_equal(stored, {k: v for k, v in state.items() if k.startswith("generator.")})


def test_the_json_tells_sizes_hashes_and_data_but_no_place(trained, exports):
    text = Path(f"{exports.text}.json").read_text()
    info = json.loads(text)
    tokenizer_hash = weights_hash(load_tokenizer(trained.tokenizer))
    assert info["tokenizer_hash"] == tokenizer_hash
    assert json.loads(Path(f"{exports.tokenizer}.json").read_text())["tokenizer_hash"] == (
        tokenizer_hash
    )
    assert (info["kind"], info["architecture"]) == ("generator", "GRNText")
    assert info["training"]["step"] == 4
    assert info["training"]["data"]["sources"][0]["path"] == "clips"
    assert str(trained.text.parent) not in text
    assert info["sampling"]["num_steps"] == 3
    assert info["config"]["text_encoder"]["architecture"] == "tiny"


def test_settings_that_a_run_was_calibrated_to_go_along(runs, tmp_path):
    found = {"num_steps": 9, "adaptive": None, "calibration": {"mean": 0.25}}
    (runs.classes / "sampling.json").write_text(json.dumps(found))
    call_grn("export", runs.classes, "--out", tmp_path / "x")
    assert json.loads((tmp_path / "x.json").read_text())["sampling"] == found
    loaded = grn_lightning.load(tmp_path / "x", runs.tokenizer)
    assert isinstance(loaded, GeneratorPipeline)
    assert loaded.sampling.num_steps == 9


def test_the_report_names_files_and_hashes(trained, tmp_path):
    report = str(call_grn("export", trained.classes, "--out", tmp_path / "x"))
    assert report.startswith("GRNClass, averaged weights: generator ")
    assert "belongs to tokenizer " in report
    assert "x.json'" in report


def test_refusals(capsys, trained, exports, tmp_path):
    text = answer(capsys, "export", exports.text, "--out", tmp_path / "x")
    assert "is an export already" in text
    text = answer(capsys, "export", trained.text, "--out", exports.text)
    assert "exists and is not overwritten" in text
    for out in (trained.text, f"{trained.text}.json"):
        text = answer(capsys, "export", trained.text, "--out", out)
        assert f"must be the name of no run, got '{trained.text}'" in text
    assert not list(trained.text.parent.glob("*.json"))
    assert "does not exist" in answer(capsys, "export", tmp_path / "no", "--out", tmp_path / "x")
    assert "is no checkpoint of a run" in answer(capsys, "evaluate", _half(exports, tmp_path), "d")
    assert not list(tmp_path.glob("x*"))


def _half(exports: Runs, folder: Path) -> Path:
    return shutil.copy(f"{exports.text}.safetensors", folder / "half.safetensors")


# --- every door -----------------------------------------------------------------------------------


def batch_of(pipeline: GeneratorPipeline) -> dict[str, Any]:
    return {"captions": ["the digit two"]} if pipeline.is_text else {"class_labels": [2]}


@pytest.mark.parametrize("name", ["text", "classes"])
def test_an_exported_generator_draws_what_its_run_draws(name, trained, exports):
    from_run = grn_lightning.load(getattr(trained, name))
    exported = grn_lightning.load(f"{getattr(exports, name)}.safetensors")
    assert isinstance(from_run, GeneratorPipeline)
    assert isinstance(exported, GeneratorPipeline)
    assert exported.hashes == from_run.hashes
    assert exported.sampling.num_steps == 3
    drawn = [
        pipeline.draw(
            pipeline.condition(batch_of(pipeline)),
            torch.tensor([5]),
            size=(5 if pipeline.is_text else 1, 16, 16),
            config=exported.sampling,
        )
        for pipeline in (from_run, exported)
    ]
    assert drawn[0].elements.equal(drawn[1].elements)
    assert drawn[0].clips.equal(drawn[1].clips)


def test_an_exported_tokenizer_is_the_one_of_the_run(trained, exports):
    loaded = grn_lightning.load(exports.tokenizer)
    assert isinstance(loaded, HBQTokenizer)
    for path in (exports.tokenizer, f"{exports.tokenizer}.json"):
        tokenizer = load_tokenizer(path)
        assert weights_hash(tokenizer) == weights_hash(loaded)
        assert tokenizer.config == load_tokenizer(trained.tokenizer).config
    module = grn_lightning.load(trained.tokenizer)
    assert weights_hash(module) == weights_hash(loaded)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["text", "classes"])
def test_an_exported_generator_is_loaded_as_a_stage(name, trained, exports):
    first, second = load_generator(getattr(trained, name)), load_generator(getattr(exports, name))
    assert tensors_equal(first.state_dict(), second.state_dict())
    assert first.tokenizer_hash == second.tokenizer_hash
    assert (first.target, first.is_text) == (second.target, second.is_text)
    assert not any(parameter.requires_grad for parameter in second.parameters())


@pytest.mark.parametrize("name", ["text", "classes"])
def test_training_starts_from_an_export(name, trained, exports):
    settings = dict(load_generator(getattr(trained, name)).hparams)
    settings |= {"init_from": str(getattr(exports, name)), "tokenizer": str(exports.tokenizer)}
    started = LitGenerator(**settings)
    started.configure_model()
    assert tensors_equal(started.state_dict(), load_generator(getattr(exports, name)).state_dict())
    assert any(parameter.requires_grad for parameter in started.parameters())
    tokenizer = LitTokenizer(
        load_tokenizer(exports.tokenizer).config, init_from=str(exports.tokenizer)
    )
    tokenizer.configure_model()
    assert weights_hash(tokenizer.tokenizer) == weights_hash(load_tokenizer(exports.tokenizer))


def test_training_does_not_start_from_another_kind_or_size(trained, exports):
    settings = dict(load_generator(trained.classes).hparams)
    for wrong, match in (
        (exports.tokenizer, "`init_from`: .*tok' has no generator; what it has is tokenizer"),
        (trained.tokenizer, "has no generator; what it has is .*tokenizer"),
        (exports.text, "`init_from`: .*text': the checkpoint does not fit GRNClass: .* differ"),
    ):
        module = LitGenerator(**settings | {"init_from": str(wrong)})
        with pytest.raises(ValueError, match=match):
            module.configure_model()
    config = dataclasses.replace(load_tokenizer(exports.tokenizer).config, latent_channels=3)
    module = LitTokenizer(config, init_from=str(exports.tokenizer))
    with pytest.raises(ValueError, match=r"other shape  conv1.weight .* in the file, .* in"):
        module.configure_model()


def test_an_export_knows_what_size_it_draws(trained, exports):
    for name in Runs._fields:
        run, export = open_run(getattr(trained, name)), open_run(getattr(exports, name))
        assert (export.stage, export.step, export.samples_seen) == (
            run.stage,
            run.step,
            run.samples_seen,
        )
        sizes = [r.choose_size(r.source(), num_frames=None, image_size=None) for r in (run, export)]
        assert sizes[0] == sizes[1]
        assert export.folder == getattr(exports, name)


def test_commands_take_exports(exports, digits, tmp_path):
    folder = tmp_path / "exports"
    shutil.copytree(exports.text.parent, folder)
    args = ["--num_samples", 1, "--refine.num_steps", 2]
    report = call_grn(
        "sample", folder / "classes", "--class_labels", 3, "--out", tmp_path / "s", *args
    )
    assert len(report.files) == 1
    moving = ["--prompts", "the digit one moves up", "--out", tmp_path / "t", *args]
    drawn = call_grn("sample", folder / "text", *moving)
    job = json.loads((drawn.folder / "samples.json").read_text())
    assert job["size"] == [5, 16, 16]  # as in training
    evaluation = call_grn("evaluate", folder / "tok", digits / "images", "--num_samples", 2)
    assert evaluation.file == folder / "tok" / "evaluation.json"


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture
def other_tokenizer(exports: Runs, tmp_path: Path) -> Path:
    """The same tokenizer with one weight changed."""
    pretrained = read_pretrained(exports.tokenizer)
    network = pretrained.tokenizer()
    with torch.no_grad():
        network.conv1.weight.add_(0.01)
    info = {"kind": "tokenizer", "config": pretrained.info["config"]}
    write_pretrained(tmp_path / "other", {"tokenizer": network}, info)
    return tmp_path / "other"


@pytest.mark.parametrize("load", [grn_lightning.load, load_generator])
def test_another_tokenizer_is_refused_with_both_hashes(load, exports, other_tokenizer):
    hashes = [weights_hash(load_tokenizer(path)) for path in (exports.tokenizer, other_tokenizer)]
    match = f"codes of tokenizer {hashes[0]}, but .* tokenizer {hashes[1]}. Give the former"
    with pytest.raises(ValueError, match=match):
        load(exports.classes, tokenizer=str(other_tokenizer))


@pytest.mark.parametrize("load", [grn_lightning.load, load_generator])
def test_the_tokenizer_is_given_or_lies_beside(load, trained, exports, tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(f"{exports.classes}{suffix}", tmp_path / f"alone{suffix}")
    with pytest.raises(ValueError, match="codes of tokenizer [0-9a-f]{16}, and no export in"):
        load(tmp_path / "alone")
    for place in (str(exports.tokenizer), str(trained.tokenizer)):
        assert load(tmp_path / "alone", tokenizer=place).tokenizer is not None


def test_a_tokenizer_is_given_as_a_network(exports, trained):
    tokenizer = load_tokenizer(exports.tokenizer)
    loaded = grn_lightning.load(exports.classes, tokenizer)
    assert isinstance(loaded, GeneratorPipeline)
    assert loaded.tokenizer is tokenizer
    with pytest.raises(ValueError, match="is a run, which knows"):
        grn_lightning.load(trained.classes, tokenizer)


def test_loading_an_export_needs_no_lightning(exports):
    import subprocess
    import sys

    code = (
        "import sys, grn_lightning; before = len(sys.modules); "
        f"grn_lightning.load({str(exports.classes)!r}); "
        "assert before < 200, before; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
