"""HBQ: one pass against the rounds, codes against bits, bytes against one long string of bits."""

import pytest
import torch

from grn_lightning.functional.hbq import (
    TARGETS,
    bit_statistics,
    bits_to_codes,
    codes_to_bits,
    codes_to_elements,
    element_sizes,
    elements_to_codes,
    hbq_decode,
    hbq_encode,
    hbq_straight_through,
    pack_codes,
    unpack_codes,
)

GRIDS = {"image": (1, 3, 5), "video": (3, 2, 4), "class": (4, 4), "vector": ()}


def encode_round_by_round(z, num_rounds):
    """The definition, in float64, where every q is exact."""
    z, codes, q = z.double(), torch.zeros(z.shape, dtype=torch.long), torch.zeros(z.shape).double()
    for r in range(num_rounds):
        bit = z > q
        q = q + torch.where(bit, 1.0, -1.0) * 2.0 ** -(r + 1)
        codes = 2 * codes + bit
    return codes


def random_codes(shape, num_rounds):
    return torch.randint(2**num_rounds, shape)


def all_16_bit_floats(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def hard_float32(num_rounds):
    """Both neighbours of every bin edge, the smallest and largest numbers, signed zeros."""
    edges = torch.arange(-(2**num_rounds), 2**num_rounds + 1, dtype=torch.float32)
    edges = edges / 2**num_rounds  # all edges, and all centres too
    info = torch.finfo(torch.float32)
    smallest = torch.tensor([0.0, 2.0**-149, 3e-45, 1e-40, info.tiny, 1e-9, info.max, torch.inf])
    inf = torch.tensor(torch.inf)
    neighbours = (torch.nextafter(edges, inf), torch.nextafter(edges, -inf))
    return torch.cat((edges, *neighbours, smallest, -smallest, torch.tensor([torch.nan])))


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_equals_the_rounds_for_every_number_of_16_bits(dtype, num_rounds):
    z = all_16_bit_floats(dtype)  # the infinities and NaN included
    expected = encode_round_by_round(z, num_rounds)
    torch.testing.assert_close(hbq_encode(z, num_rounds=num_rounds), expected)


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_encode_equals_the_rounds_for_easy_and_hard_float32(num_rounds):
    random_bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    z = torch.cat((torch.rand(100_000) * 2.2 - 1.1, random_bits, hard_float32(num_rounds)))
    expected = encode_round_by_round(z, num_rounds)
    torch.testing.assert_close(hbq_encode(z, num_rounds=num_rounds), expected)
    torch.testing.assert_close(hbq_encode(z.double(), num_rounds=num_rounds), expected)


def test_outside_and_undefined_latents_get_the_outermost_codes():
    z = torch.tensor([-torch.inf, -7.0, 7.0, torch.inf, torch.nan])
    assert hbq_encode(z, num_rounds=4).tolist() == [0, 0, 15, 15, 0]


def test_known_codes_of_four_rounds():
    z = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 0.3, -0.7, 1e-9])
    assert hbq_encode(z, num_rounds=4).tolist() == [7, 11, 3, 15, 0, 10, 2, 8]
    values = hbq_decode(torch.tensor([7, 10, 2]), num_rounds=4)
    assert values.tolist() == [-1 / 16, 0.3125, -0.6875]


@pytest.mark.parametrize("num_rounds", [1, 2, 4, 8, 16])
def test_every_code_survives_decode_then_encode(num_rounds):
    codes = torch.arange(2**num_rounds)
    z_hat = hbq_decode(codes, num_rounds=num_rounds)
    torch.testing.assert_close(hbq_encode(z_hat, num_rounds=num_rounds), codes)
    # Odd multiples of 2^-M, exactly.
    assert (z_hat.double() * 2**num_rounds).tolist() == (2 * codes - 2**num_rounds + 1).tolist()


@pytest.mark.parametrize("num_rounds", [1, 3, 4, 8])
def test_quantization_error_is_at_most_half_a_bin(num_rounds):
    z = torch.cat((torch.linspace(-1, 1, 4097), torch.rand(1000) * 2 - 1)).double()
    z_hat = hbq_decode(hbq_encode(z, num_rounds=num_rounds), num_rounds=num_rounds)
    assert (z_hat - z).abs().max() <= 2.0**-num_rounds


