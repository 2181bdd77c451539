"""Shards and their list: what is written is counted, and damage is never counted."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from grn_lightning.datasets.manifest import (
    Manifest,
    ShardInfo,
    atomic_file,
    read_manifest,
    scan_shard,
    write_manifest,
    write_shard,
)


def _samples(count: int) -> Iterator[dict[str, str | bytes]]:
    for n in range(count):
        sample: dict[str, str | bytes] = {
            "__key__": f"{n:04d}",
            "png": bytes([n]) * (100 + 300 * n),
        }
        yield sample | ({"txt": "caption é".encode()} if n % 2 else {})


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    shards = (ShardInfo("train-000000.tar", 10, 1000), ShardInfo("train-000001.tar", 7, 800))
    manifest = Manifest(shards, ("cls", "jpg"))
    write_manifest(tmp_path / "train.manifest.json", manifest)
    assert read_manifest(tmp_path / "train.manifest.json") == manifest
    assert manifest.num_samples == 17
    assert json.loads((tmp_path / "train.manifest.json").read_text()) == {
        "format": 1,
        "fields": ["cls", "jpg"],
        "shards": [
            {"name": "train-000000.tar", "num_samples": 10, "num_bytes": 1000},
            {"name": "train-000001.tar", "num_samples": 7, "num_bytes": 800},
        ],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must have format 1, got None"),
        ('{"format": 2}', "must have format 1, got 2"),
        ('{"format": 1, "fields": []}', "lacks or adds an entry: 'shards'"),
        ('{"format": 1, "fields": [], "shards": [{"name": "a"}]}', "lacks or adds an entry"),
    ],
)
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"x.manifest.json {message}"):
        read_manifest(path)


def test_a_missing_manifest_tells_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grn shards"):
        read_manifest(tmp_path / "none.manifest.json")


def test_scanning_sees_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a-000000.tar"
    written = write_shard(path, _samples(5))
    assert scan_shard(path) == written
    assert written.info == ShardInfo("a-000000.tar", 5, path.stat().st_size)
    assert written.fields == ("png", "txt")
    assert written.keys == ("0000", "0001", "0002", "0003", "0004")
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:3]] == ["0000.png", "0001.png", "0001.txt"]
        assert {m.mtime for m in members} == {0}
        assert tar.extractfile("0001.txt").read().decode() == "caption é"


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, _samples(4))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_empty_shard_is_a_whole_one(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.tar", []) == scan_shard(tmp_path / "a.tar")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A cut within the end mark alone loses no sample and may pass."""
    whole, cut = tmp_path / "a.tar", tmp_path / "cut.tar"
    write_shard(whole, _samples(4))
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + (last.size + 511) // 512 * 512
    for length in [*range(0, end, 256), end - 1, end, end + 100]:
        cut.write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"cut\.tar cannot be read to its end \(.*samples can be"
        ):
            scan_shard(cut)


def test_garbage_between_members_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, _samples(4))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"\xa5" * 512
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no end mark"):
        scan_shard(path)


@pytest.mark.parametrize("key", ["a.b", "folder.x/a.b", "0000"])
def test_keys_that_readers_would_confuse_are_refused(tmp_path: Path, key: str) -> None:
    samples = [{"__key__": "0000", "png": b""}, {"__key__": key, "png": b""}]
    with pytest.raises(ValueError, match="keys must differ and hold no dot"):
        write_shard(tmp_path / "a.tar", samples)
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_its_name_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as stream:
            stream.write(b"new, but not all of it")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"old")]
