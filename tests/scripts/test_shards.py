"""`grn shards` says what it made, in words a person can act on."""

from pathlib import Path

import pytest
import torch

from grn_lightning.datasets.manifest import read_manifest
from grn_lightning.media.images import encode_png
from grn_lightning.scripts.shards import ShardsConfig, shards


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three pictures of two classes, a broken one and a stray file."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    (tmp_path / "tree" / "dog" / "2.png").write_bytes(b"")
    (tmp_path / "tree" / "notes.doc").touch()
    return tmp_path / "tree"


def test_the_report_tells_what_was_made_and_what_was_not(tree: Path, tmp_path: Path) -> None:
    (tree / "cat" / "1.txt").write_text("a cat")
    config = ShardsConfig(classes_from_folders=True, num_workers=0)
    report = shards(tree, tmp_path / "out", config=config)
    megabytes = (tmp_path / "out" / "train-000000.tar").stat().st_size / 1e6
    assert str(report).splitlines() == [
        f"shards in {tmp_path / 'out'}",
        f"train: 3 samples (1 with a caption) in 1 shards, {megabytes:.1f} MB",
        "  1 files could not be read: train.skipped.jsonl",
        "2 classes, named in classes.json",
        "files of other kinds were left out: 1 .doc",
    ]
    again = shards(tree, tmp_path / "out", config=config)
    assert "1 shards were there already" in str(again)


def test_defaults_suffice(tree: Path, tmp_path: Path) -> None:
    shards(tree, tmp_path / "out")
    assert read_manifest(tmp_path / "out" / "train.manifest.json").num_samples == 3
