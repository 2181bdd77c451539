"""Documents: what they will be is known beforehand, and is what they are."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grn_lightning.datasets.codes import (
    CODES,
    TEXT,
    CodeFacts,
    TextFeatures,
    encode_codes,
    encode_text,
)
from grn_lightning.datasets.documents import (
    DocumentFormat,
    DocumentItem,
    DocumentReader,
    PackDataset,
    Strides,
    collate_pack,
    first_document,
    is_pack,
)
from grn_lightning.datasets.manifest import Manifest, write_manifest, write_shard
from grn_lightning.datasets.order import SampleRequest
from grn_lightning.datasets.packing import PackRequest
from grn_lightning.datasets.samples import SampleFormat
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.media.resolutions import PRESETS, latent_size, nearest_template
from grn_lightning.media.video import encode_mp4

STRIDES = Strides(temporal=4, spatial=16)
SHAPES = [(300, 500), (64, 64), (700, 520), (40, 200)]  # height, width
GRIDS = [(1, 2, 2), (3, 2, 4), (2, 1, 1)]


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    rows = np.linspace(0, 255, height, dtype=np.uint8)[:, None, None]
    picture = np.broadcast_to(rows, (height, width, 3))
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "png")
    return buffer.getvalue()


def open_shard(folder: Path, samples: list[dict]) -> ShardSet:
    folder.mkdir(exist_ok=True)
    scan = write_shard(folder / "train-000000.tar", samples)
    write_manifest(folder / "train.manifest.json", Manifest((scan.info,), scan.fields))
    return ShardSet.open(folder, "train")


def reader_of(shards: ShardSet, *, presets=None, allow_shorter=False, **options) -> DocumentReader:
    wanted = SampleFormat(**{"media": "image", "size": (32, 32), "with_captions": True} | options)
    form = DocumentFormat(sample=wanted, presets=presets, allow_shorter=allow_shorter)
    reader = DocumentReader(shards, form, seed=3)
    reader.strides = STRIDES
    return reader


@pytest.fixture
def pictures(tmp_path: Path) -> ShardSet:
    return open_shard(
        tmp_path / "pictures",
        [
            {
                "__key__": f"{n}",
                "png": png(h, w),
                "txt": f"picture {n}".encode(),
                "json": json.dumps({"height": h, "width": w}).encode(),
            }
            for n, (h, w) in enumerate(SHAPES)
        ],
    )


@pytest.fixture
def coded(tmp_path: Path) -> tuple[ShardSet, list[torch.Tensor]]:
    """Codes of three grids in one shard, with features of captions of 1, 2 and 3 tokens."""
    samples, maps = [], []
    for n, grid in enumerate(GRIDS):
        frames, rows, columns = grid
        facts = CodeFacts(
            tokenizer_hash="tok",
            num_rounds=2,
            latent_channels=3,
            grid=grid,
            size=(1 + 4 * (frames - 1), 16 * rows, 16 * columns),
            fps=8.0,
        )
        maps.append(torch.randint(4, facts.shape))
        data, entry = encode_codes(maps[-1], facts)
        mask = torch.arange(5) <= n
        text, text_entry = encode_text(TextFeatures(torch.randn(5, 4) * mask[:, None], mask), "enc")
        if n == 1:  # as written before the number was noted
            text_entry = encode_text_without_number(text, text_entry)
        entries = {CODES: entry, TEXT: text_entry}
        samples.append(
            {"__key__": f"{n}", CODES: data, TEXT: text, "json": json.dumps(entries).encode()}
        )
    return open_shard(tmp_path / "codes", samples), maps


def encode_text_without_number(data: bytes, entry: dict) -> dict:
    import zlib

    plain = {k: v for k, v in entry.items() if k not in ("num_tokens", "crc32")}
    crc = zlib.crc32(data, zlib.crc32(json.dumps(plain, sort_keys=True).encode()))
    return plain | {"crc32": crc}


def test_a_picture_gets_the_template_of_its_shape_and_a_preset_it_is_large_enough_for(pictures):
    reader = reader_of(pictures, presets={"0.06M": 1.0, "0.25M": 3.0, "1M": 1.0})
    seen = set()
    for number in range(40):
        for index, (height, width) in enumerate(SHAPES):
            size = reader.size(index, number=number)
            template = nearest_template(height, width, measure="difference")
            grids = {preset: latent_size(preset, template) for preset in PRESETS}
            frames, *rest = reader.grid(index, number=number)
            (preset,) = [name for name, grid in grids.items() if grid == tuple(rest)]
            assert size == (1, 16 * rest[0], 16 * rest[1])
            assert frames == 1
            seen.add((index, preset))
    # 700 x 520 has more than 0.7 times the pixels of 512 x 512; 300 x 500 has fewer.
    assert seen == {(0, "0.06M"), (1, "0.06M"), (2, "0.06M"), (2, "0.25M"), (3, "0.06M")}


def test_presets_are_drawn_by_weight_and_running_number(pictures):
    reader = reader_of(pictures, presets={"0.06M": 1.0, "0.25M": 3.0})
    sizes = [reader.size(2, number=number) for number in range(400)]
    assert sizes == [reader.size(2, number=number) for number in range(400)]
    share = sum(size == max(sizes) for size in sizes) / 400
    assert share == pytest.approx(0.75, abs=0.06)


def test_documents_have_the_size_that_was_told(pictures):
    reader = reader_of(pictures, presets={"0.06M": 1.0})
    for index in range(len(SHAPES)):
        clip = reader.read(index, number=7).clip
        assert (clip.shape[0], *clip.shape[2:]) == reader.size(index, number=7)


def test_without_presets_all_have_the_size_of_the_source(pictures):
    assert reader_of(pictures).grid(3, number=0) == (1, 2, 2)
    assert reader_of(pictures).read(3, number=0).clip.shape == (1, 3, 32, 32)


def test_captions_are_counted(pictures):
    assert reader_of(pictures).text_length(2, lambda text: len(text.split())) == 2


def test_codes_are_measured_and_read_at_the_size_they_have(coded):
    shards, maps = coded
    reader = reader_of(
        shards,
        allow_shorter=True,
        media="video",
        codes=True,
        num_frames=9,
        fps=8.0,
        with_captions=False,
        with_text_features=True,
    )
    for index, grid in enumerate(GRIDS):
        assert reader.grid(index, number=0) == grid
        assert torch.equal(reader.read(index, number=0).codes, maps[index])
        assert reader.text_length(index, pytest.fail) == index + 1
    assert reader.code_facts.tokenizer_hash == "tok"
    assert reader.text_hash == "enc"


def test_longer_codes_are_cut(coded):
    shards, maps = coded
    options = {"media": "video", "codes": True, "fps": 8.0, "with_captions": False}
    reader = reader_of(shards, allow_shorter=True, num_frames=5, **options)
    assert [reader.grid(i, number=0)[0] for i in range(3)] == [1, 2, 2]
    assert torch.equal(reader.read(1, number=0).codes, maps[1][:, :2])
    with pytest.raises(ValueError, match="5 frames are wanted, it has 1; `allow_shorter`"):
        reader_of(shards, num_frames=5, **options).grid(0, number=0)
    with pytest.raises(ValueError, match=r"codes are those of 8.0 frames per second, and 4"):
        reader_of(shards, num_frames=5, **options | {"fps": 4.0}).grid(1, number=0)


@pytest.mark.parametrize(("fps", "frames"), [(None, 9), (4.0, 5), (16.0, 21)])
def test_a_video_is_taken_as_long_as_it_is(tmp_path, fps, frames):
    clip = torch.randint(0, 255, (11, 3, 32, 32), dtype=torch.uint8)
    facts = {"height": 32, "width": 32, "num_frames": 11, "fps": 8.0}
    sample = {"__key__": "0", "mp4": encode_mp4(clip, fps=8), "json": json.dumps(facts).encode()}
    shards = open_shard(tmp_path / "clips", [sample | {"txt": b"x"}])
    reader = reader_of(shards, allow_shorter=True, media="video", num_frames=41, fps=fps)
    assert reader.size(0, number=0) == (frames, 32, 32)
    assert len(reader.read(0, number=0).clip) == frames


def test_what_a_shard_does_not_note_is_asked_for(tmp_path):
    shards = open_shard(tmp_path / "bare", [{"__key__": "0", "png": png(32, 32), "txt": b"x"}])
    with pytest.raises(ValueError, match="its json tells no height and width, which `presets`"):
        reader_of(shards, presets={"0.06M": 1.0}).size(0, number=0)
    reader = reader_of(shards, media="video", num_frames=9, allow_shorter=True)
    with pytest.raises(ValueError, match="9 frames are wanted, it has an unknown number"):
        reader.size(0, number=0)


def test_sizes_that_do_not_fit_the_tokenizer_are_refused(pictures):
    with pytest.raises(ValueError, match=r"sides of multiples of 16, got 1 x 40 x 32"):
        reader_of(pictures, size=(40, 32)).grid(0, number=0)


def request(source: int, index: int) -> SampleRequest:
    return SampleRequest(number=10 * source + index, source=source, index=index)


def test_a_pack_mixes_codes_and_clips_in_order(pictures, coded):
    shards, maps = coded
    codes = reader_of(
        shards,
        allow_shorter=True,
        media="video",
        codes=True,
        num_frames=9,
        fps=8.0,
        with_captions=False,
    )
    readers = [reader_of(pictures, with_captions=False), codes]
    dataset = pickle.loads(pickle.dumps(PackDataset(readers, token_budget=99)))
    places = [request(1, 1), request(0, 2), request(1, 0)]
    batch = dataset[PackRequest(tuple(places), 8)]
    assert is_pack(batch)
    assert batch["grids"] == [GRIDS[1], None, GRIDS[0]]
    expected = torch.cat([maps[i].flatten(1).T for i in (1, 0)])
    assert torch.equal(batch["codes"], expected)
    assert [clip.shape for clip in batch["clips"]] == [(3, 1, 32, 32)]
    assert batch["sample_index"].tolist() == [11, 2, 10]
    assert (batch["sources"], batch["step_samples"], batch["token_budget"]) == ([1, 0, 1], 8, 99)
    alone = first_document(batch, STRIDES)
    assert torch.equal(alone["codes"][0], maps[1])
    assert alone["clip_size"] == (9, 32, 64)


def test_cached_features_are_packed_without_padding(coded):
    reader = reader_of(
        coded[0],
        allow_shorter=True,
        media="video",
        codes=True,
        num_frames=9,
        fps=8.0,
        with_captions=False,
        with_text_features=True,
    )
    dataset = PackDataset([reader], token_budget=99)
    batch = dataset[PackRequest(tuple(request(0, i) for i in (2, 0, 1)), 3)]
    assert batch["text_lengths"] == [3, 1, 2]
    assert batch["text_positions"].tolist() == [0, 1, 2, 0, 0, 1]
    texts = [reader.read(i, number=0).text for i in (2, 0, 1)]
    assert torch.equal(batch["text_embeds"], torch.cat([t.embeds[t.mask] for t in texts]))


def test_a_document_that_cannot_be_read_is_told_and_left_out(tmp_path):
    facts = json.dumps({"height": 32, "width": 32}).encode()
    good = {"__key__": "0", "png": png(32, 32), "txt": b"x", "json": facts}
    shards = open_shard(tmp_path / "some", [good, good | {"__key__": "1", "png": b"no picture"}])
    dataset = PackDataset([reader_of(shards)], token_budget=99, max_bad_fraction=0.5)
    with pytest.warns(UserWarning, match=r"left out of its pack: .*train-000000.tar: 1: "):
        batch = dataset[PackRequest((request(0, 1), request(0, 0)), 2)]
    assert batch["keys"] == ["0"]
    with (
        pytest.warns(UserWarning, match="left out of its pack"),
        pytest.raises(ValueError, match="no document of a pack can be read"),
    ):
        dataset[PackRequest((request(0, 1),), 1)]
    with pytest.raises(ValueError, match="1 of 1 samples are bad"):
        PackDataset([reader_of(shards)], token_budget=9, max_bad_fraction=0)[
            PackRequest((request(0, 1),), 1)
        ]


def test_collating_needs_no_captions(pictures):
    reader = reader_of(pictures)
    items = [DocumentItem(reader.read(i, number=i), request(0, i)) for i in (0, 1)]
    batch = collate_pack(items, step_samples=2, token_budget=9)
    assert batch["captions"] == ["picture 0", "picture 1"]
    assert batch["codes"].shape == (0, 0)
    assert first_document(batch, STRIDES)["clips"].shape == (1, 3, 1, 32, 32)
