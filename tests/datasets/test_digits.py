"""The embedded set shows what its captions say, and no held-out stroke leaks into training."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from grn_lightning.datasets.digits import (
    DIGIT_NAMES,
    DigitsConfig,
    build_digits,
    load_scans,
    render_clip,
    upscale_scan,
)
from grn_lightning.datasets.manifest import read_manifest
from grn_lightning.datasets.shards import RawSample, ShardSet
from grn_lightning.media.images import decode_image
from grn_lightning.media.video import decode_video

SMALL = DigitsConfig(
    canvas_size=20,
    digit_size=8,
    num_frames=5,
    speed=2,
    num_train_clips=13,
    num_val_clips=4,
    num_train_images=7,
    num_val_images=3,
    samples_per_shard=5,
)
MOTION = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # row, column


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert sum(build_digits(folder, SMALL)) == 13 + 4 + 7 + 3
    return folder


def samples(folder: Path, split: str) -> list[RawSample]:
    shards = ShardSet.open(folder, split)
    return [shards.read(i, shards.fields) for i in range(len(shards))]


def fingerprints(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def centre(frame: torch.Tensor) -> tuple[float, float]:
    """Centre of mass of a frame `(3, h, w)`, row and column."""
    ink = frame[0].double()
    rows, columns = torch.arange(len(ink)).double(), torch.arange(ink.shape[1]).double()
    return float(ink.sum(1) @ rows / ink.sum()), float(ink.sum(0) @ columns / ink.sum())


# --- scans ----------------------------------------------------------------------------------------


def test_every_scan_is_in_exactly_one_split():
    splits = {name: load_scans(name, seed=3) for name in ("train", "val")}
    assert {name: len(scans.labels) for name, scans in splits.items()} == {
        "train": 1437,
        "val": 360,
    }
    everything = load_digits()
    known = Counter(
        (int(label), image.tobytes())
        for label, image in zip(everything.target, everything.images.astype("float32"), strict=True)
    )
    found = Counter(
        (int(label), (image * 16).numpy().tobytes())
        for scans in splits.values()
        for image, label in zip(scans.images, scans.labels, strict=True)
    )
    assert found == known


def test_another_seed_holds_other_scans_out():
    assert not load_scans("val", seed=0).images.equal(load_scans("val", seed=1).images)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        load_scans("test")  # type: ignore[arg-type]


def test_upscaling_to_the_scan_s_own_size_changes_nothing():
    scans = load_scans("val").images[:4]
    torch.testing.assert_close(upscale_scan(scans, size=8), scans)


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", MOTION)
def test_a_clip_moves_as_it_is_told_and_loses_no_ink(direction):
    scan, (d_row, d_col) = load_scans("train").images[0], MOTION[direction]
    clip = render_clip(
        scan, direction=direction, start=(8, 8), config=replace(SMALL, canvas_size=24)
    )
    assert clip.shape == (5, 3, 24, 24)
    assert clip.dtype == torch.uint8
    centres = [centre(frame) for frame in clip]
    for frame, (row, column) in enumerate(centres):
        assert row == pytest.approx(centres[0][0] + 2 * frame * d_row)
        assert column == pytest.approx(centres[0][1] + 2 * frame * d_col)
    assert len({int(frame.sum()) for frame in clip}) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_clips_are_what_their_caption_class_and_facts_say(digits, split):
    scans = load_scans(split, seed=SMALL.seed)
    for sample in samples(digits / "clips", split):
        label, facts = int(sample.fields["cls"]), json.loads(sample.fields["json"])
        assert label == int(scans.labels[facts["scan"]])
        caption = f"the digit {DIGIT_NAMES[label]} moves {facts['direction']}"
        assert sample.fields["txt"].decode() == caption

        clip = decode_video(sample.fields["mp4"], fps=None, num_frames=None)
        expected = render_clip(
            scans.images[facts["scan"]],
            direction=facts["direction"],
            start=tuple(facts["start"]),
            config=SMALL,
        )
        assert clip.equal(expected)  # the film is lossless
        assert len({int(frame.sum()) for frame in clip}) == 1  # never leaves the canvas


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_what_their_caption_and_class_say(digits, split):
    scans = load_scans(split, seed=SMALL.seed)
    for sample in samples(digits / "images", split):
        label, facts = int(sample.fields["cls"]), json.loads(sample.fields["json"])
        assert label == int(scans.labels[facts["scan"]])
        assert sample.fields["txt"].decode() == f"the digit {DIGIT_NAMES[label]}"
        expected = render_clip(
            scans.images[facts["scan"]], direction=None, start=tuple(facts["start"]), config=SMALL
        )
        assert decode_image(sample.fields["png"]).equal(expected[0])


def test_a_thousand_draws_reach_every_digit_direction_and_border(tmp_path):
    config = replace(
        SMALL, num_train_clips=1000, num_val_clips=1, num_train_images=1, num_val_images=1,
        samples_per_shard=1000, canvas_size=17, place_step=1,
    )  # fmt: skip
    # Drawing is what counts here: leave out the encoding of a thousand films.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grn_lightning.datasets.digits.encode_mp4", lambda *_, **__: b"film")
        list(build_digits(tmp_path, config))
    seen = samples(tmp_path / "clips", "train")
    assert {int(sample.fields["cls"]) for sample in seen} == set(range(10))
    facts = [json.loads(sample.fields["json"]) for sample in seen]
    for direction, (d_row, d_col) in MOTION.items():
        starts = [fact["start"] for fact in facts if fact["direction"] == direction]
        for unit, places in zip((d_row, d_col), zip(*starts, strict=True), strict=True):
            allowed = {0: range(0, 10), 1: range(0, 2), -1: range(8, 10)}[unit]
            assert set(places) == set(allowed), direction


def test_places_lie_on_a_lattice(tmp_path):
    config = replace(SMALL, place_step=3, num_train_images=60)
    list(build_digits(tmp_path, config))
    facts = [json.loads(s.fields["json"]) for s in samples(tmp_path / "images", "train")]
    assert {place for fact in facts for place in fact["start"]} == {0, 3, 6, 9, 12}


# --- files ----------------------------------------------------------------------------------------


def test_manifests_count_what_is_there(digits):
    for folder, split, counts in (
        ("clips", "train", [5, 5, 3]),
        ("clips", "val", [4]),
        ("images", "train", [5, 2]),
        ("images", "val", [3]),
    ):
        manifest = read_manifest(digits / folder / f"{split}.manifest.json")
        assert [shard.num_samples for shard in manifest.shards] == counts
        media = "mp4" if folder == "clips" else "png"
        assert set(manifest.fields) == {"cls", "json", "txt", media}


def test_the_same_configuration_gives_the_same_bytes(digits, tmp_path):
    list(build_digits(tmp_path, SMALL))
    assert fingerprints(tmp_path) == fingerprints(digits)


def test_more_samples_only_append(digits, tmp_path):
    list(build_digits(tmp_path, replace(SMALL, num_train_clips=14)))
    old, new = (samples(folder / "clips", "train") for folder in (digits, tmp_path))
    assert [sample.fields for sample in new[:13]] == [sample.fields for sample in old]


def test_an_interrupted_build_goes_on_and_leaves_what_is_complete(digits, tmp_path):
    building = build_digits(tmp_path, SMALL)
    for _ in range(15):  # all training clips and two held-out ones
        next(building)
    building.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clips/train*")}
    assert len(before) == 7  # three shards with an index each, and the manifest
    assert not (tmp_path / "clips" / "val.manifest.json").exists()

    assert sum(build_digits(tmp_path, SMALL)) == 13 + 4 + 7 + 3
    assert fingerprints(tmp_path) == fingerprints(digits)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_with_another_configuration_is_refused_and_left_alone(digits):
    before = fingerprints(digits)
    with pytest.raises(ValueError, match="digits of another configuration .*Give another folder"):
        list(build_digits(digits, replace(SMALL, seed=1)))
    assert fingerprints(digits) == before


def test_digits_that_would_leave_the_canvas_are_refused():
    with pytest.raises(ValueError, match=r"canvas_size.*= 16 .*, got 15"):
        DigitsConfig(canvas_size=15, digit_size=8, num_frames=5, speed=2)


@pytest.mark.parametrize(
    "name",
    ["digit_size", "num_frames", "speed", "place_step", "fps", "num_train_clips",
     "num_val_images", "samples_per_shard"],
)  # fmt: skip
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        replace(SMALL, **{name: 0})
