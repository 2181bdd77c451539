"""Patches: space folded into channels, frame by frame.

The tokenizer's first and last layers work on patches. The order of the folded channels is that of
the published weights: colour slowest, then the *column* within the patch, then the row.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def patchify(
    clips: Float[Tensor, "b c f h w"], *, patch_size: int
) -> Float[Tensor, "b c*{patch_size}**2 f h//{patch_size} w//{patch_size}"]:
    """Fold every ``patch_size x patch_size`` square of a frame into channels.

    Args:
        clips: Pixels; height and width are multiples of ``patch_size``.
        patch_size: Side ``p`` of a square.

    Returns:
        Patches; row ``r``, column ``q`` of colour ``c`` is channel ``(c * p + q) * p + r``.

    Raises:
        ValueError: If height or width is no multiple of ``patch_size``.
    """
    height, width = clips.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"height and width must be multiples of patch_size={patch_size}, got "
            f"{height} x {width}; resize or crop first."
        )
    return rearrange(clips, "b c f (h r) (w q) -> b (c q r) f h w", r=patch_size, q=patch_size)


def unpatchify(
    patches: Float[Tensor, "b c f h w"], *, patch_size: int
) -> Float[Tensor, "b c//{patch_size}**2 f h*{patch_size} w*{patch_size}"]:
    """Unfold channels into squares of pixels; the inverse of `patchify`.

    Args:
        patches: Channels as made by `patchify`.
        patch_size: Side ``p`` of a square.

    Returns:
        Pixels.

    Raises:
        ValueError: If the channels are no multiple of ``patch_size**2``.
    """
    if patches.shape[1] % patch_size**2:
        raise ValueError(
            f"channels must be a multiple of patch_size**2 = {patch_size**2}, got "
            f"{patches.shape[1]}."
        )
    return rearrange(patches, "b (c q r) f h w -> b c f (h r) (w q)", r=patch_size, q=patch_size)
