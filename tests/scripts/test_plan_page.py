"""docs/plan.md: what it shows is what `grn plan` says; what it lists is what there is."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from grn_lightning.cli import main
from grn_lightning.lit.callbacks import Throughput
from grn_lightning.lit.devices import DEVICES
from grn_lightning.scripts.plan import PlanConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


@pytest.mark.scale
def test_the_page_shows_what_the_command_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^grn plan .*--device 4090.*$", PAGE, re.MULTILINE)
    shown = PAGE[PAGE.index(command) :].partition("```text\n")[2].partition("```")[0]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    main()
    assert capsys.readouterr().out == shown


def test_its_options_are_all_there_are() -> None:
    table = PAGE[PAGE.index("| option |") :].partition("\n\n")[0]
    options = set(re.findall(r"`--(\w+)`", table))
    assert options == set(PlanConfig.__dataclass_fields__)
    assert all(name in table for name in DEVICES)


def test_its_tags_are_those_of_the_callback() -> None:
    assert Throughput.__doc__ is not None
    written = set(re.findall(r"\| `(perf/\w+)` \|", PAGE))
    assert written == set(re.findall(r"\| `(perf/\w+)` \|", Throughput.__doc__))
