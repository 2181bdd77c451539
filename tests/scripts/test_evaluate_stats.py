"""`grn evaluate stats` on the embedded set."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grn_lightning import cli
from grn_lightning.datasets.samples import SampleFormat, SampleReader
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.media.images import decode_image
from grn_lightning.metrics import DigitJudge, ReferenceStatistics
from grn_lightning.scripts.evaluate_stats import StatsReport, evaluate_stats


def call(*words: str | Path, monkeypatch: pytest.MonkeyPatch) -> StatsReport:
    monkeypatch.setattr(sys, "argv", ["grn", *map(str, words)])
    return cli.main()


def test_the_statistics_are_those_of_all_pictures_of_a_split(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, out = digits / "judge.safetensors", tmp_path / "ref.safetensors"
    words = ["evaluate", "stats", digits / "images", "--split", "val", "--out", out]
    words += ["--features", "digits-cnn", "--weights", judge, "--keep", "4"]
    report = call(*words, monkeypatch=monkeypatch)
    shards = ShardSet.open(digits / "images", "val")
    size = decoded_size(shards)
    reader = SampleReader(shards, SampleFormat(media="image", size=size, num_frames=1))
    clips = torch.stack([reader.read(i, number=i).clip for i in range(len(shards))])
    with torch.no_grad():
        x = DigitJudge.load(judge)(clips.transpose(1, 2).float() / 127.5 - 1).double()
    read = ReferenceStatistics.read(out)
    torch.testing.assert_close(read.moments.mean, x.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(read.moments.covariance, torch.cov(x.T), rtol=1e-5, atol=1e-8)
    assert (report.protocol.num_samples, report.num_kept) == (len(shards), 4)
    assert read.label == f"images-val-{report.digest[:8]}"
    assert read.protocol.network.startswith("digits-cnn-")
    assert "for FID, KID, precision, recall" in str(report)


def decoded_size(shards: ShardSet) -> tuple[int, int]:
    raw = shards.read(0, ("png", "jpg"))
    return tuple(decode_image(next(iter(raw.fields.values()))).shape[1:])


@pytest.mark.parametrize("batch_size", [2, 3, 5, 20])
def test_pictures_of_an_npz_serve_as_well(digits: Path, tmp_path: Path, batch_size: int) -> None:
    """Five of fourteen, however they are read: the last batch is cut, and nothing comes after."""
    images = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    report = evaluate_stats(
        tmp_path / "samples.npz",
        out=tmp_path / "ref.npz",
        features="digits-cnn",
        weights=digits / "judge.safetensors",
        num_samples=5,
        batch_size=batch_size,
    )
    assert report.protocol.num_samples == 5
    judge = DigitJudge.load(digits / "judge.safetensors")
    clips = torch.from_numpy(images[:5]).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
    with np.load(tmp_path / "ref.npz") as arrays, torch.no_grad():
        assert arrays["mu"] == pytest.approx(judge(clips).double().mean(0).numpy(), rel=1e-5)


def test_clips_count_by_their_frames(digits: Path, tmp_path: Path) -> None:
    report = evaluate_stats(
        digits / "clips",
        out=tmp_path / "ref.safetensors",
        features="digits-cnn",
        weights=digits / "judge.safetensors",
        split="val",
        num_samples=3,
        num_frames=2,
        image_size=32,
    )
    assert report.protocol.num_samples == 6


def test_nothing_is_overwritten_and_options_must_fit(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "ref.safetensors").write_text("mine")
    for options, message in (
        ({"out": tmp_path / "ref.safetensors"}, "exists and is left alone"),
        ({"out": tmp_path / "ref.pt"}, "must end in .safetensors or .npz"),
        ({"out": tmp_path / "a.npz", "keep": 5}, "no place for features"),
        ({"out": tmp_path / "a.safetensors", "keep": 1}, "`keep` must be 0 or at least 2"),
        ({"out": tmp_path / "a.safetensors", "features": "inception"}, "known are torch_fidelity"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_stats(digits / "images", **options)
    assert (tmp_path / "ref.safetensors").read_text() == "mine"


def test_data_is_looked_for_before_the_network(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    out = tmp_path / "a.safetensors"
    for name, why in (
        ("gone", "no shards of split"),
        ("gone.npz", "there is no such file"),
        ("text.npz", "an archive, and is none"),
    ):
        with pytest.raises(ValueError, match=why):
            evaluate_stats(
                tmp_path / name, out=out, features="clean", weights=tmp_path / "no-weights"
            )


def test_judging_a_run_is_still_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "_run_tool", lambda name, args: seen.extend([name, *args]))
    for words in (["evaluate", "runs/x", "data"], ["evaluate", "stats", "data"]):
        monkeypatch.setattr(sys, "argv", ["grn", *words])
        cli.main()
    assert seen == ["evaluate", "runs/x", "data", "evaluate stats", "data"]
