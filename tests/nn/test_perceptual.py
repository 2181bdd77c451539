"""LPIPS is torchmetrics' LPIPS, leaves its network alone and never downloads it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import vgg16

from grn_lightning.nn.perceptual import LPIPS, find_vgg_weights


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """VGG-16 with random weights of a sensible size."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = vgg16().features
    network.to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return network


@pytest.fixture(scope="module")
def lpips(features: nn.Sequential) -> LPIPS:
    return LPIPS(features)


@pytest.fixture(scope="module")
def weights(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file as torchvision writes it, without the classifier, which nothing here needs."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


def frames(seed: int, size: int = 32) -> Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def test_it_is_the_lpips_of_torchmetrics(features, lpips):
    oracle = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, eval_mode=True)
    parts = (oracle.net.slice1, oracle.net.slice2, oracle.net.slice3, oracle.net.slice4)
    theirs = [layer for part in (*parts, oracle.net.slice5) for layer in part]
    for ours, other in zip(features, theirs, strict=False):
        other.load_state_dict(ours.state_dict())
    heads = Path(torch.hub.__file__).parents[1] / "torchmetrics/functional/image/lpips_models"
    state = torch.load(heads / "vgg.pth", map_location="cpu", weights_only=True)
    oracle.load_state_dict(state, strict=False)
    one, two = frames(0), frames(1)
    expected = oracle(one, two).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(lpips(one, two), expected, rtol=1e-5, atol=1e-6)


def test_it_is_a_distance_of_equal_pictures_zero_and_symmetric(lpips):
    one, two = frames(0), frames(1)
    assert lpips(one, one).tolist() == [0, 0]
    torch.testing.assert_close(lpips(one, two), lpips(two, one))


def test_gradients_reach_the_frames_and_nothing_else(lpips):
    one, two = frames(0).requires_grad_(), frames(1)
    lpips(one, two).mean().backward()
    assert one.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())


def test_it_stays_in_eval_mode(lpips):
    assert not any(module.training for module in lpips.train().modules())


def test_weights_come_from_a_path(lpips, weights):
    found = LPIPS.load(weights)
    torch.testing.assert_close(found(frames(0), frames(1)), lpips(frames(0), frames(1)))
    assert not any(parameter.is_meta for parameter in found.parameters())


def test_weights_come_from_torchvisions_folder(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no file '.*vgg16-397923af.pth': fetch https://.*put it"):
        find_vgg_weights()
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    assert find_vgg_weights() == cached


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file '.*nowhere.pth'.*nothing is downloaded"):
        LPIPS.load(tmp_path / "nowhere.pth")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        LPIPS.load(damaged)
    torch.save({"weight": torch.zeros(1)}, damaged)
    with pytest.raises(ValueError, match="holds no weights of torchvision's VGG-16"):
        LPIPS.load(damaged)
    torch.save({"features.0.weight": torch.zeros(1)}, damaged)
    with pytest.raises(ValueError, match="does not fit VGG-16: .*features|does not fit VGG-16"):
        LPIPS.load(damaged)
