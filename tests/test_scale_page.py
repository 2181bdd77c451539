"""What docs/scale.md shows is taken: its commands, names, files; its bytes are counted right."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from grn_lightning.cli import main
from grn_lightning.lit.shards import _STAND_INS
from grn_lightning.lit.strategies import STRATEGIES, ZeRO

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
FIT = re.findall(r"^grn (fit .*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", FIT)
def test_its_commands_are_taken(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["grn", *command.split(), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert f"--trainer.strategy={shown['trainer']['strategy']}" in command
    is_zero = "deepspeed" in command
    assert (shown["model"]["init_args"]["optim"]["name"] == "adamw") == is_zero


def test_every_strategy_is_described():
    assert len(FIT) == 3
    named = set(re.findall(r"`((?:deepspeed|fsdp|ddp)\w*)`", PAGE)) - {"deepspeed_zeroN"}
    assert named == {"ddp", *STRATEGIES}
    for base in ("zero2", "fsdp"):
        trainer = yaml.safe_load((ROOT / f"experiments/_base/{base}.yaml").read_text())["trainer"]
        assert trainer["strategy"] in named
    assert len(_STAND_INS) == 4


def test_its_bytes_add_up():
    rows = re.findall(r"^\| `(?:ddp|deep|fsdp)[^|]*\|((?: [\d./ N]+\|){5})$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        *parts, total = [cell.strip() for cell in row.strip("|").split("|")]
        numbers = [int(part.split("/")[0]) / (8 if "N" in part else 1) for part in parts]
        assert sum(numbers) == float(total), row


def test_its_strategy_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    shown = yaml.safe_load(block)["trainer"]["strategy"]
    assert shown["class_path"] == f"{ZeRO.__module__}.{ZeRO.__name__}"
    assert shown["init_args"]["stage"] == 3
