"""The judge of the embedded data set: which digit a clip shows, and where the digit goes.

It knows nothing of tokenizers and generators. The class is read by a small network that was fitted
on real scans; the direction is the motion of the centre of mass, and needs no fitting.

A frame is read in three steps: find the centre of mass of the ink, cut a window around it that
grows with the size of the digit (so the network sees every digit alike, wherever it is and however
large it was drawn), classify the window. A clip is the mean of the log-probabilities of its frames.

The training pictures are made here from the scans: bicubic upscaling, small rotations and shears,
sub-pixel positions, blur, smear, noise, contrast. So a slightly blurred reconstruction is judged by
what it shows and not by its sharpness. The numbers of the augmentation are empirical.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from grn_lightning.metrics.features import Features, short_hash

DIRECTIONS = ("left", "right", "up", "down")
NO_DIRECTION = -1

_NUM_CLASSES = 10
_WINDOW_PIXELS = 16  # what the network sees; a scan has 8
_WINDOW_MARGIN = 1.25  # window / digit: strokes may lie off the centre of mass
_INK_THRESHOLD = 0.2  # of the brightest pixel; below is background
_MIN_INK = 0.1  # a frame without a brighter pixel shows nothing
_MIN_MOTION_PIXELS = 0.5  # over the whole clip; below, the digit rests
_FORMAT = 1


class Centres(NamedTuple):
    """Where the digit is, in pixels; the centre of the upper left pixel is (0, 0)."""

    rows: Tensor
    """`(...)` float."""

    columns: Tensor
    """`(...)` float."""


def brightness(clips: Tensor) -> Tensor:
    """Map clips `(b, 3, f, h, w)` in [-1, 1] to their gray values `(b, f, h, w)` in [0, 1]."""
    return ((clips.float().mean(1) + 1) / 2).clamp(0, 1)


def centre_of_mass(frames: Tensor, *, digit_size: float) -> Centres:
    """Find the digit in every frame.

    The second of two passes counts only the ink near the first centre, so a stray bright spot
    elsewhere does not pull the centre away.

    Args:
        frames: Brightness `(..., h, w)` in [0, 1].
        digit_size: Height and width of the digit in pixels.

    Returns:
        Centres `(...)`; the middle of the canvas where a frame shows nothing.
    """
    brightest = frames.amax((-2, -1), keepdim=True)
    ink = (frames - _INK_THRESHOLD * brightest).relu() * (brightest > _MIN_INK)
    centres = _mean_position(ink)
    rows, columns = _pixel_axes(frames)
    is_near = ((rows - centres.rows[..., None, None]).abs() <= 0.75 * digit_size) & (
        (columns - centres.columns[..., None, None]).abs() <= 0.75 * digit_size
    )
    return _mean_position(ink * is_near)


def _pixel_axes(frames: Tensor) -> tuple[Tensor, Tensor]:
    h, w = frames.shape[-2:]
    return torch.arange(h, device=frames.device)[:, None], torch.arange(w, device=frames.device)


def _mean_position(ink: Tensor) -> Centres:
    rows, columns = _pixel_axes(ink)
    mass = ink.sum((-2, -1))
    is_blank, safe_mass = mass == 0, mass.clamp_min(1e-12)
    row = torch.where(is_blank, (len(rows) - 1) / 2, (ink * rows).sum((-2, -1)) / safe_mass)
    column = torch.where(
        is_blank, (len(columns) - 1) / 2, (ink * columns).sum((-2, -1)) / safe_mass
    )
    return Centres(row, column)


def cut_windows(frames: Tensor, centres: Centres, *, digit_size: float) -> Tensor:
    """Cut the digit out of every frame, at sub-pixel positions, to one size.

    Args:
        frames: Brightness `(n, h, w)`; black is assumed beyond the border.
        centres: Middle of every window, `(n,)` each.
        digit_size: Height and width of the digit in pixels.

    Returns:
        Windows `(n, 1, 16, 16)` in [0, 1] that are 1.25 digits wide.
    """
    steps = (torch.arange(_WINDOW_PIXELS, device=frames.device) + 0.5) / _WINDOW_PIXELS - 0.5
    offsets = steps * (_WINDOW_MARGIN * digit_size)
    h, w = frames.shape[-2:]
    y = (2 * (centres.rows[:, None] + offsets) + 1) / h - 1  # pixel -> [-1, 1] of grid_sample
    x = (2 * (centres.columns[:, None] + offsets) + 1) / w - 1
    shape = (len(frames), _WINDOW_PIXELS, _WINDOW_PIXELS)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(frames[:, None], grid, align_corners=False)


def motion_direction(centres: Centres) -> Tensor:
    """Name the direction in which centres move, by the larger axis of the displacement.

    The displacement is the slope of a robust line (the median of the slopes between all pairs of
    frames, Theil-Sen) times the duration; up to 29% of the frames may be wrong.

    Args:
        centres: Positions over time, `(b, f)` each, f >= 2.

    Returns:
        `(b,)` long indices of `DIRECTIONS`; `NO_DIRECTION` where the digit moves less than half a
        pixel over the clip.

    Raises:
        ValueError: If there is a single frame.
    """
    num_frames = centres.rows.shape[-1]
    if num_frames < 2:
        raise ValueError(f"a direction needs at least 2 frames, got {num_frames}.")
    down, right = (_median_slope(axis) * (num_frames - 1) for axis in centres)
    horizontal = torch.where(right < 0, 0, 1)
    vertical = torch.where(down < 0, 2, 3)
    direction = torch.where(right.abs() >= down.abs(), horizontal, vertical)
    is_still = torch.maximum(right.abs(), down.abs()) < _MIN_MOTION_PIXELS
    return direction.masked_fill(is_still, NO_DIRECTION)


def _median_slope(positions: Tensor) -> Tensor:
    num_frames = positions.shape[-1]
    first, second = torch.triu_indices(num_frames, num_frames, offset=1, device=positions.device)
    slopes = (positions[:, second] - positions[:, first]) / (second - first)
    return slopes.quantile(0.5, dim=-1)


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=rng)


def _paste(digits: Tensor, rng: torch.Generator) -> Tensor:
    """Put digits `(n, s, s)` on canvases `(n, 2 s, 2 s)`, slightly turned, sheared, scaled."""
    n, size = digits.shape[:2]
    angle, shear = _uniform(n, -0.15, 0.15, rng), _uniform(n, -0.12, 0.12, rng)
    scale_y, scale_x = 2 / _uniform(n, 0.92, 1.08, rng), 2 / _uniform(n, 0.92, 1.08, rng)
    shift_y, shift_x = _uniform(n, -1, 1, rng), _uniform(n, -1, 1, rng)
    rows_x = torch.stack(
        [angle.cos() * scale_x, (shear - angle.sin()) * scale_x, shift_x / size], 1
    )
    rows_y = torch.stack([angle.sin() * scale_y, angle.cos() * scale_y, shift_y / size], 1)
    grid = F.affine_grid(
        torch.stack([rows_x, rows_y], 1), [n, 1, 2 * size, 2 * size], align_corners=False
    )
    return F.grid_sample(digits[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def _blur(canvases: Tensor, sigma: Tensor) -> Tensor:
    """Blur every canvas `(n, h, w)` by its own Gaussian; widths in pixels `(n,)`."""
    n, radius = len(canvases), max(1, round(2.5 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1)
    kernels = torch.softmax(-0.5 * (offsets / sigma[:, None].clamp_min(0.05)) ** 2, dim=-1)
    across = F.conv2d(canvases[None], kernels[:, None, None], padding=(0, radius), groups=n)
    return F.conv2d(across, kernels[:, None, :, None], padding=(radius, 0), groups=n)[0]


def _smear(canvases: Tensor, rng: torch.Generator) -> Tensor:
    """Leave a faint copy one or two pixels away, as a bad motion does."""
    n = len(canvases)
    row, column = torch.randint(-2, 3, (2,), generator=rng).tolist()
    strength = _uniform(n, -0.5, 0.5, rng).relu()[:, None, None]
    return torch.maximum(canvases, strength * canvases.roll((row, column), (-2, -1)))


def _develop(canvases: Tensor, rng: torch.Generator) -> Tensor:
    """Change contrast and gamma, raise the background a little, add noise; stay in [0, 1]."""
    n = len(canvases)
    gain = _uniform(n, 0.6, 1.2, rng)[:, None, None]
    gamma = _uniform(n, -0.5, 0.5, rng).exp()[:, None, None]
    lift = _uniform(n, -0.05, 0.05, rng)[:, None, None]
    noise = torch.randn(canvases.shape, generator=rng)
    sigma = _uniform(n, -0.08, 0.08, rng).relu()[:, None, None]
    return (gain * canvases.clamp(1e-6, 1) ** gamma + lift + sigma * noise).clamp(0, 1)


def _augmented_windows(digits: Tensor, rng: torch.Generator) -> Tensor:
    """Render digits `(n, s, s)` as a judge may meet them, found and cut as it will find them."""
    n, size = digits.shape[:2]
    canvases = _paste(digits, rng)
    canvases = _blur(canvases, _uniform(n, -1.0, 1.8, rng).relu() * size / 16)
    canvases = _develop(_smear(canvases, rng), rng)
    found = centre_of_mass(canvases, digit_size=size)
    error = 0.75 * size / 16  # twice this, in pixels, is how wrong a centre may be
    centres = Centres(
        *(
            axis + _uniform(n, -error, error, rng) + _uniform(n, -error, error, rng)
            for axis in found
        )
    )
    return cut_windows(canvases, centres, digit_size=size)


class DigitJudge(nn.Module):
    """Read digit and direction from clips `(b, 3, f, h, w)` in [-1, 1], white ink on black.

    As a module it maps clips to the features of all their frames `(b f, 64)`, which is what a
    `FrechetDistance` asks of an extractor. Build one by `fit` or `load`; parameters are frozen.

    Attributes:
        name: Tells distances with these features from distances with others.
        num_features: Width of the features.
        num_classes: Digits there are.
        network: Name and hash of the file that it was loaded from; empty if it was fitted.
        digit_size: Height and width in pixels of the digits it expects.
    """

    name = "digits-cnn"
    num_features = 64
    num_classes = _NUM_CLASSES
    network = ""

    def __init__(self, *, digit_size: float) -> None:
        super().__init__()
        if not digit_size > 0:
            raise ValueError(f"digit_size must be positive, got {digit_size} pixels.")
        self.digit_size = float(digit_size)
        self.network = ""  # name and hash of the file, once there is one
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (_WINDOW_PIXELS // 4) ** 2, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, _NUM_CLASSES)

    @classmethod
    def fit(
        cls,
        scans: Tensor,
        labels: Tensor,
        *,
        seed: int = 0,
        digit_size: int = 16,
        num_steps: int = 300,
        batch_size: int = 64,
    ) -> Self:
        """Fit a judge on real scans, on the CPU; the result depends on the arguments alone.

        Args:
            scans: `(n, 8, 8)` float in [0, 1], 1 is ink. Never show it the held-out ones.
            labels: `(n,)` long in [0, 10).
            seed: Seed of weights, order and augmentation. The global generator is left alone.
            digit_size: Height and width in pixels at which the scans are drawn on the canvas.
            num_steps: Optimizer steps.
            batch_size: Scans per step.

        Returns:
            A frozen judge in evaluation mode.

        Raises:
            ValueError: If the scans are not `(n, 8, 8)` in [0, 1] with one label each.
        """
        if scans.shape[1:] != (8, 8) or len(scans) != len(labels) or len(scans) == 0:
            raise ValueError(
                "scans must be (n, 8, 8) with one label each, "
                f"got {tuple(scans.shape)} and {len(labels)} labels."
            )
        if scans.min() < 0 or scans.max() > 1:
            raise ValueError(
                f"scans must lie in [0, 1], got [{scans.min():g}, {scans.max():g}]; "
                "divide scikit-learn's by 16."
            )
        # A judge may be fitted on the way, inside an evaluation that has gradients switched off.
        with _own_surroundings(seed), torch.inference_mode(False), torch.enable_grad():
            judge = cls(digit_size=digit_size)
            digits = _upscale(scans.detach().cpu().float().clone(), size=digit_size)
            _train(judge, digits, labels.cpu().clone(), num_steps=num_steps, batch_size=batch_size)
        return judge.freeze()

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a judge that `save` has written.

        Raises:
            ValueError: If the file is not a judge of this format.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("judge", "{}"))
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file, but: {error}.") from error
        if metadata.get("name") != cls.name or metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} must hold a judge {cls.name!r} of format {_FORMAT}, got "
                f"{metadata or 'no such metadata'}; fit a judge anew and save it."
            )
        with torch.random.fork_rng(devices=[]):  # else a judge would change what starts after it
            judge = cls(digit_size=metadata["digit_size"])
        judge.load_state_dict(weights)
        judge.network = f"{cls.name}-{short_hash(Path(path))}"
        return judge.freeze()

    def save(self, path: Path | str) -> None:
        """Write weights and settings as one safetensors file."""
        metadata = {"name": self.name, "format": _FORMAT, "digit_size": self.digit_size}
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(weights, str(path), metadata={"judge": json.dumps(metadata)})

    def freeze(self) -> Self:
        """Switch to evaluation and stop gradients to the weights; returns itself."""
        return self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features of every frame, `(b f, 64)`."""
        return self.features(clips).flatten(0, 1)

    def extract(self, clips: Tensor) -> Features:
        """Return features and logits of every frame, `(b f, 64)` and `(b f, 10)`."""
        features = self.forward(clips)
        return Features(features, logits=self.head(features))

    def features(self, clips: Tensor) -> Tensor:
        """Return the features before the last layer, non-negative, `(b, f, 64)`."""
        frames = brightness(clips)
        flat = rearrange(frames, "b f h w -> (b f) h w")
        centres = centre_of_mass(flat, digit_size=self.digit_size)
        features = self.trunk(cut_windows(flat, centres, digit_size=self.digit_size))
        return features.reshape(*frames.shape[:2], -1)

    def log_probs(self, clips: Tensor) -> Tensor:
        """Return log-probabilities of the ten digits, mean over frames, normalized, `(b, 10)`."""
        per_frame = self.head(self.features(clips)).log_softmax(-1)
        return per_frame.mean(1).log_softmax(-1)

    def classify(self, clips: Tensor) -> Tensor:
        """Return the digit that every clip shows, `(b,)` long."""
        return self.log_probs(clips).argmax(-1)

    def direction(self, clips: Tensor) -> Tensor:
        """Return where the digit of every clip goes, `(b,)` long; see `motion_direction`."""
        return motion_direction(centre_of_mass(brightness(clips), digit_size=self.digit_size))


@contextmanager
def _own_surroundings(seed: int) -> Iterator[None]:
    """Lend a seeded global generator and one thread, and give both back.

    One thread makes the result independent of the number of cores, and the tensors are too small
    to share: with two threads on a busy machine the fit took 200 seconds instead of 7.
    """
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPUs' too
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def _upscale(scans: Tensor, *, size: int) -> Tensor:
    large = F.interpolate(scans[:, None], (size, size), mode="bicubic", align_corners=False)
    return large[:, 0].clamp(0, 1)


def _train(
    judge: DigitJudge, digits: Tensor, labels: Tensor, *, num_steps: int, batch_size: int
) -> None:
    """Minimize the cross-entropy on augmented windows; draws from the global generator."""
    rng = torch.default_generator
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=num_steps)
    order = torch.cat(
        [torch.randperm(len(digits)) for _ in range(-(-num_steps * batch_size // len(digits)))]
    )
    for chosen in order.split(batch_size)[:num_steps]:
        logits = judge.head(judge.trunk(_augmented_windows(digits[chosen], rng)))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
