"""The judge is judged on clips that are drawn here, from scans it was not fitted on."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from grn_lightning.metrics import DIRECTIONS, DigitJudge
from grn_lightning.metrics.digits import (
    NO_DIRECTION,
    Centres,
    centre_of_mass,
    cut_windows,
    motion_direction,
)

STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


class Scans(NamedTuple):
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    labels: Tensor


@cache
def scans() -> Scans:
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    held_out, train = order[:360], order[360:]
    return Scans(images[train], labels[train], images[held_out], labels[held_out])


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge.fit(scans().train, scans().train_labels)


def draw(
    images: Tensor, *, direction: str = "right", size: int = 16, num_frames: int = 5
) -> Tensor:
    """Move upscaled scans over a canvas of 32 pixels; `(n, 3, f, 32, 32)` in [-1, 1]."""
    digits = F.interpolate(images[:, None], (size, size), mode="bicubic").clamp(0, 1)
    canvas = torch.zeros(len(images), 1, num_frames, 32, 32)
    for frame in range(num_frames):
        shift = frame - num_frames // 2
        row, column = (16 - size // 2 + step * shift for step in STEPS[direction])
        canvas[:, :, frame, row : row + size, column : column + size] = digits
    return (canvas * 2 - 1).expand(-1, 3, -1, -1, -1)


def blurred(clips: Tensor, sigma: float) -> Tensor:
    return gaussian_blur(clips.transpose(1, 2), [9, 9], [sigma, sigma]).transpose(1, 2)


def share_read(judge: DigitJudge, clips: Tensor) -> float:
    return (judge.classify(clips) == scans().labels).float().mean().item()


def test_held_out_scans_are_read(judge: DigitJudge) -> None:
    assert share_read(judge, draw(scans().held_out)) >= 0.98


def test_poor_reconstructions_are_read_by_what_they_show(judge: DigitJudge) -> None:
    clips = draw(scans().held_out)
    assert share_read(judge, blurred(clips, 1.0)) >= 0.97
    assert share_read(judge, clips + 0.1 * torch.randn_like(clips)) >= 0.97
    assert share_read(judge, 0.7 * clips - 0.3) >= 0.97  # gray ink on black
    assert share_read(judge, 0.9 * clips) >= 0.97  # on dark gray


@pytest.mark.parametrize("size", [12, 20])
def test_digits_of_another_size_are_read_when_the_size_is_given(
    judge: DigitJudge, size: int
) -> None:
    other = DigitJudge(digit_size=size)
    other.load_state_dict(judge.state_dict())
    assert share_read(other, draw(scans().held_out, size=size)) >= 0.97


def test_the_place_of_a_digit_does_not_matter(judge: DigitJudge) -> None:
    clips = draw(scans().held_out[:50], num_frames=1)
    for shift in [(-8, -8), (8, -8), (3, 7)]:
        moved = clips.roll(shift, (-2, -1))
        torch.testing.assert_close(
            judge.log_probs(moved), judge.log_probs(clips), atol=1e-4, rtol=0
        )


def test_log_probs_are_a_distribution_and_frames_vote(judge: DigitJudge) -> None:
    clips = draw(scans().held_out[:20])
    log_probs = judge.log_probs(clips)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(20))
    per_frame = torch.stack([judge.log_probs(clips[:, :, f : f + 1]) for f in range(5)])
    torch.testing.assert_close(log_probs, per_frame.mean(0).log_softmax(-1), atol=1e-5, rtol=0)


def test_features_of_all_frames_feed_a_distance(judge: DigitJudge) -> None:
    clips = draw(scans().held_out[:6])
    features = judge.features(clips)
    assert features.shape == (6, 5, judge.num_features) == (6, 5, 64)
    assert torch.equal(judge(clips), features.flatten(0, 1))
    torch.testing.assert_close(
        judge.head(features[:, 2]).log_softmax(-1), judge.log_probs(clips[:, :, 2:3])
    )
    assert judge.name == "digits-cnn"
    assert not any(parameter.requires_grad for parameter in judge.parameters())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_are_seen(judge: DigitJudge, direction: str) -> None:
    clips = draw(scans().held_out[:60], direction=direction)
    expected = torch.full((60,), DIRECTIONS.index(direction))
    assert torch.equal(judge.direction(clips), expected)
    assert torch.equal(judge.direction(blurred(clips, 1.0)), expected)
    noisy = clips + 0.1 * torch.randn_like(clips)
    assert torch.equal(judge.direction(noisy), expected)
    clips = clips.clone()
    clips[:, :, 1] = clips[:, :, 1].flip(-1, -2)  # one frame shows something else
    assert torch.equal(judge.direction(clips), expected)


def test_a_digit_at_rest_goes_nowhere(judge: DigitJudge) -> None:
    still = draw(scans().held_out[:5], num_frames=1).expand(-1, -1, 5, -1, -1)
    assert judge.direction(still).tolist() == [NO_DIRECTION] * 5
    black = torch.full((1, 3, 5, 32, 32), -1.0)
    assert judge.direction(black).tolist() == [NO_DIRECTION]


def test_one_frame_has_no_direction(judge: DigitJudge) -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        judge.direction(draw(scans().held_out[:1], num_frames=1))


def test_the_larger_axis_names_a_slanted_motion() -> None:
    time = torch.arange(5.0)
    centres = Centres(rows=torch.stack([-2 * time, time]), columns=torch.stack([time, 2 * time]))
    assert [DIRECTIONS[i] for i in motion_direction(centres)] == ["up", "right"]


def test_the_centre_of_mass_is_exact_below_the_pixel() -> None:
    frames = torch.zeros(2, 32, 32)
    frames[0, 8:12, 20:23] = 1.0
    frames[1, 8, 20], frames[1, 8, 21] = 1.0, 0.6  # 0.8 and 0.4 above the threshold
    centres = centre_of_mass(frames, digit_size=16)
    torch.testing.assert_close(centres.rows, torch.tensor([9.5, 8.0]))
    torch.testing.assert_close(centres.columns, torch.tensor([21.0, 20 + 0.4 / 1.2]))


def test_a_stray_spot_does_not_pull_the_centre() -> None:
    frames = torch.zeros(1, 32, 32)
    frames[0, 4:16, 4:16] = 1.0
    frames[0, 30:32, 30:32] = 1.0
    centres = centre_of_mass(frames, digit_size=16)
    assert [float(axis) for axis in centres] == pytest.approx([9.5, 9.5], abs=1e-5)


def test_a_window_on_the_pixel_grid_is_the_picture_itself() -> None:
    frames = torch.rand(2, 32, 32)
    centres = Centres(torch.tensor([10.5, 15.5]), torch.tensor([12.5, 16.5]))
    windows = cut_windows(frames, centres, digit_size=16 / 1.25)  # one window pixel = one pixel
    torch.testing.assert_close(windows[0, 0], frames[0, 3:19, 5:21], atol=1e-5, rtol=0)
    torch.testing.assert_close(windows[1, 0], frames[1, 8:24, 9:25], atol=1e-5, rtol=0)


def test_a_fit_depends_on_its_arguments_alone(judge: DigitJudge) -> None:
    def fit(seed: int) -> DigitJudge:
        return DigitJudge.fit(scans().train, scans().train_labels, seed=seed, num_steps=2)

    state = torch.get_rng_state()
    first = fit(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    with torch.inference_mode():
        second = fit(0)
    other = fit(1)
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight)
    assert not torch.equal(other.head.weight, first.head.weight)
    assert torch.get_num_threads() == 1


def test_a_saved_judge_says_the_same(judge: DigitJudge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    state = torch.get_rng_state()
    loaded = DigitJudge.load(tmp_path / "judge.safetensors")
    assert torch.equal(torch.get_rng_state(), state)  # nothing that starts later is another
    clips = draw(scans().held_out[:10])
    assert torch.equal(loaded.log_probs(clips), judge.log_probs(clips))
    assert loaded.digit_size == judge.digit_size
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must hold a judge 'digits-cnn' of format 1"):
        DigitJudge.load(tmp_path / "other.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"nothing of this kind")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        DigitJudge.load(tmp_path / "garbage.safetensors")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 8, 8), torch.zeros(3).long(), "one label each, got .* 3 labels"),
        (torch.rand(4, 16, 16), torch.zeros(4).long(), r"must be \(n, 8, 8\)"),
        (torch.full((4, 8, 8), 16.0), torch.zeros(4).long(), "divide scikit-learn's by 16"),
    ],
)
def test_scans_that_are_none_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitJudge.fit(images, labels)
