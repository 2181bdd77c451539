"""Shards give the samples that were written, and say so when they cannot."""

import io
import pickle
import tarfile
from contextlib import ExitStack

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from grn_lightning.datasets import shards as shards_module
from grn_lightning.datasets.manifest import scan_shard
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.datasets.tars import index_shard, split_name
from tests.shard_files import image_sample, write_split

FIELDS = ("png", "cls", "txt")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_samples_are_those_that_were_written(tmp_path):
    samples = [image_sample(i) for i in range(10)]
    write_split(tmp_path, "train", samples)
    shards = ShardSet.open(tmp_path, "train")
    assert (len(shards), shards.shard_sizes) == (10, (4, 4, 2))
    assert shards.fields == ("cls", "png", "txt")
    for index in (9, 0, 4, 3, 7, 1):
        raw = shards.read(index, FIELDS)
        assert {"__key__": raw.key} | raw.fields == samples[index]


def test_webdataset_reads_the_same_samples(tmp_path):
    paths = write_split(tmp_path, "train", [image_sample(i) for i in range(7)])
    shards = ShardSet.open(tmp_path, "train")
    with ExitStack() as stack:  # its own loader leaves the files open
        streams = [{"url": "", "stream": stack.enter_context(p.open("rb"))} for p in paths]
        theirs = list(group_by_keys(tar_file_expander(streams)))
    assert len(theirs) == len(shards)
    for index, sample in enumerate(theirs):
        raw = shards.read(index, FIELDS)
        assert raw.key == sample["__key__"]
        assert raw.fields == {field: sample[field] for field in FIELDS}


def test_only_the_wanted_fields_are_read(tmp_path):
    write_split(tmp_path, "train", [image_sample(0)])
    raw = ShardSet.open(tmp_path, "train").read(0, ("txt", "json"))
    assert raw.fields == {"txt": b"picture 0\n"}


def test_a_pickled_set_reads_alike_and_carries_no_open_file(tmp_path):
    write_split(tmp_path, "train", [image_sample(i) for i in range(6)])
    shards = ShardSet.open(tmp_path, "train")
    before = shards.read(5, FIELDS)
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._files.handles
    assert copy.read(5, FIELDS) == before


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_OPEN_FILES", 3)
    write_split(tmp_path, "train", [image_sample(i) for i in range(8)], shard_size=1)
    shards = ShardSet.open(tmp_path, "train")
    for index in [*range(8), *range(8)]:
        assert shards.read(index, ("txt",)).fields["txt"] == f"picture {index}\n".encode()
        assert len(shards._files.handles) <= 3


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("cats.v2/0001.PNG", "cats.v2/0001", "png"),
        ("0001.text.npz", "0001", "text.npz"),
        ("README", "README", ""),
    ],
)
def test_the_first_dot_of_the_file_ends_the_key(name, key, field):
    assert split_name(name) == (key, field)


def test_folders_long_names_and_strangers_in_a_tar(tmp_path):
    long = "x" * 150
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "a/0.jpg", b"first")
        add(tar, "a/0.pyd", b"never read")
        add(tar, "a/0.txt", b"caption")
        add(tar, "b/0.JPG", b"second")
        add(tar, "LICENSE", b"not a sample")
        add(tar, f"{long}.jpg", b"third")
    shards = ShardSet.open(tmp_path, "s.tar")
    assert shards.fields == ("jpg", "txt")
    read = [shards.read(i, ("jpg", "txt", "pyd")) for i in range(len(shards))]
    assert [(raw.key, raw.fields) for raw in read] == [
        ("a/0", {"jpg": b"first", "txt": b"caption"}),
        ("b/0", {"jpg": b"second"}),
        ("LICENSE", {}),
        (long, {"jpg": b"third"}),
    ]
    assert len(shards) == scan_shard(tmp_path / "s.tar").info.num_samples


# --- finding shards -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["train-{000000..000002}.tar", "train-*.tar", "train"])
def test_shards_without_a_manifest_are_scanned(tmp_path, pattern):
    write_split(tmp_path, "train", [image_sample(i) for i in range(10)])
    (tmp_path / "train.manifest.json").unlink()
    shards = ShardSet.open(tmp_path, pattern)
    assert shards.shard_sizes == (4, 4, 2)
    assert shards.fields == ("cls", "png", "txt")
    assert shards.read(9, FIELDS).key == "000009"


def test_missing_shards_are_listed(tmp_path):
    paths = write_split(tmp_path, "train", [image_sample(i) for i in range(10)])
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing(.|\n)*train-000001\.tar"):
        ShardSet.open(tmp_path, "train")
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing(.|\n)*train-000001\.tar"):
        ShardSet.open(tmp_path, "train-{000000..000002}.tar")


def test_an_empty_folder_says_what_to_run(tmp_path):
    write_split(tmp_path, "val", [image_sample(0)])
    with pytest.raises(
        ValueError, match=r"no shards of split 'train'.*splits there: val.*grn shards"
    ):
        ShardSet.open(tmp_path, "train")


@pytest.mark.parametrize(
    "path", ["pipe:touch hacked", "http://host/a.tar", "s3://bucket/set", "PIPE: cat x"]
)
def test_only_local_files_are_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for folder, split in ((path, "train"), (".", f"{path}.tar")):
        with pytest.raises(ValueError, match="must be local files"):
            ShardSet.open(folder, split)
    assert not list(tmp_path.iterdir())


# --- damage ---------------------------------------------------------------------------------------


def cut(path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize("where", ["in data", "in a header", "before a header"])
def test_a_truncated_tar_loses_its_end_with_a_warning(tmp_path, where):
    path = write_split(tmp_path, "train", [image_sample(i) for i in range(4)])[0]
    first_of_third = int(index_shard(path).offsets[2].min())
    header = first_of_third - 512
    cut(path, {"in data": first_of_third, "in a header": header + 9}.get(where, header))
    shards = ShardSet.open(tmp_path, "train")
    with pytest.warns(UserWarning, match=r"train-000000\.tar holds 2 samples where 4 are expected"):
        assert shards.read(1, FIELDS).fields == {
            k: v for k, v in image_sample(1).items() if k != "__key__"
        }
    with pytest.raises(ValueError, match="ends after 2 samples"):
        shards.read(2, FIELDS)
    assert shards.describe(3).endswith("train-000000.tar: sample 3")

    (tmp_path / "train.manifest.json").unlink()
    with pytest.warns(
        UserWarning, match=r"train-000000\.tar is damaged .*first 2 samples are used"
    ):
        assert len(ShardSet.open(tmp_path, "train")) == 2


def test_garbage_in_the_middle_is_noticed(tmp_path):
    path = write_split(tmp_path, "train", [image_sample(i) for i in range(4)])[0]
    data = bytearray(path.read_bytes())
    start = int(index_shard(path).offsets[2].min()) - 512
    data[start : start + 512] = b"\xa5" * 512
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="holds 2 samples where 4 are expected"):
        ShardSet.open(tmp_path, "train").read(0, FIELDS)


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_a_file_that_is_no_tar_has_no_samples(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    index = index_shard(path)
    assert len(index.keys) == 0
    assert index.damage
