"""Ragged functions against loops over documents."""

import pytest
import torch

from grn_lightning.functional import (
    Stream,
    counter_uniform,
    document_index,
    document_mask,
    document_means,
    place_in_document,
    ragged_uniform,
)

LENGTHS = torch.tensor([3, 0, 1, 5])


def test_tokens_know_their_document_and_their_place():
    document, place = document_index(LENGTHS, 9), place_in_document(LENGTHS, 9)
    expected = [(d, i) for d, length in enumerate(LENGTHS.tolist()) for i in range(length)]
    assert [*zip(document.tolist(), place.tolist(), strict=True)] == expected


@pytest.mark.parametrize("has_prefix", [False, True])
def test_the_mask_is_its_definition(has_prefix):
    document = document_index(LENGTHS, 9)
    is_text = place_in_document(LENGTHS, 9) < 2
    mask = document_mask(document, is_text if has_prefix else None)
    for query in range(9):
        for key in range(9):
            sees = bool(document[query] == document[key])
            if has_prefix and is_text[query]:
                sees = sees and bool(is_text[key])
            assert mask[query, key] == sees


@pytest.mark.parametrize("stream", [Stream.INITIAL, Stream.KEEP])
def test_the_noise_of_a_document_depends_on_seed_and_sample_alone(stream):
    index = torch.tensor([5, 2**40 + 3, 0, -7])
    sizes = torch.tensor([6, 1, 8, 13])
    u, starts = ragged_uniform(index, sizes, seed=2**40 + 9, stream=stream)
    for sample, start, size in zip(index, starts, sizes, strict=True):
        expected = counter_uniform(
            sample[None], seed=2**40 + 9, step=0, stream=stream, shape=(int(size),)
        )
        assert torch.equal(u[start : start + size], expected[0])


def test_means_of_documents():
    values, document = torch.randn(9), document_index(LENGTHS, 9)
    means = document_means(values, document, 4)
    assert means[1].isnan()  # it has no token
    for d, part in enumerate(values.split(LENGTHS.tolist())):
        if len(part):
            torch.testing.assert_close(means[d], part.mean())
