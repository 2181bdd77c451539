"""Shards are equal however they were made, hold every readable file, and survive being stopped."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from grn_lightning.datasets import pack
from grn_lightning.datasets.build import ShardsConfig, build_shards
from grn_lightning.datasets.manifest import read_manifest, scan_shard
from grn_lightning.media.images import decode_image, encode_jpeg, encode_png
from grn_lightning.media.video import decode_video, encode_mp4, probe_video

IN_PROCESS = ShardsConfig(num_workers=0, samples_per_shard=4)


def _image(number: int, height: int = 8, width: int = 10) -> torch.Tensor:
    return torch.full((3, height, width), number, dtype=torch.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures in two folders with awkward names, captions for five, and one broken file."""
    root = tmp_path / "pictures"
    for number in range(10):
        folder = root / ("cats.v1" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pic.{number} é.png"
        path.write_bytes(encode_png(_image(number)))
        if number < 5:
            path.with_suffix(".txt").write_text(f"picture {number} é")
    (root / "dogs" / "pic.4 é.png").write_bytes(b"not a picture")
    return root


def _samples(target: Path, split: str = "train") -> list[dict[str, object]]:
    """Read with webdataset itself, in the order of the manifest."""
    samples: list[dict[str, object]] = []
    for shard in read_manifest(target / f"{split}.manifest.json").shards:
        with (target / shard.name).open("rb") as stream:
            found = list(group_by_keys(tar_file_expander([{"url": "", "stream": stream}])))
        assert len(found) == shard.num_samples
        samples += found
    return samples


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_webdataset_reads_every_readable_file_byte_for_byte(pictures: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in pictures.rglob("*.*") if path.is_file()}
    report = build_shards(pictures, tmp_path / "out", config=IN_PROCESS)
    samples = _samples(tmp_path / "out")
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 9
    for sample in samples:
        facts = json.loads(sample["json"])
        path = pictures / facts.pop("source")
        assert sample["png"] == path.read_bytes()
        assert facts == {"height": 8, "width": 10}
        caption = path.with_suffix(".txt")
        assert sample.get("txt") == (caption.read_bytes() if caption.exists() else None)
    split = report.splits[0]
    assert (split.num_samples, split.num_captions, split.num_skipped) == (9, 4, 1)
    assert {path: path.read_bytes() for path in before} == before


def test_the_manifest_tells_the_truth(pictures: Path, tmp_path: Path) -> None:
    build_shards(pictures, tmp_path / "out", config=IN_PROCESS)
    manifest = read_manifest(tmp_path / "out" / "train.manifest.json")
    assert manifest.fields == ("json", "png", "txt")
    scans = [scan_shard(tmp_path / "out" / shard.name) for shard in manifest.shards]
    assert tuple(scan.info for scan in scans) == manifest.shards
    assert [shard.name for shard in manifest.shards] == [f"train-00000{n}.tar" for n in range(3)]


def test_unreadable_files_are_named_with_the_reason(pictures: Path, tmp_path: Path) -> None:
    (pictures / "link.png").symlink_to(tmp_path / "nowhere")
    cut = encode_png(torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8))[:2000]
    (pictures / "cut.png").write_bytes(cut)
    report = build_shards(pictures, tmp_path / "out", config=IN_PROCESS)
    lines = (tmp_path / "out" / "train.skipped.jsonl").read_text().splitlines()
    reasons = {row["source"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons.keys() == {"dogs/pic.4 é.png", "link.png", "cut.png"}
    assert "is no picture of a known format" in reasons["dogs/pic.4 é.png"]
    assert "No such file" in reasons["link.png"]
    assert "does not decode" in reasons["cut.png"]
    assert "3 files could not be read: train.skipped.jsonl" in str(report)


def test_the_number_of_processes_does_not_show(pictures: Path, tmp_path: Path) -> None:
    build_shards(pictures, tmp_path / "one", config=IN_PROCESS)
    build_shards(pictures, tmp_path / "two", config=replace(IN_PROCESS, num_workers=2))
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_the_place_and_age_of_the_source_do_not_show(pictures: Path, tmp_path: Path) -> None:
    build_shards(pictures, tmp_path / "one", config=IN_PROCESS)
    shutil.copytree(pictures, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    build_shards(tmp_path / "copy", tmp_path / "two", config=IN_PROCESS)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


class _KilledError(Exception):
    """Stands for a process that ends in the middle of a shard."""


def test_an_interrupted_build_goes_on_and_ends_alike(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards(pictures, tmp_path / "whole", config=IN_PROCESS)
    target, made = tmp_path / "out", []
    make_sample = pack._make_sample

    def make_six(key: str, *args: object) -> object:
        if len(made) == 6:
            raise _KilledError
        made.append(key)
        return make_sample(key, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_make_sample", make_six)
        with pytest.raises(_KilledError):
            build_shards(pictures, target, config=IN_PROCESS)
    names = {"train.plan.json", "train-000000.tar", "train-000000.index.npz"}
    assert {p.name for p in target.iterdir()} == names
    (target / "train-000001.tar.12345.tmp").write_bytes(b"half a shard of a killed process")
    first = (target / "train-000000.tar").stat()

    report = build_shards(pictures, target, config=IN_PROCESS)
    assert report.splits[0].num_resumed == 1
    kept = (target / "train-000000.tar").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # not written again
    assert _bytes(target) == _bytes(tmp_path / "whole")

    again = build_shards(pictures, target, config=IN_PROCESS)
    assert again.splits[0].num_resumed == 3
    assert replace(again.splits[0], num_resumed=1) == report.splits[0]
    assert _bytes(target) == _bytes(tmp_path / "whole")


def test_another_build_under_the_same_name_is_refused(pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    build_shards(pictures, target, config=IN_PROCESS)
    before = _bytes(target)
    with pytest.raises(
        ValueError, match="samples_per_shard was 4 and is 5; resize was None and is 6"
    ):
        build_shards(pictures, target, config=replace(IN_PROCESS, samples_per_shard=5, resize=6))
    (pictures / "dogs" / "pic.0 é.txt").write_text("another caption")
    with pytest.raises(
        ValueError, match="names, sizes, captions or classes of its files have changed"
    ):
        build_shards(pictures, target, config=IN_PROCESS)
    (pictures / "new.png").write_bytes(encode_png(_image(99)))
    with pytest.raises(
        ValueError, match="num_files was 10 and is 11. To go on, choose another target"
    ):
        build_shards(pictures, target, config=IN_PROCESS)
    assert _bytes(target) == before


def test_shards_of_somebody_else_are_not_touched(pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "train-000007.tar").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="train shards that no plan describes"):
        build_shards(pictures, target, config=IN_PROCESS)
    assert [path.name for path in target.iterdir()] == ["train-000007.tar"]


def test_a_damaged_shard_stops_the_build_and_stays(pictures: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    build_shards(pictures, target, config=IN_PROCESS)
    shard = target / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="Delete that shard and run the same command again"):
        build_shards(pictures, target, config=IN_PROCESS)
    assert shard.stat().st_size == 1000
    shutil.copy(target / "train-000000.tar", shard)
    with pytest.raises(ValueError, match="holds samples of another build"):
        build_shards(pictures, target, config=IN_PROCESS)


def test_shuffling_mixes_classes_and_sorting_does_not(pictures: Path, tmp_path: Path) -> None:
    config = replace(IN_PROCESS, classes_from_folders=True)
    build_shards(pictures, tmp_path / "mixed", config=config)
    build_shards(pictures, tmp_path / "sorted", config=replace(config, shuffle=False))
    mixed = [int(sample["cls"]) for sample in _samples(tmp_path / "mixed")]
    in_order = [int(sample["cls"]) for sample in _samples(tmp_path / "sorted")]
    assert in_order == sorted(in_order) == sorted(mixed)
    assert len(set(mixed[:4])) == 2
    build_shards(pictures, tmp_path / "other", config=replace(config, seed=1))
    other = {s["__key__"] for s in _samples(tmp_path / "other")}
    assert other != {s["__key__"] for s in _samples(tmp_path / "mixed")}
    assert json.loads((tmp_path / "mixed" / "classes.json").read_text()) == ["cats.v1", "dogs"]


def test_a_second_split_keeps_the_numbers_of_the_classes(tmp_path: Path) -> None:
    for name in ("train/ant/a.png", "train/bee/b.png", "val/bee/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encode_png(_image(1)))
    config = replace(IN_PROCESS, classes_from_folders=True)
    build_shards(tmp_path / "train", tmp_path / "out", config=config)
    build_shards(tmp_path / "val", tmp_path / "out", config=replace(config, split="val"))
    assert [sample["cls"] for sample in _samples(tmp_path / "out", "val")] == [b"1"]


def test_validation_files_are_held_out_and_stay_so(pictures: Path, tmp_path: Path) -> None:
    config = replace(IN_PROCESS, val_fraction=0.3)
    report = build_shards(pictures, tmp_path / "out", config=config)
    sources = [
        {json.loads(sample["json"])["source"] for sample in _samples(tmp_path / "out", split)}
        for split in ("train", "val")
    ]
    assert not sources[0] & sources[1]
    assert sum(split.num_samples + split.num_skipped for split in report.splits) == 10
    assert report.splits[1].num_samples + report.splits[1].num_skipped == 3
    with pytest.raises(ValueError, match="leaves nothing of 10 files"):
        build_shards(pictures, tmp_path / "all", config=replace(config, val_fraction=0.99))


def test_captions_can_be_required(pictures: Path, tmp_path: Path) -> None:
    config = replace(IN_PROCESS, require_captions=True)
    with pytest.raises(ValueError, match=r"5 of 10 files have no caption, cats\.v1/pic\.5"):
        build_shards(pictures, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_several_captions_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_png(_image(1)))
    table = tmp_path / "in" / "table.jsonl"
    rows = [{"file": "a.png", "caption": text, "class": 7} for text in ("first", "second")]
    table.write_text("\n".join(map(json.dumps, rows)))
    build_shards(table, tmp_path / "out", config=IN_PROCESS)
    (sample,) = _samples(tmp_path / "out")
    assert (sample["txt"], sample["cls"]) == (b"first", b"7")
    assert json.loads(sample["json"])["captions"] == ["first", "second"]


def test_resizing_shrinks_the_large_and_copies_the_small(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = torch.linspace(0, 255, 96).expand(3, 48, 96).to(torch.uint8)
    Image.fromarray(ramp.permute(1, 2, 0).numpy()).save(tmp_path / "in" / "large.webp")
    (tmp_path / "in" / "large.png").write_bytes(encode_png(ramp))
    (tmp_path / "in" / "small.jpeg").write_bytes(encode_jpeg(_image(9, 24, 30)))
    build_shards(tmp_path / "in", tmp_path / "out", config=replace(IN_PROCESS, resize=24))
    samples = {json.loads(s["json"])["source"]: s for s in _samples(tmp_path / "out")}
    assert samples["small.jpeg"]["jpg"] == (tmp_path / "in" / "small.jpeg").read_bytes()
    expected = torch.linspace(0, 255, 48).expand(3, 24, 48)
    for name, extension in (("large.webp", "jpg"), ("large.png", "png")):
        image = decode_image(samples[name][extension])
        assert image.shape == (3, 24, 48)
        assert (image - expected).abs().mean() < 3
        facts = json.loads(samples[name]["json"])
        assert (facts["height"], facts["width"]) == (24, 48)


def test_videos_are_described_and_shrunk(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clip = torch.stack([_image(20 * n, 32, 50) for n in range(9)])
    (tmp_path / "in" / "a.b.mp4").write_bytes(encode_mp4(clip, fps=8))
    (tmp_path / "in" / "cut.mp4").write_bytes(encode_mp4(clip, fps=8)[:1500])
    build_shards(tmp_path / "in", tmp_path / "same", config=IN_PROCESS)
    (sample,) = _samples(tmp_path / "same")
    assert sample["mp4"] == (tmp_path / "in" / "a.b.mp4").read_bytes()
    facts = {"height": 32, "width": 50, "num_frames": 9, "fps": 8.0, "duration": 1.125}
    assert json.loads(sample["json"]) == facts | {"source": "a.b.mp4"}
    build_shards(tmp_path / "in", tmp_path / "less", config=replace(IN_PROCESS, resize=16))
    (sample,) = _samples(tmp_path / "less")
    info = probe_video(sample["mp4"])
    assert (info.height, info.width, info.num_frames, info.fps) == (16, 24, 9, 8.0)
    decoded = decode_video(sample["mp4"], fps=8, num_frames=9)
    assert (decoded.float().mean((1, 2, 3)) - 20 * torch.arange(9)).abs().max() < 3


def test_real_videos_become_shards(media: Path, tmp_path: Path) -> None:
    config = replace(IN_PROCESS, resize=120, samples_per_shard=2)
    report = build_shards(media, tmp_path / "out", config=config)
    assert report.splits[0].num_shards == 2
    for sample in _samples(tmp_path / "out"):
        facts = json.loads(sample["json"])
        assert (facts["height"], facts["width"], facts["num_frames"]) == (120, 212, 81)


def test_names_beyond_what_a_tar_can_hold_are_shortened(tmp_path: Path) -> None:
    folder = tmp_path / "in" / ("d" * 200)
    folder.mkdir(parents=True)
    for name in ("猫", "a" * 200, "x..", "x.y"):
        (folder / f"{name}.png").write_bytes(encode_png(_image(1)))
    build_shards(tmp_path / "in", tmp_path / "out", config=IN_PROCESS)
    samples = _samples(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == 4
    sources = {json.loads(sample["json"])["source"] for sample in samples}
    assert sources == {f"{'d' * 200}/{name}.png" for name in ("猫", "a" * 200, "x..", "x.y")}


def test_a_set_without_any_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    with pytest.raises(
        ValueError, match=r"none of the 1 files of train .*skipped\.jsonl; the first: a"
    ):
        build_shards(tmp_path / "in", tmp_path / "out", config=IN_PROCESS)
    assert not (tmp_path / "out" / "train.manifest.json").exists()
    with pytest.raises(ValueError, match="another folder than the source"):
        build_shards(tmp_path / "in", tmp_path / "in", config=IN_PROCESS)


def test_impossible_settings_are_refused_all_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"'a b'; val_fraction .* got 1.5; samples_per_shard .* -1"
    ):
        ShardsConfig(split="a b", val_fraction=1.5, samples_per_shard=-1)
    with pytest.raises(ValueError, match="cannot be 'val' itself"):
        ShardsConfig(split="val", val_fraction=0.1)


def test_shards_are_plain_tars_without_time_stamps(pictures: Path, tmp_path: Path) -> None:
    build_shards(pictures, tmp_path / "out", config=IN_PROCESS)
    data = (tmp_path / "out" / "train-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert {member.mtime for member in tar} == {0}
