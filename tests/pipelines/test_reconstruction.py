"""Frames of any size come back at their size; tiles and chunks are bookkeeping."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from grn_lightning.media.images import to_float, to_uint8
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines.reconstruction import Reconstruction, cut_chunks, plan_tiles
from tests.tiny_runs import TINY_TOKENIZER

STRIDE = 8  # of the tiny tokenizer, in pixels; 2 in frames


@pytest.fixture(scope="module")
def tokenizer() -> HBQTokenizer:
    """A random one, whose past taps are at work."""
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER))
    for parameter in tokenizer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return tokenizer.eval().requires_grad_(False)


class Mirror(torch.nn.Module):
    """Stands for a perfect tokenizer: what goes in comes out."""

    def __init__(self, like: HBQTokenizer) -> None:
        super().__init__()
        self.config, self.conv2 = like.config, like.conv2
        self.sizes: list[tuple[int, ...]] = []

    def encode_chunks(self, chunks):  # type: ignore[no-untyped-def]
        for chunk in chunks:
            self.sizes.append(tuple(chunk.shape))
            yield chunk

    decode_chunks = encode_chunks

    def quantize(self, z: Tensor) -> Tensor:
        return z

    def dequantize(self, z: Tensor) -> Tensor:
        return z


def noise(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def through(tokenizer: object, clip: Tensor, chunk_size: int = 2, **options: int) -> Tensor:
    plan = plan_tiles(*clip.shape[-2:], stride=STRIDE, **options)
    job = Reconstruction(tokenizer, plan)  # type: ignore[arg-type]
    chunks = cut_chunks(clip, stride=2, chunk_size=chunk_size)
    return torch.cat([job(chunk) for chunk in chunks])


@pytest.mark.parametrize("shape", [(1, 3, 13, 21), (2, 3, 8, 8), (6, 3, 30, 9), (9, 3, 40, 41)])
@pytest.mark.parametrize("tile", [None, 16, 24])
def test_a_perfect_tokenizer_gives_every_pixel_back(
    tokenizer: HBQTokenizer, shape: tuple[int, ...], tile: int | None
) -> None:
    clip, mirror = noise(*shape), Mirror(tokenizer)
    options = {} if tile is None else {"tile": tile, "overlap": 8}
    assert through(mirror, clip, **options).equal(clip)
    for size in mirror.sizes:  # the tokenizer has seen only what it takes
        assert size[-1] % STRIDE == size[-2] % STRIDE == 0
        assert max(size[-2:]) <= (tile or 48)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 10])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
def test_chunks_change_nothing(tokenizer: HBQTokenizer, num_frames: int, chunk_size: int) -> None:
    clip = noise(num_frames, 3, 16, 24)
    fitting = num_frames + (num_frames + 1) % 2  # 1 + 2 k
    padded = torch.cat([clip, clip[-1:].expand(fitting - num_frames, -1, -1, -1)])
    whole = tokenizer.detokenize(tokenizer.tokenize(to_float(padded).transpose(0, 1)[None]))
    expected = to_uint8(whole[0].transpose(0, 1)[:num_frames])
    found = through(tokenizer, clip, chunk_size)
    assert (found.int() - expected.int()).abs().max() <= 1  # other kernels round otherwise


def test_padding_repeats_the_last_row_column_and_frame(tokenizer: HBQTokenizer) -> None:
    clip, seen = noise(2, 3, 7, 10), []

    class Spy(Mirror):
        def encode_chunks(self, chunks):  # type: ignore[no-untyped-def]
            for chunk in chunks:
                seen.append(chunk)
                yield chunk

    through(Spy(tokenizer), clip)
    [padded] = seen
    assert padded.shape == (1, 3, 3, 8, 16)
    assert padded[0, :, 2].equal(padded[0, :, 1])
    assert padded[..., 7, :].equal(padded[..., 6, :])
    assert padded[..., 10:].equal(padded[..., 9:10].expand(-1, -1, -1, -1, 6))


def test_tiles_cover_a_frame_and_share_what_they_should() -> None:
    for length in range(8, 400, 8):
        for tile, overlap in ((8, 0), (24, 0), (24, 8), (64, 16), (64, 56)):
            plan = plan_tiles(length, 8, stride=8, tile=tile, overlap=overlap)
            starts, side = plan.tops, plan.tile[0]
            assert starts[0] == 0
            assert starts[-1] + side == length
            assert all(start % 8 == 0 for start in starts)
            assert all(first + side - second >= overlap for first, second in pairwise(starts))


def test_bits_are_those_of_all_codes(tokenizer: HBQTokenizer) -> None:
    clip = noise(4, 3, 20, 40)
    for options, positions in (({}, 3 * 5), ({"tile": 24, "overlap": 8}, 2 * 3 * 3)):
        plan = plan_tiles(20, 40, stride=STRIDE, **options)
        job = Reconstruction(tokenizer, plan)
        for chunk in cut_chunks(clip, stride=2, chunk_size=1):
            job(chunk)
        latent_frames = 3  # 4 frames are padded to 5
        assert job.num_bits == 2 * 4 * positions * latent_frames, options


def test_tiles_that_do_not_fit_are_refused() -> None:
    for tile, overlap in ((20, 8), (24, 4), (24, 24), (24, -8)):
        with pytest.raises(ValueError, match=rf"multiples of 8.*got {tile} and {overlap}"):
            plan_tiles(64, 64, stride=8, tile=tile, overlap=overlap)
