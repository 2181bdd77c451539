"""Our numbers beside those of the packages that publications use."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from grn_lightning.functional import frechet_distance
from grn_lightning.media.images import to_float
from grn_lightning.metrics import (
    GenerationConfig,
    GenerationMetrics,
    InceptionFeatures,
    kernel_score,
)
from grn_lightning.metrics.features import resize_bytes

# --- clean-fid ------------------------------------------------------------------------------------


def test_distances_are_those_of_clean_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("cleanfid.fid")
    # It asks for an argument that scipy is about to drop.
    root = SimpleNamespace(sqrtm=lambda x, disp: (scipy.linalg.sqrtm(x), 0.0))
    monkeypatch.setattr(theirs, "linalg", root)
    fake, real = torch.randn(90, 12).double(), 1.3 * torch.randn(80, 12).double() + 0.4
    moments = [(x.mean(0), torch.cov(x.T)) for x in (fake, real)]
    expected = theirs.frechet_distance(*(x.numpy() for pair in moments for x in pair))
    found = frechet_distance(*moments[0], *moments[1])
    assert found.item() == pytest.approx(expected, rel=1e-9)
    np.random.seed(2020)  # noqa: NPY002 - the only way to tell it which subsets
    expected = theirs.kernel_distance(real.numpy(), fake.numpy(), num_subsets=5, max_subset_size=30)
    found = kernel_score(fake, real, num_subsets=5, subset_size=30).mean
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_pictures_are_scaled_as_clean_fid_scales_them() -> None:
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    image = torch.randint(0, 256, (1, 3, 70, 410), dtype=torch.uint8)
    expected = torch.from_numpy(resize(image[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)
    found = resize_bytes(image, (299, 299), "pil-bicubic")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- torch-fidelity -------------------------------------------------------------------------------


class Pictures(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def blobs(n: int, *, level: float) -> Tensor:
    """Pictures of smooth colours."""
    small = level * torch.rand(n, 3, 3, 3)
    large = torch.nn.functional.interpolate(small, (24, 24), mode="bicubic")
    return (255 * large).clamp(0, 255).to(torch.uint8)


@pytest.mark.slow
@pytest.mark.scale
def test_all_numbers_equal_torch_fidelity_from_pictures_on(inception_file: Path) -> None:
    fake, real = blobs(12, level=1.0), blobs(11, level=0.7)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=4,
        kid_subset_size=8,
        feature_extractor="inception-v3-compat",  # manifolds would take a VGG
        feature_extractor_weights_path=str(inception_file),
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=6,
    )
    config = GenerationConfig(
        num_samples=12,
        metrics=("fid", "is", "kid", "precision", "recall"),
        kid_subsets=4,
        kid_subset_size=8,
        kept_features=50,
    )
    ours = GenerationMetrics(InceptionFeatures(inception_file), config)
    for images, is_real in ((fake, False), (real, True)):
        for part in images.split(6):
            ours.update(to_float(part)[:, :, None], real=is_real)
    found = {one.metric: one.value for one in ours.compute()}
    expected = {
        "fid": theirs["frechet_inception_distance"],
        "is": theirs["inception_score_mean"],
        "kid": theirs["kernel_inception_distance_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
    }
    # A difference of kernel means near 1, which they compute in float32.
    assert found.pop("kid") == pytest.approx(expected.pop("kid"), abs=1e-6)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["fid"] > 0.01


# --- processes ------------------------------------------------------------------------------------

_WORKER = """
import json, sys
import torch
from torch import distributed, nn
from grn_lightning.metrics import (
    Features, FrechetDistance, GenerationConfig, GenerationMetrics,
)


class Colours(nn.Module):
    name, num_features, num_spatial, num_classes = "colours", 6, 12, 3

    def extract(self, clips):
        flat = clips[:, :, 0].flatten(2)
        pooled, spatial = torch.cat([flat.mean(2), flat.std(2)], 1), flat[:, :, :4].flatten(1)
        return Features(pooled, spatial, logits=9 * flat.mean(2))

    def forward(self, clips):
        return self.extract(clips).pooled


file, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if world > 1:
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world
    )
rng = torch.Generator().manual_seed(0)
level = torch.rand(2, 61, 3, 1, 1, 1, generator=rng)
clips = level + 0.3 * torch.rand(2, 61, 3, 1, 6, 6, generator=rng) - 0.7
config = GenerationConfig(num_samples=61, kid_subsets=3, kid_subset_size=20, kept_features=40)
metrics, distance = GenerationMetrics(Colours(), config), FrechetDistance(Colours())
# The last process has the shorter share, and none of the last batch.
for numbers in torch.arange(rank, 61, world).split(16):
    for real in (False, True):
        part = clips[int(real), numbers]
        metrics.update(part, real=real, sample_index=numbers)
        distance.update(part, real=real)
found = {one.tag: one.value for one in metrics.compute()} | {"alone": float(distance.compute())}
if rank == 0:
    print(json.dumps(found))
if world > 1:
    distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.scale
def test_two_processes_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, meeting = tmp_path / "worker.py", tmp_path / "meeting"
    script.write_text(_WORKER)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(meeting), str(rank), "2"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    monkeypatch.setattr(sys, "argv", ["worker.py", "", "0", "1"])
    runpy.run_path(str(script))
    one = json.loads(capsys.readouterr().out)
    two = json.loads([process.communicate(timeout=180)[0] for process in started][0])
    assert [process.returncode for process in started] == [0, 0]
    assert list(one) == [
        *(f"{name}[colours,61]" for name in ("FID", "sFID", "IS")),
        *(f"{name}[colours,40]" for name in ("KID", "precision", "recall")),
        "alone",
    ]
    assert two == pytest.approx(one, rel=1e-9)
