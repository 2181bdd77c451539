"""Samples become batches; bad ones are replaced alike every time, and too many stop the run."""

import pickle
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grn_lightning.datasets import samples as samples_module
from grn_lightning.datasets.order import SampleRequest
from grn_lightning.datasets.samples import (
    SampleFormat,
    SampleReader,
    ShardDataset,
    check_fields,
    collate,
)
from grn_lightning.datasets.shards import ShardSet
from tests.shard_files import image_sample, numbers_in, picture, video_sample, write_split

IMAGES = SampleFormat(media="image", size=(8, 8), with_classes=True, with_captions=True)
VIDEOS = SampleFormat(media="video", size=(16, 16), num_frames=3)


def reader(folder: Path, samples: list[dict], sample_format=IMAGES, **options) -> SampleReader:
    write_split(folder, "train", samples)
    return SampleReader(ShardSet.open(folder, "train"), sample_format, **options)


def request(index: int, *, number: int | None = None, weight: float = 1.0) -> SampleRequest:
    return SampleRequest(index if number is None else number, 0, index, weight)


# --- what a batch holds ---------------------------------------------------------------------------


def test_an_image_batch_holds_what_was_written(tmp_path):
    dataset = ShardDataset([reader(tmp_path, [image_sample(i) for i in range(20)])])
    batch = collate([dataset[request(3, number=70)], dataset[request(12, number=71, weight=0.0)]])
    assert set(batch) == {
        "clips", "class_labels", "captions", "keys", "sample_index", "weights",
    }  # fmt: skip
    expected = torch.stack([picture(3), picture(12)])[:, :, None] / 127.5 - 1
    torch.testing.assert_close(batch["clips"], expected)
    assert batch["class_labels"].tolist() == [3, 2]
    assert batch["captions"] == ["picture 3", "picture 12"]
    assert batch["keys"] == ["000003", "000012"]
    assert batch["sample_index"].tolist() == [70, 71]
    assert batch["weights"].tolist() == [1, 0]


def test_a_video_batch_holds_the_frames_in_order(tmp_path):
    dataset = ShardDataset([reader(tmp_path, [video_sample(0), video_sample(50)], VIDEOS)])
    clips = collate([dataset[request(1)], dataset[request(0)]])["clips"]
    assert clips.shape == (2, 3, 3, 16, 16)
    red = ((clips[:, 0, :, 0, 0] + 1) * 127.5).round().tolist()
    assert red == [[50, 51, 52], [0, 1, 2]]


def test_labels_are_there_only_when_asked_for(tmp_path):
    plain = replace(IMAGES, with_classes=False, with_captions=False)
    dataset = ShardDataset([reader(tmp_path, [image_sample(0)], plain)])
    assert set(collate([dataset[request(0)]])) == {"clips", "keys", "sample_index", "weights"}


def test_pictures_of_any_shape_fill_the_size(tmp_path):
    wide = replace(IMAGES, size=(6, 10))
    dataset = ShardDataset([reader(tmp_path, [image_sample(0)], wide)])
    assert collate([dataset[request(0)]])["clips"].shape == (1, 3, 1, 6, 10)


# --- randomness belongs to the number of a sample -------------------------------------------------


def test_flips_are_a_function_of_seed_and_number(tmp_path):
    flipping = replace(IMAGES, horizontal_flip=True)
    source = reader(tmp_path, [image_sample(0)], flipping, seed=4)
    views = [source.read(0, number=n).clip[0] for n in range(400)]
    mirrored = [bool(view[1, 0, 0]) for view in views]
    for view, is_mirrored in zip(views, mirrored, strict=True):
        torch.testing.assert_close(view, picture(0).flip(-1) if is_mirrored else picture(0))
    assert abs(sum(mirrored) - 200) < 5 * 10  # standard deviation 10

    again = SampleReader(source.shards, flipping, seed=4)
    assert [bool(again.read(0, number=n).clip[0, 1, 0, 0]) for n in range(400)] == mirrored
    other = SampleReader(source.shards, flipping, seed=5)
    assert [bool(other.read(0, number=n).clip[0, 1, 0, 0]) for n in range(400)] != mirrored


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_random_windows_are_consecutive_frames_from_anywhere(tmp_path, cache_decoded):
    windowed = replace(VIDEOS, random_window=True)
    source = reader(tmp_path, [video_sample(0)], windowed, cache_decoded=cache_decoded)
    windows = [tuple(source.read(0, number=n).clip[:, 0, 0, 0].tolist()) for n in range(60)]
    assert set(windows) == {(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)}
    assert windows[7] == tuple(source.read(0, number=7).clip[:, 0, 0, 0].tolist())


# --- memory ---------------------------------------------------------------------------------------


def test_a_cached_sample_is_decoded_once(tmp_path, monkeypatch):
    calls = Counter()
    decode = samples_module.decode_image
    monkeypatch.setattr(
        samples_module, "decode_image", lambda data: calls.update(["decode"]) or decode(data)
    )
    flipping = replace(IMAGES, horizontal_flip=True)
    plain = reader(tmp_path, [image_sample(i) for i in range(3)], flipping)
    cached = SampleReader(plain.shards, flipping, cache_decoded=True)
    for number in range(12):
        expected = plain.read(number % 3, number=number).clip
        torch.testing.assert_close(cached.read(number % 3, number=number).clip, expected)
    assert calls["decode"] == 12 + 3
    assert len(pickle.dumps(cached)) == len(pickle.dumps(plain))


