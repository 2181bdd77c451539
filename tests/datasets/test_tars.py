"""A stored index tells what the headers tell, and is not believed of another tar."""

from pathlib import Path

import numpy as np
import pytest

from grn_lightning.datasets import tars
from grn_lightning.datasets.manifest import write_shard
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.datasets.tars import ShardIndex, index_file, index_shard, load_index
from tests.shard_files import image_sample


def same(first: ShardIndex, second: ShardIndex) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_stored_index_is_that_of_the_headers(tmp_path: Path, count: int) -> None:
    path = tmp_path / "train-000000.tar"
    write_shard(path, [image_sample(n) for n in range(count)])
    stored = load_index(path)
    assert stored is not None
    assert same(stored, index_shard(path))


def test_with_a_stored_index_no_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [image_sample(n) for n in range(3)]
    write_shard(tmp_path / "train-000000.tar", samples)
    shards = ShardSet.open(tmp_path, "train-000000.tar")  # counts them by the headers
    monkeypatch.setattr(tars, "_read_members", lambda path: pytest.fail("headers were read"))
    raw = shards.read(2, ("png", "txt", "cls"))
    assert {"__key__": raw.key} | raw.fields == samples[2]


def test_equal_shards_have_equal_indexes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [image_sample(n) for n in range(3)])
    assert (
        index_file(tmp_path / "a.tar").read_bytes() == index_file(tmp_path / "b.tar").read_bytes()
    )


@pytest.mark.parametrize("change", ["longer", "same size", "no npz", "newer", "missing"])
def test_an_index_of_another_tar_is_not_used(tmp_path: Path, change: str) -> None:
    path, other = tmp_path / "a.tar", tmp_path / "b.tar"
    write_shard(path, [image_sample(n) for n in range(3)])
    write_shard(
        other, [image_sample(n) for n in ((0, 1, 2, 3) if change == "longer" else (0, 2, 5))]
    )
    index = index_file(path)
    if change in ("longer", "same size"):
        path.write_bytes(other.read_bytes())
    elif change == "no npz":
        index.write_bytes(b"PK damaged")
    elif change == "newer":
        with np.load(index) as table:
            np.savez(index, **{**table, "format": np.array(99)})
    else:
        index.unlink()
    assert load_index(path) is None
    assert same(tars.locate_samples(path), index_shard(path))
