"""What a person types, and the one sentence that answers a mistake."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yaml import safe_load as yaml_load

from grn_lightning.cli import TOOLS, TRAINER_COMMANDS
from grn_lightning.complaints import explain
from tests.tiny_runs import call_grn, callback, generator_config, tokenizer_config, write_yaml

Change = Callable[[dict[str, Any]], Any]


def put(*path: Any, value: Any) -> Change:
    """Return what sets one entry of a configuration."""

    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run of the tokenizer stage on shards that do not exist."""
    return tokenizer_config(tmp_path / "run", tmp_path / "nowhere")


@pytest.fixture
def yaml(tmp_path: Path, config: dict[str, Any]) -> Path:
    """Its file."""
    return write_yaml(tmp_path / "plain", config)


def refusal(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """Return the sentence with which a command line is refused, and nothing was trained."""
    with pytest.raises(SystemExit) as stop:
        call_grn(*args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    own = [line for line in lines if line.startswith("grn: ")]
    assert len(own) == 1
    assert own[0] == lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not any("usage" in line for line in lines)
    assert len(own[0]) < 300
    return own[0].removeprefix("grn: ")


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_every_command(capsys, args):
    assert call_grn(*args) is None
    printed = capsys.readouterr().out
    for name in (*TRAINER_COMMANDS, *TOOLS):
        assert f"  {name} " in printed


def test_the_module_is_the_command_and_its_help_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['grn']; runpy.run_module('grn_lightning', run_name='x'); "
        "from grn_lightning.cli import main; main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "grn COMMAND" in done.stdout


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fitt", "did you mean 'fit'?"), ("tokenize!", "`grn --help` lists the commands.")],
)
def test_an_unknown_command_is_answered_with_a_hint(capsys, name, hint):
    assert refusal(capsys, name) == f"there is no command '{name}'; {hint}"


# --- unknown keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("model.init_args.optim.lrr", "'model.optim.lrr'; did you mean 'lr'?"),
        ("model.optimm.lr", "'model.optimm.lr'; did you mean 'optim'?"),
        (
            "model.zzz",
            "'model.zzz'; known are tokenizer, loss, adversarial, optim, "
            "procedure, init_from, seed.",
        ),
        ("data.imagesize", "'data.imagesize'; did you mean 'image_size'?"),
        ("trainer.max_step", "'trainer.max_step'; did you mean 'max_steps'?"),
        ("modle.seed", "'modle.seed'; did you mean 'model'?"),
        ("ckpt", "'ckpt'; did you mean 'ckpt_path'?"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(capsys, yaml, option, answer):
    assert refusal(capsys, "fit", "-c", yaml, f"--{option}=1") == f"unknown key {answer}"


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (put("model", "init_args", "optim", "lrr", value=1),
         "'model.optim.lrr'; did you mean 'lr'?"),
        (put("model", "init_args", "tokenizer", "num_round", value=1),
         "'model.tokenizer.num_round'; did you mean 'num_rounds'?"),
        (put("data", "init_args", "sources", 0, "batchsize", value=1),
         "'data.sources.batchsize'; did you mean 'batch_size'?"),
        (put("trainer", "max_step", value=1), "'trainer.max_step'; did you mean 'max_steps'?"),
        (put("trainer", "callbacks", value=[callback("EMA", decai=0.9)]),
         "'trainer.callbacks.decai'; did you mean 'decay'?"),
        (put("modle", value={"seed": 1}), "'modle.seed'; did you mean 'model'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_a_file_is_named_with_the_nearest_one(
    capsys, tmp_path, config, change, answer
):
    change(config)
    file = write_yaml(tmp_path / "wrong", config)
    assert refusal(capsys, "fit", "-c", file) == f"unknown key {answer}"


@pytest.mark.parametrize(
    ("kind", "key", "near"), [("class", "bottlenek", "bottleneck"), ("text", "depht", "depth")]
)
def test_of_two_possible_classes_the_one_that_was_meant_complains(
    capsys, tmp_path, kind, key, near
):
    """`generator` is a `GRNClassConfig` or a `GRNTextConfig`, and both refuse the misspelt key."""
    config = generator_config(tmp_path, tmp_path, tmp_path, kind=kind, generator={key: 3})
    answer = refusal(capsys, "fit", "-c", write_yaml(tmp_path, config))
    assert answer == f"unknown key 'model.generator.{key}'; did you mean '{near}'?"


# --- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("model.init_args.optim.lr=abc", "`model.optim.lr` must be float, got 'abc'."),
        ("trainer.max_steps=abc", "`trainer.max_steps` must be int, got 'abc'."),
        ("model.optim.name=sgd",
         "`model.optim.name` must be one of 'adamw', 'muon', got 'sgd'."),
        ("model.optim.lr=-1", "OptimConfig: `lr` must be positive, got -1.0."),
        ("model.tokenizer=digitz",
         "unknown variant 'digitz'; known are 'image-16d', 'joint-64d', "
         "'digits', 'vq-16', 'vq-8', 'vq-digits'."),
        ("trainer.accumulate_grad_batches=0",
         "`trainer.accumulate_grad_batches` must be at least 1, got 0."),
        ("trainer.gradient_clip_val=-1",
         "`trainer.gradient_clip_val` must be at least 0, or null for none, got -1.0."),
        ("trainer.val_check_interval=0", "`trainer.val_check_interval` must be positive, got 0."),
        ("trainer.devices=-2", "`trainer.devices` must be positive, -1 or 'auto', got '-2'."),
        ("trainer.max_steps=0", "`trainer.max_steps` must be positive, or -1 for no end, got 0."),
        ("model.seed=${nope.x}",
         "`model.init_args.seed` refers to '${nope.x}', which there is not."),
        ("model.seed=${eval:1}",
         "`model.init_args.seed`: Unsupported interpolation type eval."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(capsys, yaml, option, answer):
    assert refusal(capsys, "fit", "-c", yaml, f"--{option}") == answer


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (put("model", "class_path", value="grn_lightning.lit.tokenizer.LitTokeniser"),
         "`model`: there is no 'grn_lightning.lit.tokenizer.LitTokeniser'; did you mean "
         "'grn_lightning.lit.tokenizer.LitTokenizer'?"),
        (put("data", "init_args", "sources", 0, "batch_size", value=0),
         "source 'images': `batch_size` must be at least 1, got 0."),
        (put("model", "init_args", "seed", value="${nope.x}"),
         "`model.init_args.seed` refers to '${nope.x}', which there is not."),
        (lambda config: config["data"]["init_args"].pop("sources"),
         "sources must be given in `data`."),
        (put("model", "init_argz", value={}),
         "`model` must be a LightningModule: `class_path`, `init_args`, and nothing beside them."),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_file_is_named(capsys, tmp_path, config, change, answer):
    change(config)
    assert refusal(capsys, "fit", "-c", write_yaml(tmp_path / "wrong", config)) == answer


def test_an_interpolation_sees_what_the_command_line_changed(capsys, tmp_path, config):
    config["model"]["init_args"]["seed"] = "${data.init_args.image_size}"
    file = write_yaml(tmp_path / "linked", config)
    with pytest.raises(SystemExit) as stop:
        call_grn("fit", "-c", file, "--data.init_args.image_size=48", "--print_config")
    assert stop.value.code == 0
    printed = yaml_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["image_size"] == 48
    assert printed["model"]["init_args"]["seed"] == 48


# --- missing things -------------------------------------------------------------------------------


def test_a_missing_configuration_is_named(capsys):
    answer = refusal(capsys, "fit", "-c", "experiments/nope.yaml")
    assert answer.startswith("`config`: there is no file '")
    assert answer.endswith(f"{os.sep}nope.yaml'.")


def test_a_run_without_a_configuration_is_told_how_to_give_one(capsys):
    assert refusal(capsys, "fit") == "data, model must be given, in a file behind `-c`."


def test_options_before_their_class_are_told_where_to_go(capsys, yaml):
    answer = refusal(capsys, "fit", "--model.seed=1", "-c", yaml)
    assert answer == (
        "'model.seed' comes before its class is known; put options of the model and the data "
        "behind `-c FILE`."
    )


def test_missing_shards_are_named_with_what_makes_them(capsys, yaml):
    answer = refusal(capsys, "fit", "-c", yaml)
    assert "no shards of split 'train'" in answer
    assert "`make data`" in answer


def test_a_missing_checkpoint_is_named_before_anything_is_built(capsys, yaml):
    answer = refusal(capsys, "fit", "-c", yaml, "--ckpt_path=nope.ckpt")
    assert answer.startswith("no checkpoint at 'nope.ckpt': it does not exist.")


def test_a_half_written_checkpoint_is_named_before_anything_is_built(capsys, tmp_path, yaml):
    file = tmp_path / "half.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(10_000)}}, file)
    file.write_bytes(file.read_bytes()[:-1000])
    answer = refusal(capsys, "fit", "-c", yaml, f"--ckpt_path={file}")
    assert answer.startswith(f"'{file}' cannot be read as a checkpoint: it is damaged")


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("model: {}".encode("utf-16"), " is no text in UTF-8; save it as such."),
        (b"trainer:\n\tmax_steps: 3\n",
         ", line 2: found character a tab that cannot start any token; it must be YAML."),
        (b"model: {seed: 1", ", line 1: expected ',' or '}', but got '<stream end>'; it must be Y"),
        (b"a: 3 # \x07", " is no text in UTF-8 that is YAML; save it as such."),
        ("a: 3".encode("utf-16-le"), " is no text in UTF-8 that is YAML; save it as such."),
        (b"hello", " must hold settings, one `name: value` a line."),
        (b"", " must hold settings, one `name: value` a line."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", [["-c"], ["--config"], []])
def test_a_file_that_holds_no_settings_is_named(capsys, tmp_path, yaml, content, answer, option):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    words = [*option, file] if option else [f"--config={file}"]
    for command in (["fit", "-c", yaml], ["bench", "quantizers", tmp_path / "out"]):
        assert refusal(capsys, *command, *words).startswith(f"'{file}'{answer}")


# --- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["--num_train_clip=3"], "unknown key 'num_train_clip'; did you mean 'num_train_clips'?"),
        (["--fps=abc"], "`fps` must be int, got 'abc'."),
        (["--fps=0"], "DigitsConfig: `fps` must be at least 1, got 0."),
    ],
)
def test_a_tool_answers_in_the_same_words(capsys, tmp_path, args, answer):
    assert refusal(capsys, "digits", tmp_path / "set", *args) == answer
    assert not (tmp_path / "set").exists()


def test_what_has_no_option_is_given_alone(capsys):
    told = refusal(capsys, "weights", "--folder", "x")
    assert told == "unknown key 'folder'; 'folder' is given without a name: its value alone."


def test_an_unknown_key_inside_a_known_one_is_told(capsys):
    told = refusal(capsys, "sample", "run", "--draw.corse.temperature", 1)
    assert (
        told
        == "unknown key 'draw.corse.temperature'; `draw` has no 'corse.temperature', see `--help`."
    )


def test_a_tool_names_its_missing_argument(capsys):
    assert refusal(capsys, "digits") == "target must be given."


# --- what is no mistake of a person ---------------------------------------------------------------


def test_an_error_of_a_foreign_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("grn_lightning.cli._run_tool", lambda *_: torch.nn.Dropout(7.0))
    with pytest.raises(ValueError, match="dropout probability"):
        call_grn("digits")


def test_a_plain_sentence_passes_unchanged():
    text = "no shards: expected a folder - got 'x'."
    assert explain(ValueError(text)) == text


def test_a_table_keeps_its_rows():
    text = "'x.ckpt': 2 tensors do not fit.\n  missing  a (3)\n  unexpected  b (4)"
    assert explain(ValueError(text)) == text


def test_a_file_in_the_way_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    told = refusal(capsys, "digits", tmp_path / "file" / "inside")
    assert told == f"'{tmp_path / 'file' / 'inside'}': not a directory."


def test_explaining_changes_no_configuration(config):
    before = copy.deepcopy(config)
    explain(ValueError(f"Does not validate\nGiven value: {config}"))
    assert config == before


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["digits", "somewhere"], "files that were written are whole; give the command again"),
        (["shards", "a", "b"], "the same command goes on where it stopped."),
    ],
)
def test_an_interrupted_tool_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    advice: str,
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grn_lightning.cli._run_tool", interrupt)
    with pytest.raises(SystemExit) as stop:
        call_grn(*command)
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().startswith(f"grn: interrupted; {advice}")


def test_an_interrupted_training_names_its_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shut_down(*args: Any, **kwargs: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    monkeypatch.setattr("grn_lightning.cli._run_trainer", shut_down)
    with pytest.raises(SystemExit) as stop:
        call_grn("fit")
    assert stop.value.code == 130
    assert "the same command with `--resume auto` goes on" in capsys.readouterr().err
