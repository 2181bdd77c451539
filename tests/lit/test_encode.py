"""Code shards hold the samples of pixel shards, whoever was killed; training does not differ."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from grn_lightning.datasets.codes import CODES, codes_member, decode_codes
from grn_lightning.datasets.manifest import Manifest, ShardInfo, read_manifest, write_manifest
from grn_lightning.datasets.samples import SampleFormat, SampleReader
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.callbacks import EvaluateSamples
from grn_lightning.lit.checkpoints import find_checkpoint
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.media.images import to_float
from grn_lightning.metrics.codes import CodeStatistics
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.scripts.encode import encode
from tests.tiny_runs import (
    TINY_DIGITS,
    TINY_ENCODER,
    call_grn,
    fit,
    generator_config,
    kill,
    logged,
    source,
    start_grn,
    tokenizer_config,
)

SIZE = {"num_frames": TINY_DIGITS.num_frames, "image_size": TINY_DIGITS.canvas_size}
PATIENCE_SECONDS = 120
MANY = 15  # times the shards of the tiny set, so that there is time to kill


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def codes(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of clips and images, with their mirrored copies."""
    folder = tmp_path_factory.mktemp("codes")
    for media in ("clips", "images"):
        for split in ("train", "val"):
            encode(
                digits / media, tokenizer=tokenizer_run, out=folder / media, split=split, flip=True
            )
    return folder


