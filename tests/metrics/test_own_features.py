"""Features of networks that a user has as a file, on small random ones."""

import warnings
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from grn_lightning.media.images import to_float, to_picture
from grn_lightning.metrics import DigitJudge
from grn_lightning.metrics.clip import ClipFeatures, ClipScore
from grn_lightning.metrics.dino import DinoFeatures
from grn_lightning.metrics.extractors import build_extractor
from grn_lightning.metrics.features import extract, protocol_of
from grn_lightning.metrics.video_features import VideoFeatures

CAPTIONS = ["the digit seven moves left", "a cat", "two dogs"]


def clips(b: int, *, f: int = 1, size: int = 20) -> Tensor:
    return to_float(torch.randint(0, 256, (b, 3, f, size, size), dtype=torch.uint8))


# --- CLIP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_features(clip_folder: Path) -> ClipFeatures:
    return ClipFeatures(f"local-dir:{clip_folder}")


def test_clip_sees_what_open_clips_transforms_show(
    clip_features: ClipFeatures, clip_folder: Path
) -> None:
    frames = clips(2, f=2)
    found = clip_features(frames)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    images = ((frames + 1) * 127.5).round().byte().transpose(1, 2).flatten(0, 1)
    shown = torch.stack([transform(to_picture(image)) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval().encode_image(shown))
    assert found.shape == (4, clip_features.num_features)
    protocol = protocol_of(clip_features, num_samples=4)
    assert protocol.tag("fid") == "FID[clip-small,4,round]"
    assert protocol.network.startswith("small-")


def test_the_clip_score_is_the_mean_cosine_of_frames_and_captions(
    clip_features: ClipFeatures,
) -> None:
    shown = clips(3, f=2)
    metric = ClipScore(clip_features)
    metric.update(shown[:1], CAPTIONS[:1])
    padded = torch.cat([shown[1:], torch.full_like(shown[:1], torch.nan)])
    metric.update(padded, [*CAPTIONS[1:], ""], torch.tensor([1.0, 1.0, 0.0]))
    images = clip_features(shown).unflatten(0, (3, 2)).double()
    texts = clip_features.texts(CAPTIONS).double()
    cosines = torch.cosine_similarity(images, texts[:, None], dim=2)
    measured = metric.measure()
    assert measured.value == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-6)
    assert measured.tag == "CLIP score[clip-small,3,round]"
    with pytest.raises(ValueError, match="3 clips need as many captions, got 2"):
        metric.update(shown, CAPTIONS[:2])


def test_clip_is_never_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights of 'ViT-B-32' must be a local file, got None"):
        ClipFeatures("ViT-B-32")
    with pytest.raises(ValueError, match="unknown architecture 'ViT-X'"):
        ClipFeatures("ViT-X", tmp_path)
    with pytest.raises(ValueError, match=r"must be a local file, got .*safetensors"):
        ClipFeatures(f"local-dir:{tmp_path}")


def test_weights_of_others_do_not_pass_for_clips(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(
        (clip_folder / "open_clip_config.json").read_text()
    )
    (tmp_path / "open_clip_model.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot load the weights of 'local-dir:"):
        ClipFeatures(f"local-dir:{tmp_path}")


# --- DINOv2 ---------------------------------------------------------------------------------------


@pytest.fixture
def small_dino(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    small = partial(timm.create_model, depth=1, embed_dim=24, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    return small("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()


def test_dino_gives_the_class_token_of_scaled_normalized_frames(
    tmp_path: Path, small_dino: nn.Module
) -> None:
    torch.save(small_dino.state_dict(), tmp_path / "weights.pth")
    features = DinoFeatures(tmp_path / "weights.pth", "vit_small_patch14_dinov2")
    shown = clips(2, size=224)
    published = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in published)
    with torch.no_grad():
        expected = small_dino(((shown[:, :, 0] + 1) / 2 - mean) / std)
    torch.testing.assert_close(features(shown), expected, rtol=1e-4, atol=1e-5)
    assert features(clips(1, f=2)).shape == (2, 24)
    assert features.name == "dinov2-vit-small-patch14"


def test_dino_takes_the_authors_file_of_another_size(tmp_path: Path, small_dino: nn.Module) -> None:
    """Their names, a token for masks, and positions of 518 pixels."""
    theirs = small_dino.state_dict() | {"mask_token": torch.zeros(1, 24)}
    theirs["pos_embed"] = torch.randn(1, 37 * 37 + 1, 24)
    torch.save(theirs, tmp_path / "theirs.pth")
    features = DinoFeatures(tmp_path / "theirs.pth", "vit_small_patch14_dinov2")
    assert features(clips(1)).shape == (1, 24)
    del theirs["norm.weight"]
    torch.save(theirs, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"cannot load the weights.*norm\.weight"):
        DinoFeatures(tmp_path / "theirs.pth", "vit_small_patch14_dinov2")
    with pytest.raises(ValueError, match="no 'resnet50'; known are vit_base_patch14_dinov2"):
        DinoFeatures(tmp_path / "theirs.pth", "resnet50")
    with pytest.raises(ValueError, match="there is none at .*nothing is downloaded"):
        DinoFeatures(tmp_path / "none.pth")


# --- the others, and all of them by name ----------------------------------------------------------


class ClipMeans(nn.Module):
    def forward(self, clips: Tensor) -> Tensor:
        return clips.mean((3, 4)).flatten(1)[:, :12]


def test_a_video_network_sees_bytes_scaled_from_the_centres(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks for another format of files
        torch.jit.trace(ClipMeans(), torch.zeros(1, 3, 16, 224, 224)).save(tmp_path / "means.pt")
    features = VideoFeatures(tmp_path / "means.pt")
    shown = clips(2, f=16)
    frames = shown.transpose(1, 2).flatten(0, 1)
    large = nn.functional.interpolate(frames, (224, 224), mode="bilinear")
    expected = ClipMeans()(large.unflatten(0, (2, 16)).transpose(1, 2))
    torch.testing.assert_close(features(shown), expected, rtol=1e-4, atol=1e-5)
    protocol = protocol_of(features, num_samples=2)
    assert protocol.tag("fvd") == f"FVD[{features.name},2,round]"
    assert (protocol.resize, protocol.network) == ("bilinear", features.name)


def test_the_digit_judge_has_classes_too() -> None:
    judge = DigitJudge(digit_size=16).freeze()
    shown = clips(2, f=3, size=32)
    found = extract(judge, shown)
    assert found.logits is not None
    assert found.logits.shape == (6, judge.num_classes)
    one = clips(1, size=32)
    assert extract(judge, one).logits.argmax() == judge.classify(one)


def test_features_have_names(tmp_path: Path, clip_folder: Path) -> None:
    DigitJudge(digit_size=16).save(tmp_path / "judge.safetensors")
    judge = build_extractor("digits-cnn", tmp_path / "judge.safetensors")
    assert protocol_of(judge).network.startswith("digits-cnn-")
    clip = build_extractor(f"clip:local-dir:{clip_folder}")
    assert clip.name == "clip-small"
    with pytest.raises(ValueError, match="no features 'inception'; known are torch_fidelity, adm"):
        build_extractor("inception")
    with pytest.raises(ValueError, match="'dinov2:x' need the file of their weights"):
        build_extractor("dinov2:x")
    with pytest.raises(ValueError, match="rounding belongs to Inception"):
        build_extractor("digits-cnn", tmp_path / "judge.safetensors", rounding="truncate")
    with pytest.raises(ValueError, match=r"must be the file weights-inception.*none at"):
        build_extractor("adm", tmp_path / "none.pth")