def test_a_limit_uses_the_first_samples_only(tmp_path):
    source = reader(tmp_path, [image_sample(i) for i in range(10)], max_samples=6)
    assert source.num_samples == 6
    assert source.shard_sizes == [4, 2, 0]
    assert reader(tmp_path / "all", [image_sample(0)], max_samples=6).shard_sizes == [1]


# --- bad samples ----------------------------------------------------------------------------------


def damaged(kind: str) -> dict:
    sample = image_sample(2)
    if kind == "no picture":
        del sample["png"]
    elif kind == "garbage":
        sample["png"] = b"\x89PNG garbage"
    elif kind == "no class":
        del sample["cls"]
    elif kind == "class too large":
        sample["cls"] = b"10"
    elif kind == "class is no number":
        sample["cls"] = b"cat"
    elif kind == "caption is no text":
        sample["txt"] = b"\xff\xfe\xfa"
    return sample


@pytest.mark.parametrize(
    "kind",
    ["no picture", "garbage", "no class", "class too large", "class is no number",
     "caption is no text"],
)  # fmt: skip
def test_a_bad_sample_is_reported_and_replaced(tmp_path, kind):
    samples = [image_sample(0), image_sample(1), damaged(kind), image_sample(3)]
    dataset = ShardDataset([reader(tmp_path, samples, replace(IMAGES, num_classes=10))])
    with pytest.warns(UserWarning, match=r"replaces .*train-000000\.tar: 000002: "):
        item = dataset[request(2, number=9)]
    assert item.number == 9
    assert item.weight == 1
    assert item.sample.key != "000002"
    assert (dataset.num_seen, dataset.num_bad) == (2, 1)
    with pytest.warns(UserWarning, match="000002"):
        assert dataset[request(2)].sample.key == item.sample.key


def test_a_bad_sample_has_no_weight_in_validation(tmp_path):
    samples = [image_sample(0), damaged("garbage"), image_sample(3)]
    dataset = ShardDataset([reader(tmp_path, samples)], is_validation=True)
    with pytest.warns(UserWarning, match="000002"):
        items = [dataset[request(i)] for i in range(3)]
    assert [item.weight for item in items] == [1, 0, 1]
    assert [item.number for item in items] == [0, 1, 2]


def test_samples_lost_with_the_end_of_a_shard_are_replaced(tmp_path):
    paths = write_split(tmp_path, "train", [image_sample(i) for i in range(40)], shard_size=20)
    paths[0].write_bytes(paths[0].read_bytes()[: paths[0].stat().st_size // 2])
    source = SampleReader(ShardSet.open(tmp_path, "train"), IMAGES)
    dataset = ShardDataset([source], max_bad_fraction=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is tested above and in test_shards.py
        items = [dataset[request(i)] for i in range(20)]
    stand_ins = Counter(numbers_in(collate(items)["clips"]))
    assert max(stand_ins.values()) <= 2  # not one neighbour for all


@pytest.mark.parametrize("total", [1, 2, 3, 10, 144, 1000])
def test_replacements_visit_everything(tmp_path, total):
    source = reader(tmp_path, [image_sample(0)])
    source.num_samples = total
    index, seen = 0, set()
    for _ in range(total):
        index = source.substitute(index)
        seen.add(index)
    assert seen == set(range(total))


def test_too_many_bad_samples_stop_the_run(tmp_path):
    samples = [damaged("garbage") | {"__key__": f"{i:06d}"} for i in range(30)]
    dataset = ShardDataset([reader(tmp_path, samples)])
    with (
        pytest.warns(UserWarning, match="replaces"),
        pytest.raises(ValueError, match=r"10 of 10 samples are bad.*train-.*max_bad_fraction"),
    ):
        dataset[request(0)]


def test_a_few_bad_samples_among_many_do_not_stop_the_run(tmp_path):
    dataset = ShardDataset([reader(tmp_path, [image_sample(0), damaged("garbage")])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):  # nine are forgiven whatever their share
            dataset[request(1)]
        for _ in range(1000):
            dataset[request(0)]
        dataset[request(1)]  # 10 of 1,019
        with pytest.raises(ValueError, match=r"11 of 10\d\d samples are bad"):
            dataset[request(1)]


def test_none_may_be_allowed(tmp_path):
    dataset = ShardDataset(
        [reader(tmp_path, [image_sample(0), damaged("garbage")])], max_bad_fraction=0
    )
    dataset[request(0)]
    with pytest.raises(ValueError, match="1 of 2 samples are bad"):
        dataset[request(1)]


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sample_format", "message"),
    [
        (("png", "cls"), IMAGES, r"have no caption \(txt\); their fields are cls, png"),
        (("png",), IMAGES, r"have no class \(cls\) and no caption \(txt\); their fields are png"),
        (
            ("png", "cls"),
            VIDEOS,
            r"'toys' in .* have no video \(mp4, .*; their fields are cls, png",
        ),
    ],
)
def test_a_field_that_no_sample_has_is_one_clear_error(tmp_path, fields, sample_format, message):
    write_split(tmp_path, "train", [image_sample(i, fields=fields) for i in range(3)])
    with pytest.raises(ValueError, match=message):
        check_fields(ShardSet.open(tmp_path, "train"), sample_format, name="toys")
