from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from grn_lightning.media.images import to_float
from grn_lightning.metrics import InceptionFeatures, inception
from grn_lightning.metrics.features import (
    extract,
    full_float32,
    protocol_of,
    resize_bytes,
    to_bytes,
)


class NoLayers(nn.Module):
    """In place of the network, where it is not asked."""

    def __init__(self, *settings: object) -> None:
        super().__init__()


@pytest.fixture
def empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights for `NoLayers`."""
    monkeypatch.setattr(inception, "NoTrainInceptionV3", NoLayers)
    torch.save({}, tmp_path / "empty.pth")
    return tmp_path / "empty.pth"


@pytest.fixture(scope="module")
def extractor(inception_file: Path) -> InceptionFeatures:
    return InceptionFeatures(inception_file)


def pictures(n: int, size: tuple[int, int] = (24, 20)) -> Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)


# --- pixels ---------------------------------------------------------------------------------------


def test_rounding_goes_to_the_nearest_level_and_truncation_to_the_one_below() -> None:
    levels = torch.tensor([-9.0, 0.0, 0.4, 0.6, 254.6, 300.0]) / 127.5 - 1
    assert to_bytes(levels, "round").tolist() == [0, 0, 0, 1, 255, 255]
    assert to_bytes(levels, "truncate").tolist() == [0, 0, 0, 0, 254, 255]
    with pytest.raises(ValueError, match="to make bytes, got 'none'"):
        to_bytes(levels, "none")


def test_only_rounding_gives_bytes_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_float(levels), "round"), levels)
    lost = to_bytes(to_float(levels), "truncate") != levels
    assert 0 < int(lost.sum()) < 128


@pytest.mark.parametrize("size", [(64, 64), (300, 20), (40, 333)])
def test_the_clean_rule_is_pils_antialiased_filter_without_rounding(size: tuple[int, int]) -> None:
    images = pictures(1, size)
    channels = [
        Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC)
        for channel in images[0]
    ]
    expected = torch.from_numpy(np.stack([np.asarray(c).clip(0, 255) for c in channels]))[None]
    found = resize_bytes(images, (299, 299), "pil-bicubic")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_old_rule_starts_at_the_corner_and_has_no_antialiasing() -> None:
    """TensorFlow 1 put the sample of output pixel i at i * in / out."""
    column = torch.arange(8.0)[:, None].expand(8, 5).to(torch.uint8)
    found = resize_bytes(column.expand(1, 3, 8, 5), (3, 5), "tensorflow")
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([0.0, 8 / 3, 16 / 3]))
    centred = resize_bytes(column.expand(1, 3, 8, 5), (4, 5), "bilinear")
    assert centred[0, 0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_where_nothing_is_scaled_the_size_must_be_right() -> None:
    images = pictures(1, (4, 4))
    assert torch.equal(resize_bytes(images, (4, 4), "none"), images.float())
    with pytest.raises(ValueError, match=r"must be \(5, 4\) where nothing is scaled"):
        resize_bytes(images, (5, 4), "none")


def test_mixed_precision_and_tf32_end_at_the_judge() -> None:
    x, before = torch.randn(4, 4), torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with full_float32(x.device):
            assert (x @ x).dtype == torch.float32
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert (x @ x).dtype == torch.bfloat16
    assert torch.backends.cuda.matmul.fp32_precision == before


# --- the network ----------------------------------------------------------------------------------


def test_features_and_logits_are_those_of_torch_fidelity(
    extractor: InceptionFeatures, inception_file: Path
) -> None:
    images = pictures(2)
    oracle = FeatureExtractorInceptionV3("o", ["2048", "logits_unbiased"], str(inception_file))
    pooled, logits = oracle(images)
    maps: list[Tensor] = []
    hook = extractor.layers.Mixed_6d.register_forward_hook(lambda *args: maps.append(args[2]))
    clips = to_float(images)[:, :, None]
    found = extractor.extract(clips)
    hook.remove()
    assert pooled.std() > 1e-3
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-6)
    spatial = maps[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)  # as TensorFlow lays it out
    assert torch.equal(found.spatial, spatial)
    assert (found.spatial.shape, found.logits.shape) == ((2, 2023), (2, 1008))


def test_every_frame_of_a_clip_is_a_picture(extractor: InceptionFeatures) -> None:
    seen: list[Tensor] = []
    hook = extractor.layers.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    assert extractor(torch.zeros(1, 3, 2, 8, 8)).shape == (2, 2048)
    hook.remove()
    assert seen[0].shape == (2, 3, 299, 299)
    assert seen[0].unique().tolist() == [0.0]  # 127.5 rounds to 128, half to even


def test_pictures_from_files_are_the_bytes_they_were_by_every_protocol(
    empty_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(InceptionFeatures, "extract_bytes", lambda self, x: seen.append(x))
    images = pictures(3)
    clips = to_float(images)[:, :, None]
    adm = InceptionFeatures(empty_file, protocol="adm")
    extract(adm, clips, real=True)
    extract(adm, clips)
    assert torch.equal(seen[0], images)
    assert not torch.equal(seen[1], images)


def test_an_extractor_names_its_protocol(empty_file: Path) -> None:
    adm = InceptionFeatures(empty_file, protocol="adm")
    protocol = protocol_of(adm, num_samples=10_000)
    assert protocol.tag("fid") == "FID[adm,10k,truncate]"
    assert (protocol.resize, protocol.network[:21]) == ("tensorflow", "inception-2015-12-05-")
    changed = protocol_of(InceptionFeatures(empty_file, protocol="clean", rounding="truncate"))
    assert (changed.features, changed.rounding) == ("clean", "truncate")
    assert protocol.mismatch(changed) == ["resize 'tensorflow' and 'pil-bicubic'"]
    with pytest.raises(ValueError, match="no protocol 'tf'; known are torch_fidelity, adm, clean"):
        InceptionFeatures(empty_file, protocol="tf")


# --- the file -------------------------------------------------------------------------------------


def test_weights_are_taken_from_the_cache_and_never_fetched_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_file: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="there is none at .*allow_download=True"):
        InceptionFeatures()
    with pytest.raises(ValueError, match=r"there is none at .*elsewhere\.pth"):
        InceptionFeatures(tmp_path / "elsewhere.pth", allow_download=True)

    def fetch(url: str, path: str, prefix: str, progress: bool) -> None:
        assert prefix in url
        Path(path).symlink_to(empty_file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    fetched = InceptionFeatures(allow_download=True)
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    assert InceptionFeatures().network == fetched.network


class Payload:
    """A stranger's object in a file of weights; unpickling it would run its code."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the file was executed",))


def test_a_file_that_is_not_made_of_tensors_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match="must be a plain state dict"):
        InceptionFeatures(path)
