"""What docs/tokenizer.md names exists: files, keys, curves; its YAML and its options are taken."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from grn_lightning.cli import main
from grn_lightning.lit.adversarial import AdversarialConfig
from grn_lightning.lit.stepping import ProcedureConfig
from grn_lightning.lit.tokenizer import ReconstructionLossConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tokenizer.md").read_text(encoding="utf-8")


def names(config: type) -> set[str]:
    return {field.name for field in fields(config)}


def test_its_experiments_exist():
    files = set(re.findall(r"`(?:experiments/)?(tokenizer/\w+\.yaml)`", PAGE))
    assert len(files) >= 7
    for file in files:
        assert (ROOT / "experiments" / file).is_file(), file


def test_its_game_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    game = AdversarialConfig(**yaml.safe_load(block)["adversarial"])
    assert game.image == game.video == AdversarialConfig().image


def test_its_keys_exist():
    procedure = set(re.findall(r"procedure\.(\w+)", PAGE))
    assert procedure == names(ProcedureConfig)
    for key in re.findall(r"adversarial\.(\w+)", PAGE):
        assert key in names(AdversarialConfig)
    for key in re.findall(r"model\.loss\.(\w+)", PAGE):
        assert key in names(ReconstructionLossConfig)


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--model\.init_args\.\S+?=\w+", PAGE))))
def test_its_options_are_taken(option, monkeypatch, capsys):
    files = ("experiments/_base/cpu.yaml", "experiments/tokenizer/digits_gan.yaml")
    given = [part for file in files for part in ("-c", str(ROOT / file))]
    monkeypatch.setattr(sys, "argv", ["grn", "fit", *given, option, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    value: object = yaml.safe_load(capsys.readouterr().out)
    path, _, expected = option.removeprefix("--").partition("=")
    for key in path.split("."):
        assert isinstance(value, dict)
        value = value[key]
    assert value == yaml.safe_load(expected)