def test_every_sample_is_there_with_the_codes_of_its_clip(
    digits: Path, tokenizer_run: Path, codes: Path
) -> None:
    pixels, cached = (ShardSet.open(f / "clips", "train") for f in (digits, codes))
    assert cached.shard_sizes == pixels.shard_sizes
    data = ShardData(
        [ShardSource(**source(digits, "video", 24), shuffle_shards=0)],
        image_size=TINY_DIGITS.canvas_size,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokenizer = load_tokenizer(tokenizer_run)
    names = (CODES, codes_member(0, is_flipped=True))
    for index, clip in enumerate(batch["clips"]):
        raw, known = cached.read(index, (*names, "json", "txt", "cls")), pixels.read(index, "txt")
        assert raw.key == known.key == batch["keys"][index]
        for name in ("txt", "cls"):
            assert raw.fields[name] == pixels.read(index, (name,)).fields[name]
        entries = json.loads(raw.fields["json"])
        for name, shown in zip(names, (clip, clip.flip(-1)), strict=True):
            back, facts = decode_codes(raw.fields[name], entries[name])
            assert back.equal(tokenizer.tokenize(shown[None])[0]), (index, name)
            assert facts.size == (5, 16, 16)
            assert facts.tokenizer_hash == weights_hash(tokenizer)


def test_the_statistics_are_those_of_all_codes(codes: Path) -> None:
    shards = ShardSet.open(codes / "clips", "train")
    metric = CodeStatistics(num_channels=4, num_rounds=2)
    for index in range(len(shards)):
        fields = shards.read(index, (CODES, "json")).fields
        metric.update(decode_codes(fields[CODES], json.loads(fields["json"])[CODES])[0][None])
    report, told = metric.compute(), json.loads((codes / "clips" / "train.codes.json").read_text())
    assert told["num_samples"] == 24
    assert told["histogram"] == report.histogram.tolist()
    assert told["rounds"]["entropy"] == pytest.approx(report.entropy.tolist())
    assert told["bits_per_pixel"] == 3 * 2 * 2 * 4 * 2 / (5 * 16 * 16)


# --- ten crops ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crops(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of centre and corners of pictures of 20 x 20, mirrored as well."""
    folder = tmp_path_factory.mktemp("crops")
    options: dict[str, Any] = {"tokenizer": tokenizer_run, "out": folder, "image_size": 16}
    encode(digits / "images", flip=True, crop_scale=1.25, **options)
    encode(digits / "images", split="val", **options)
    return folder


def test_ten_crops_are_those_of_the_scaled_picture(
    digits: Path, tokenizer_run: Path, crops: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_run)
    scaled = SampleReader(
        ShardSet.open(digits / "images", "train"), SampleFormat(media="image", size=(20, 20))
    )
    shards = ShardSet.open(crops, "train")
    corners = [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]
    for index in range(4):
        picture = to_float(scaled.read(index, number=0).clip.transpose(0, 1))[None]
        for crop, (top, left) in enumerate(corners):
            part = picture[..., top : top + 16, left : left + 16]
            for is_flipped, shown in ((False, part), (True, part.flip(-1))):
                name = codes_member(crop, is_flipped)
                raw = shards.read(index, (name, "json"))
                found, _ = decode_codes(raw.fields[name], json.loads(raw.fields["json"])[name])
                assert found.equal(tokenizer.tokenize(shown)[0]), (index, name)


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_any_of_the_crops_is_trained_on(crops: Path, horizontal_flip: bool) -> None:
    shards = ShardSet.open(crops, "train")
    kind = SampleFormat(media="image", size=(16, 16), codes=True)
    varied = replace(kind, random_crop=True, horizontal_flip=horizontal_flip)
    fields = shards.read(1, shards.fields).fields
    entries = json.loads(fields["json"])
    names = [codes_member(c, f) for c in range(5) for f in (False, True)[: 1 + horizontal_flip]]
    known = {name: decode_codes(fields[name], entries[name])[0] for name in names}
    for cache in (False, True):
        reader = SampleReader(shards, varied, seed=3, cache_decoded=cache)
        drawn = [reader.read(1, number=n).codes for n in range(400)]
        found = Counter(next(name for name in names if known[name].equal(codes)) for codes in drawn)
        different = {tuple(codes.flatten().tolist()) for codes in known.values()}
        assert len(found) == len(different)
        if len(different) == len(names):
            assert min(found.values()) > 400 / len(names) / 2
    assert SampleReader(shards, kind).read(1, number=7).codes.equal(known[CODES])


def test_crops_that_are_not_there_are_refused(
    digits: Path, tokenizer_run: Path, codes: Path, crops: Path, tmp_path: Path
) -> None:
    for folder, match in (
        (codes / "images", "no codes of crops, see `grn encode --crop_scale`"),
        (digits / "images", "`random_crop` needs codes"),
    ):
        options = {"path": str(folder), "media": "image", "batch_size": 4, "random_crop": True}
        with pytest.raises(ValueError, match=match):
            ShardData([ShardSource(**options)], image_size=16).setup("fit")
    with pytest.raises(ValueError, match=r"`--crop_scale` must be at least 1, got 0\.5"):
        encode(digits / "images", tokenizer=tokenizer_run, out=tmp_path, crop_scale=0.5)
    with pytest.raises(ValueError, match=r"crop_scale was 1\.25 and is None"):
        encode(digits / "images", tokenizer=tokenizer_run, out=crops, image_size=16, flip=True)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "text"])
def test_training_on_codes_is_training_on_pixels(
    digits: Path, tokenizer_run: Path, codes: Path, tmp_path: Path, kind: str
) -> None:
    media = "image" if kind == "class" else "video"
    losses = {}
    for name, folder in (("pixels", digits), ("codes", codes)):
        config = generator_config(
            tmp_path / name,
            digits,
            tokenizer_run,
            kind=kind,
            sources=[source(folder, media, 4, horizontal_flip=True)],
            trainer={"val_check_interval": 4},
        )
        fit(tmp_path / name, config)
        losses[name] = [logged(tmp_path / name, what) for what in ("train/loss", "val/loss")]
    assert losses["pixels"] == losses["codes"]
    assert len(losses["codes"][0]) == 4


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # told again where warnings are awaited
def test_a_memory_of_what_is_cached_already_is_pointed_out(
    digits: Path, tokenizer_run: Path, codes: Path, tmp_path: Path
) -> None:
    config = generator_config(
        tmp_path,
        digits,
        tokenizer_run,
        kind="text",
        sources=[source(codes, "video", 4, horizontal_flip=True)],
        init_args={"cache_codes": True},
        trainer={"max_steps": 1},
    )
    with pytest.warns(UserWarning, match="`cache_codes` is ignored: the source 'clips'"):
        fit(tmp_path, config)