def test_decode_is_the_signed_sum_of_the_bits():
    codes = random_codes((2, 3, 4, 4), num_rounds=5)
    bits = codes_to_bits(codes, num_rounds=5).unflatten(1, (5, 3))
    halves = 2.0 ** -torch.arange(1.0, 6.0).view(5, 1, 1, 1)
    expected = ((2 * bits - 1) * halves).sum(1)
    torch.testing.assert_close(hbq_decode(codes, num_rounds=5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_straight_through_has_the_value_of_the_centre_and_the_gradient_of_the_identity(dtype):
    z = (torch.rand(2, 4, 3, 3) * 2 - 1).to(dtype).requires_grad_()
    z_hat = hbq_straight_through(z, num_rounds=4)
    centres = hbq_decode(hbq_encode(z.detach(), num_rounds=4), num_rounds=4)
    torch.testing.assert_close(z_hat, centres.to(dtype), rtol=0, atol=0)
    weights = torch.randn_like(z)
    (z_hat * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights, rtol=0, atol=0)


def test_straight_through_keeps_the_precision_of_autocast():
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = linear(torch.rand(2, 4)).tanh()
        z_hat = hbq_straight_through(z, num_rounds=4)
    assert z_hat.dtype == z.dtype == torch.bfloat16
    z_hat.float().sum().backward()
    assert linear.weight.grad.abs().max() > 0


def test_straight_through_does_not_hide_a_broken_latent():
    z = torch.tensor([torch.nan, torch.inf, 0.0])
    assert hbq_straight_through(z, num_rounds=4).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_bits_are_round_major_most_significant_first(grid):
    m, d = 3, 2
    codes = random_codes((2, d, *grid), m)
    bits = codes_to_bits(codes, num_rounds=m)
    assert bits.shape == (2, m * d, *grid)
    for r in range(m):
        for c in range(d):
            expected = codes[:, c].clone().apply_(lambda k, r=r: int(f"{k:03b}"[r]))
            torch.testing.assert_close(bits[:, r * d + c], expected)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("num_rounds", [1, 4, 16])
def test_bits_and_codes_are_inverse(num_rounds, grid):
    codes = random_codes((2, 3, *grid), num_rounds)
    bits = codes_to_bits(codes, num_rounds=num_rounds)
    torch.testing.assert_close(bits_to_codes(bits, num_rounds=num_rounds), codes)
    torch.testing.assert_close(
        bits_to_codes(bits.to(torch.uint8), num_rounds=num_rounds), codes
    )  # bits may come in any integer type


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_elements_and_codes_are_inverse_and_sized_as_announced(grid, target):
    codes = random_codes((2, 3, *grid), 4)
    elements = codes_to_elements(codes, num_rounds=4, target=target)
    num_elements, alphabet_size = element_sizes(3, num_rounds=4, target=target)
    assert elements.shape == (2, num_elements, *grid)
    assert elements.dtype == torch.long
    assert 0 <= elements.min() <= elements.max() < alphabet_size
    torch.testing.assert_close(elements_to_codes(elements, num_rounds=4, target=target), codes)


def test_published_sizes_of_a_generator():
    assert element_sizes(16, num_rounds=4, target="index") == (16, 16)
    assert element_sizes(64, num_rounds=4, target="bit") == (256, 2)


def pack_as_one_string(codes, num_rounds):
    string = "".join(f"{k:0{num_rounds}b}" for k in codes.flatten().tolist())
    string += "0" * (-len(string) % 8)
    return [int(string[i : i + 8], 2) for i in range(0, len(string), 8)]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3, 5), (1, 4, 2, 3, 3)])
@pytest.mark.parametrize("num_rounds", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_packed_codes_are_one_string_of_bits(num_rounds, shape):
    codes = random_codes(shape, num_rounds)
    packed = pack_codes(codes, num_rounds=num_rounds)
    assert packed.tolist() == pack_as_one_string(codes, num_rounds)
    unpacked = unpack_codes(packed, shape=shape, num_rounds=num_rounds)
    torch.testing.assert_close(unpacked, codes)


@pytest.mark.parametrize("grid", [(1, 3, 5), (4, 4)])
def test_bit_statistics_equal_a_loop_over_channels(grid):
    m, d = 3, 4
    codes = random_codes((2, d, *grid), m)
    codes[:, 0] = 5  # a channel without life
    codes[:, 1] &= 3  # a channel whose coarsest bit never rises
    found = bit_statistics(codes, num_rounds=m)
    for r in range(m):
        bits = ((codes >> (m - 1 - r)) & 1).double()
        ones = [bits[:, c].mean() for c in range(d)]
        entropies = [-sum(q * q.log2() for q in (p, 1 - p) if q > 0) for p in ones]
        assert found.ones_fraction[r].item() == pytest.approx(float(sum(ones)) / d)
        assert found.entropy[r].item() == pytest.approx(float(sum(entropies)) / d, abs=1e-6)
        assert found.dead_fraction[r].item() == sum(p in (0, 1) for p in ones) / d
    assert found.dead_fraction[0] == 0.5


def test_balanced_bits_have_one_bit_of_entropy():
    codes = torch.arange(16).view(1, 1, 4, 4)
    found = bit_statistics(codes, num_rounds=4)
    torch.testing.assert_close(found.ones_fraction, torch.full((4,), 0.5))
    torch.testing.assert_close(found.entropy, torch.ones(4))
    torch.testing.assert_close(found.dead_fraction, torch.zeros(4))


def test_refusals_name_what_is_allowed():
    codes = torch.zeros(1, 3, dtype=torch.long)
    for num_rounds in (0, 17):
        with pytest.raises(ValueError, match=r"num_rounds must be in 1\.\.16, got"):
            hbq_encode(torch.zeros(1), num_rounds=num_rounds)
    with pytest.raises(ValueError, match="target must be one of index, bit, got 'bits'"):
        codes_to_elements(codes, num_rounds=4, target="bits")
    with pytest.raises(ValueError, match="multiple of num_rounds=2, got 3"):
        bits_to_codes(codes, num_rounds=2)
    for code in (-1, 16):
        with pytest.raises(ValueError, match=r"codes must be in 0\.\.15 for num_rounds=4"):
            pack_codes(torch.tensor([0, code]), num_rounds=4)
    packed = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="take 2 bytes, got 3"):
        unpack_codes(packed, shape=(1, 4), num_rounds=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_rounds", [1, 4, 8])
def test_a_gpu_quantizes_as_the_cpu_does(num_rounds):
    for z in (all_16_bit_floats(torch.bfloat16), hard_float32(num_rounds)):
        found = hbq_encode(z.cuda(), num_rounds=num_rounds).cpu()
        torch.testing.assert_close(found, hbq_encode(z, num_rounds=num_rounds))
