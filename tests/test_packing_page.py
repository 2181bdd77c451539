"""What docs/packing.md shows is taken: its YAML, its settings, its files, its options."""

import re
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import yaml

from grn_lightning.lit.generator import CorruptionConfig, LitGenerator
from grn_lightning.lit.packed import PackedShardData, PackedSource
from grn_lightning.lit.packed_step import LOSS_WEIGHTS
from grn_lightning.nn.packed_attention import BACKENDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "packing.md").read_text(encoding="utf-8")


def test_its_yaml_is_a_configuration():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    shown = yaml.safe_load(block)
    assert shown["class_path"].endswith(PackedShardData.__name__)
    data = PackedShardData(**shown["init_args"])
    assert [source.title for source in data.sources] == ["photos", "clips"]
    assert data.sources[0].presets == {"0.25M": 3, "0.41M": 1}


def test_its_settings_exist():
    data, stage = signature(PackedShardData).parameters, signature(LitGenerator).parameters
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w.\[\]]+)`", row)}
    known = {*data, *stage, *(f"sources[].{field.name}" for field in fields(PackedSource))}
    known |= {f"corruption.{field.name}" for field in fields(CorruptionConfig)}
    known |= {*BACKENDS, *(field.name for field in fields(PackedSource))}
    assert named <= known
    assert {"token_budget", "look_ahead", "max_left_out", "corruption.i2v_ratio"} <= named
    for weights in LOSS_WEIGHTS:
        assert f"`{weights}`" in PAGE


def test_its_files_exist():
    for file in re.findall(r"(?:experiments|tests|benchmarks)/[\w/]+\.\w+", PAGE):
        assert (ROOT / file).is_file(), file


def test_the_arms_of_its_benchmark_agree(monkeypatch, capsys):
    """The benchmark itself takes a minute; here is its shortest round."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import packing  # type: ignore[import-not-found]

    options = "--budget 256 --stride 8 --packs 1 --rounds 1 --attention full"
    monkeypatch.setattr(sys, "argv", ["packing.py", *options.split()])
    packing.main()
    lines = capsys.readouterr().out.splitlines()
    difference = float(lines[1].rpartition(" ")[2])
    assert difference < 1e-5
    assert [line[:20].strip() for line in lines[3:7]] == [
        "packed, documents",
        "packed, dense",
        "padded",
        "padded, sorted",
    ]