def test_validation_may_read_pixels_beside_codes(digits: Path, codes: Path) -> None:
    clips = source(codes, "video", 4, path_val=str(digits / "clips"))
    data = ShardData([ShardSource(**clips)], image_size=16)
    data.setup("fit")
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert (train["codes"].shape, train["clip_size"]) == ((4, 4, 3, 2, 2), (5, 16, 16))
    assert "clips" not in train
    assert val["clips"].shape == (4, 3, 5, 16, 16)


def test_the_codes_of_a_beginning_are_enough(codes: Path, tokenizer_run: Path) -> None:
    whole, begun = (
        ShardData(
            [ShardSource(**(source(codes, "video", 4) | {"num_frames": frames}))], image_size=16
        )
        for frames in (5, 3)
    )
    batches = []
    for data in (whole, begun):
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    assert batches[1]["codes"].equal(batches[0]["codes"][:, :, :2])
    assert batches[1]["clip_size"] == (3, 16, 16)


def test_a_cache_of_another_tokenizer_stops_the_run_before_it_starts(
    digits: Path, tokenizer_run: Path, codes: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other.ckpt"
    checkpoint = torch.load(find_checkpoint(tokenizer_run), weights_only=True)
    for callback_state in checkpoint["callbacks"].values():
        callback_state.get("shadows", {}).get("tokenizer.conv2.bias", torch.zeros(1))[0] += 1
    torch.save(checkpoint, other)
    hashes = {weights_hash(load_tokenizer(path)) for path in (other, tokenizer_run)}
    config = generator_config(
        tmp_path, digits, other, kind="text", sources=[source(codes, "video", 4)]
    )
    with pytest.raises(SystemExit):
        fit(tmp_path, config)
    told = capsys.readouterr().err
    assert len(hashes) == 2
    assert all(one in told for one in hashes)
    assert "source 'clips' (train)" in told
    assert not (tmp_path / "log" / "metrics.csv").exists()


def test_who_needs_pixels_says_so(
    digits: Path, codes: Path, tokenizer_run: Path, tmp_path: Path, capsys: Any
) -> None:
    config = tokenizer_config(tmp_path, digits, sources=[source(codes, "video", 4)])
    with pytest.raises(SystemExit):
        fit(tmp_path, config)
    assert "LitTokenizer learns from pixels, and these shards hold codes" in capsys.readouterr().err

    extractor = torch.nn.Flatten()
    extractor.name, extractor.num_features = "flat", 4  # type: ignore[assignment]
    judge, module = EvaluateSamples(extractor), LitGenerator.__new__(LitGenerator)
    judge._is_due = True
    with pytest.raises(ValueError, match="compares samples with pixels.*set `path_val`"):
        judge.on_validation_batch_end(None, module, None, {"codes": None}, 0)  # type: ignore[arg-type]


@pytest.fixture
def copy(codes: Path, tmp_path: Path) -> Path:
    """A copy of the codes of clips, to be damaged."""
    return shutil.copytree(codes / "clips", tmp_path / "clips")


def test_a_flipped_byte_is_told_with_the_name_of_its_sample(copy: Path) -> None:
    shards = ShardSet.open(copy, "train")
    codes, path = shards.read(3, (CODES,)).fields[CODES], shards.paths[0]
    content = path.read_bytes()
    changed = bytes([codes[0] ^ 1]) + codes[1:]
    assert content.count(codes) == 1
    path.write_bytes(content.replace(codes, changed))
    data = ShardData(
        [ShardSource(path=str(copy), media="video", num_frames=5, batch_size=24, shuffle_shards=0)],
        image_size=16,
        loader={"max_bad_fraction": 0.0},  # type: ignore[arg-type]
    )
    data.setup("fit")
    with pytest.raises(ValueError, match=rf"{shards.read(3, ()).key}: its codes have changed"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 4}, r"source 'clips': .*can give 1 \+ 2 k of them, 4 are wanted"),
        ({"image_size": 32}, r"source 'clips': .*\(16, 16, None\), and \(32, 32, None\)"),
        ({"fps": 8.0}, r"\(16, 16, None\), and \(16, 16, 8.0\)"),
        ({"random_window": True}, "`random_window` needs pixels"),
    ],
)
def test_codes_of_other_clips_are_refused(codes: Path, change: dict, message: str) -> None:
    options = source(codes, "video", 4) | change
    data = ShardData([ShardSource(**options)], image_size=16)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_mirrored_codes_must_have_been_stored(
    digits: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    encode(digits / "images", tokenizer=tokenizer_run, out=tmp_path / "images", split="val")
    options = source(tmp_path, "image", 4, horizontal_flip=True, split_train="val")
    with pytest.raises(ValueError, match="no mirrored codes, see `grn encode --flip`"):
        ShardData([ShardSource(**options)], image_size=16).setup("fit")


# --- text features --------------------------------------------------------------------------------

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower with random weights, as open_clip stores one."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "small-of-the-cache.json").write_text(json.dumps(SMALL))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    open_clip.add_model_config(folder / "small-of-the-cache.json")
    torch.manual_seed(0)
    model = open_clip.create_model("small-of-the-cache")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def with_text(
    digits: Path, tokenizer_run: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Codes of clips with features of their captions."""
    folder = tmp_path_factory.mktemp("text")
    config = TextEncoderConfig(architecture=f"local-dir:{clip_folder}")
    encode(digits / "clips", tokenizer=tokenizer_run, out=folder / "clips", text_encoder=config)
    return folder


def text_run(
    folder: Path, digits: Path, tokenizer: Path, path: Path, encoder: dict[str, Any], **data: Any
) -> dict[int, str]:
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind="text",
        sources=[source(path, "video", 4, path_val=str(digits / "clips"))],
        generator={"text_channels": encoder.get("width", 32)},
        init_args={"text_encoder": encoder, "corruption": {"condition_dropout": 0.5}},
        data=data,
    )
    fit(folder, config)
    return logged(folder, "train/loss")


@pytest.mark.filterwarnings("ignore:Found .* eval mode")  # a frozen tower is
def test_training_on_cached_features_is_training_on_captions(
    digits: Path, tokenizer_run: Path, with_text: Path, clip_folder: Path, tmp_path: Path
) -> None:
    encoder = {"architecture": f"local-dir:{clip_folder}"}
    args = (digits, tokenizer_run)
    online = text_run(tmp_path / "a", *args, digits, encoder)
    cached = text_run(tmp_path / "b", *args, with_text, encoder, with_text_features=True)
    assert online.keys() == cached.keys()
    for step, loss in online.items():
        assert float(cached[step]) == pytest.approx(float(loss), rel=1e-5), step


def test_features_of_an_encoder_that_is_trained_or_another_are_refused(
    digits: Path,
    tokenizer_run: Path,
    with_text: Path,
    clip_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    args, features = (digits, tokenizer_run, with_text), {"with_text_features": True}
    with pytest.raises(SystemExit):
        text_run(tmp_path / "a", *args, TINY_ENCODER, with_text_features=True)
    assert "must be false where the text encoder is trained" in capsys.readouterr().err

    other = shutil.copytree(clip_folder, tmp_path / "other")
    file = other / "open_clip_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(SystemExit):
        text_run(tmp_path / "b", *args, {"architecture": f"local-dir:{other}"}, **features)
    assert re.search(
        r"made by text encoder \w{16}, but the text encoder at hand is \w{16}",
        capsys.readouterr().err,
    )
    with pytest.raises(ValueError, match="must be a frozen one, got 'tiny'"):
        encode(
            digits / "clips",
            tokenizer=tokenizer_run,
            out=tmp_path / "x",
            text_encoder=TextEncoderConfig(),
        )


# --- what goes wrong ------------------------------------------------------------------------------


def test_samples_that_cannot_be_read_are_left_out_and_listed(
    digits: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(digits / "images", tmp_path / "images")
    shards = ShardSet.open(broken, "val")
    png = shards.read(2, ("png",)).fields["png"]
    path = shards.paths[0]
    path.write_bytes(path.read_bytes().replace(png, bytes(len(png))))
    report = encode(broken, tokenizer=tokenizer_run, out=tmp_path / "out", split="val")
    assert (report.num_samples, report.num_skipped) == (5, 1)
    [line] = (tmp_path / "out" / "val-000000.skipped.jsonl").read_text().splitlines()
    assert shards.read(2, ()).key in json.loads(line)["reason"]
    kept = ShardSet.open(tmp_path / "out", "val")
    whole = [shards.read(n, ()).key for n in (0, 1, 3, 4, 5)]
    assert [kept.read(n, ()).key for n in range(5)] == whole


def test_other_settings_for_the_same_folder_are_refused(
    digits: Path, tokenizer_run: Path, codes: Path
) -> None:
    with pytest.raises(ValueError, match="flip was True and is False"):
        encode(digits / "clips", tokenizer=tokenizer_run, out=codes / "clips")
    with pytest.raises(ValueError, match="another folder than the shards"):
        encode(codes / "clips", tokenizer=tokenizer_run, out=codes / "clips")
    with pytest.raises(ValueError, match="`--tokenizer`.*must be given"):
        encode(digits / "clips", out=codes / "x")


# --- killed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the tiny clips, many times."""
    folder = tmp_path_factory.mktemp("many")
    manifest = read_manifest(digits / "clips" / "train.manifest.json")
    infos = []
    for _ in range(MANY):
        for shard in manifest.shards:
            name = f"train-{len(infos):06d}.tar"
            (folder / name).symlink_to(digits / "clips" / shard.name)
            infos.append(ShardInfo(name, shard.num_samples, shard.num_bytes))
    write_manifest(folder / "train.manifest.json", Manifest(tuple(infos), manifest.fields))
    return folder


COMMON = ("--accelerator", "cpu", "--batch_size", 5)


@pytest.fixture(scope="module", autouse=True)
def pair(
    many: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Two processes that share the work, while the other tests run."""
    folder = tmp_path_factory.mktemp("pair")
    command = ("encode", many, "--tokenizer", tokenizer_run, "--out", folder / "codes", *COMMON)
    process = start_grn(*command, "--devices", 2, log=folder / "log")
    yield folder, process
    kill(process)


@pytest.fixture(scope="module")
def whole(many: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes by one process that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    encode(many, tokenizer=tokenizer_run, out=folder, batch_size=5, accelerator="cpu")
    return folder


@pytest.mark.scale
@pytest.mark.slow
def test_what_was_killed_goes_on_without_duplicate_or_hole(
    many: Path, tokenizer_run: Path, whole: Path, tmp_path: Path
) -> None:
    folder, end = tmp_path / "doomed", time.monotonic() + PATIENCE_SECONDS
    command = ("encode", many, "--tokenizer", tokenizer_run, "--out", folder, *COMMON)
    process = start_grn(*command, log=tmp_path / "log")
    while len([*folder.glob("*.tar")]) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    kill(process)
    done = len([*folder.glob("*.tar")])
    assert 2 <= done < 3 * MANY, (tmp_path / "log").read_text()
    assert not (folder / "train.manifest.json").exists()

    encode(many, tokenizer=tokenizer_run, out=folder, batch_size=5, accelerator="cpu")
    assert files(folder) == files(whole)


@pytest.mark.slow
def test_two_processes_write_the_set_of_one(pair: Any, whole: Path) -> None:
    folder, process = pair
    assert process.wait(PATIENCE_SECONDS) == 0, (folder / "log").read_text()
    assert files(folder / "codes") == files(whole)


@pytest.mark.slow
def test_order_and_keys_are_those_of_the_source(many: Path, whole: Path) -> None:
    pixels, codes = (ShardSet.open(folder, "train") for folder in (many, whole))
    assert codes.shard_sizes == pixels.shard_sizes
    for index in range(0, len(pixels), 7):
        assert codes.read(index, ("txt",)) == pixels.read(index, ("txt",))


def test_the_command_line_encodes(digits: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    report = call_grn(
        "encode", digits / "images", "--tokenizer", tokenizer_run, "--out", tmp_path / "codes"
    )
    assert (report.num_samples, report.num_shards) == (24, 3)
    assert "codes of 24 samples in 3 shards" in str(report)
