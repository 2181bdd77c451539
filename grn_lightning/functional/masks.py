"""Masks of pixels: what they mean for a latent map, and how soft their edges are.

True marks pixels that are to be drawn anew. Time is causal as in the tokenizer: the first frame has
a latent frame of its own, each later one stands for ``temporal_stride`` frames.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Spread True ``radius`` places in every direction of the last two axes."""
    side = 2 * radius + 1
    return F.max_pool2d(mask.float().flatten(0, -3), side, stride=1, padding=radius).view_as(mask)


def latent_mask(
    mask: Bool[Tensor, "b f h w"], *, temporal_stride: int, spatial_stride: int, grow: int = 0
) -> Bool[Tensor, "b f_latent h_latent w_latent"]:
    """Return the latent positions that stand for at least one pixel of the mask.

    Args:
        mask: True where pixels are drawn anew, ``1 + temporal_stride * k`` frames.
        temporal_stride: Frames per latent frame behind the first.
        spatial_stride: Pixels per position, down and across.
        grow: Positions by which the mask is spread in space. A decoder looks at its neighbours, so
            that pixels beside the mask depend on positions in it, and the other way round.

    Raises:
        ValueError: If a side does not fit its stride.

    Example:
        >>> mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> mask[..., 0, 3] = True
        >>> latent_mask(mask, temporal_stride=1, spatial_stride=2)
        tensor([[[[False,  True],
                  [False, False]]]])
    """
    frames, height, width = mask.shape[1:]
    if (frames - 1) % temporal_stride or height % spatial_stride or width % spatial_stride:
        raise ValueError(
            f"a mask must have 1 + {temporal_stride} k frames and sides of multiples of "
            f"{spatial_stride}, got {frames} x {height} x {width}."
        )
    cells = F.max_pool2d(mask.float(), spatial_stride)
    later = cells[:, 1:].unflatten(1, (-1, temporal_stride)).amax(2) if frames > 1 else cells[:, 1:]
    latent = torch.cat([cells[:, :1], later], dim=1)
    return (_dilate(latent, grow) if grow else latent) > 0


def feather(mask: Bool[Tensor, "b f h w"], *, radius: int) -> Float[Tensor, "b f h w"]:
    """Return the weight of what is drawn: 1 in the mask, falling to 0 within ``radius`` around it.

    Args:
        mask: True where pixels are drawn anew.
        radius: Pixels over which both pictures are blended; 0 gives a hard edge.

    Returns:
        Weights in [0, 1], exactly 0 more than ``radius`` pixels away from the mask.

    Raises:
        ValueError: If ``radius`` is negative.

    Example:
        >>> feather(torch.tensor([[[[True, False, False, False]]]]), radius=1)
        tensor([[[[1.0000, 0.5000, 0.0000, 0.0000]]]])
    """
    if radius < 0:
        raise ValueError(f"radius must be at least 0, got {radius}.")
    rings = [mask.float() if r == 0 else _dilate(mask, r) for r in range(radius + 1)]
    return torch.stack(rings).mean(0)
