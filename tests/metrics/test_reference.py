from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grn_lightning.metrics import FeatureSums, Moments, Protocol, ReferenceStatistics
from grn_lightning.metrics.reference import npz_images

PROTOCOL = Protocol(
    features="torch_fidelity",
    num_samples=40,
    rounding="round",
    resize="tensorflow",
    network="inception-2015-12-05-6726825d",
)


def moments(d: int = 6, *, n: int = 40) -> Moments:
    sums = FeatureSums(d)
    sums.update(torch.randn(n, d))
    return sums.compute()


def reference(**changes: object) -> ReferenceStatistics:
    facts = {
        "moments": moments(),
        "protocol": PROTOCOL,
        "source": "train",
        "spatial": moments(4),
        "features": torch.randn(7, 6),
    }
    return ReferenceStatistics(**(facts | changes))


def adm_file(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


# --- sums -----------------------------------------------------------------------------------------


def test_sums_are_mean_and_covariance_however_the_samples_came() -> None:
    x = torch.randn(50, 6) + 3
    sums = FeatureSums(6)
    for part in x.split([1, 20, 29]):
        sums.update(part)
    found = sums.compute()
    assert found.num_samples == 50
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-12, atol=0)
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    torch.testing.assert_close(found.covariance, expected, rtol=1e-11, atol=1e-12)


def test_memory_does_not_grow_and_half_precision_is_no_excuse() -> None:
    sums = FeatureSums(6)
    size = sum(getattr(sums, name).numel() for name in sums.metric_state)
    for _ in range(5):
        sums.update(torch.randn(10, 6).bfloat16())
    assert sum(getattr(sums, name).numel() for name in sums.metric_state) == size == 6 + 36 + 1
    assert sums.total.dtype == sums.outer.dtype == torch.float64


def test_processes_add_up() -> None:
    x = torch.randn(30, 6)
    ranks = [FeatureSums(6), FeatureSums(6)]
    ranks[0].update(x[:11])
    ranks[1].update(x[11:])
    whole = FeatureSums(6)
    whole.update(x)
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute().covariance, whole.compute().covariance)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(3, 5), r"must be \(n, 6\), got \(3, 5\)"),
        (torch.full((3, 6), torch.nan), "3 of 3 samples have NaN"),
    ],
)
def test_features_of_which_nothing_can_be_made_are_refused(features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSums(6).update(features)


# --- files ----------------------------------------------------------------------------------------


def test_statistics_survive_a_file_with_protocol_and_hash(tmp_path: Path) -> None:
    made = reference()
    made.save(tmp_path / "ref.safetensors")
    read = ReferenceStatistics.read(tmp_path / "ref.safetensors", protocol=PROTOCOL)
    assert read.protocol == made.protocol
    assert read.digest == made.digest
    assert read.label == f"train-{made.digest[:8]}"
    assert read.moments.num_samples == 40
    assert read.spatial is not None
    torch.testing.assert_close(read.spatial.covariance, made.spatial.covariance, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "ref.safetensors"]


def test_statistics_of_another_protocol_are_refused(tmp_path: Path) -> None:
    reference().save(tmp_path / "ref.safetensors")
    clean = replace(PROTOCOL, features="clean", resize="pil-bicubic")
    with pytest.raises(ValueError, match=r"resize 'tensorflow' and 'pil-bicubic'.*across protocol"):
        ReferenceStatistics.read(tmp_path / "ref.safetensors", protocol=clean)


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    made = reference()
    other = made.moments._replace(mean=made.moments.mean + 1e-9)
    assert reference(moments=other).digest != made.digest
    made.save(tmp_path / "ref.safetensors")
    data = bytearray((tmp_path / "ref.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "ref.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its numbers do not have the hash"):
        ReferenceStatistics.read(tmp_path / "ref.safetensors")


def test_what_others_publish_is_read_and_written(tmp_path: Path) -> None:
    made = reference()
    made.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["mu", "mu_s", "sigma", "sigma_s"]
    read = ReferenceStatistics.read(tmp_path / "ours.npz", protocol=PROTOCOL)
    assert read.source == "ours"
    assert read.protocol.num_samples == 0
    torch.testing.assert_close(read.moments.mean, made.moments.mean, rtol=0, atol=0)
    jit = adm_file(tmp_path / "jit.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3))
    plain = ReferenceStatistics.read(jit, protocol=PROTOCOL)
    assert plain.spatial is None
    assert plain.moments.mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "lacks sigma"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "lacks mu and sigma; it holds pictures"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\(d,\) and \(d, d\), got \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
    ],
)
def test_files_of_others_are_checked(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceStatistics.read(adm_file(tmp_path / "x.npz", **arrays), protocol=PROTOCOL)


def test_objects_of_strangers_stay_packed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the file was executed",))

    array = np.empty(1, object)
    array[0] = Payload()
    path = adm_file(tmp_path / "x.npz", mu=array, sigma=np.eye(1))
    with pytest.raises(ValueError, match="holds objects"):
        ReferenceStatistics.read(path, protocol=PROTOCOL)


def test_a_file_that_does_not_tell_its_features_is_not_guessed_at(tmp_path: Path) -> None:
    path = adm_file(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="does not say with which features"):
        ReferenceStatistics.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no reference statistics at"):
        ReferenceStatistics.read(tmp_path / "none.safetensors")
    save_file({"mean": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="of format 1, got something else"):
        ReferenceStatistics.read(tmp_path / "other.safetensors")
    for name in ("text.safetensors", "text.npz"):
        (tmp_path / name).write_text("no numbers")
        with pytest.raises(ValueError, match="is no whole"):
            ReferenceStatistics.read(tmp_path / name, protocol=PROTOCOL)
    with pytest.raises(ValueError, match=r"written to \.safetensors or \.npz"):
        reference().save(tmp_path / "ref.pth")


def test_pictures_of_an_npz_come_in_batches(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    path = adm_file(tmp_path / "samples.npz", arr_0=images)
    batches = list(npz_images(path, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.cat(batches).permute(0, 2, 3, 1).numpy().tolist() == images.tolist()
    floats = adm_file(tmp_path / "floats.npz", arr_0=images / 255)
    with pytest.raises(ValueError, match=r"must be uint8 \(n, h, w, 3\), got float64"):
        next(npz_images(floats, batch_size=2))
