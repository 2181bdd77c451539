"""Coarse and fine labels: a map, its inverse, and one likelihood."""

import math

import pytest
import torch

from grn_lightning.functional import (
    cluster_members,
    gather_member_logits,
    mask_fine_logits,
    member_mask,
    truncate_logits,
)

CLUSTER_OF = torch.tensor([2, 0, 1, 2, 2, 0])


def test_every_code_is_a_member_of_its_cluster_and_of_no_other():
    members = cluster_members(CLUSTER_OF, num_clusters=3)
    listed = [[code for code in row if code >= 0] for row in members.tolist()]
    assert listed == [[1, 5], [2], [0, 3, 4]]
    assert sorted(sum(listed, [])) == list(range(6))


@pytest.mark.parametrize(
    ("cluster_of", "match"),
    [([0, 2], r"1 have none: \[1\]"), ([0, 3], r"in \[0, 3\)"), ([-1, 0], r"in \[0, 3\)")],
)
def test_maps_with_holes_are_refused(cluster_of, match):
    with pytest.raises(ValueError, match=match):
        cluster_members(torch.tensor(cluster_of), num_clusters=3)


def test_masked_stages_are_one_likelihood_over_all_codes_and_unmasked_ones_are_not():
    torch.manual_seed(0)
    coarse_logits, fine_logits = torch.randn(3), torch.randn(3, 6)  # fine logits per coarse label
    labels = torch.arange(3)
    masked = mask_fine_logits(fine_logits, labels, CLUSTER_OF).softmax(-1)
    free = fine_logits.softmax(-1)
    coarse = coarse_logits.softmax(-1)

    def total(fine):
        return sum(coarse[CLUSTER_OF[code]] * fine[CLUSTER_OF[code], code] for code in range(6))

    assert total(masked).item() == pytest.approx(1.0, abs=1e-6)
    assert total(free) < 0.8


def test_members_alone_have_the_distribution_of_the_masked_codebook():
    torch.manual_seed(0)
    logits, coarse = torch.randn(4, 5, 6), torch.randint(3, (4, 5))
    members = cluster_members(CLUSTER_OF, num_clusters=3)
    gathered = gather_member_logits(logits, coarse, members).softmax(-1)
    masked = mask_fine_logits(logits, coarse, CLUSTER_OF).softmax(-1)
    scattered = torch.zeros_like(masked).scatter_add(
        -1, members[coarse].clamp(min=0), gathered.masked_fill(members[coarse] < 0, 0)
    )
    torch.testing.assert_close(scattered, masked)
    assert (member_mask(coarse, CLUSTER_OF) == (masked > 0)).all()


def slow_truncation(row, top_k, top_p):
    """Walk down the sorted values."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    kept = order[: top_k or len(order)]
    total = sum(math.exp(row[i]) for i in kept)
    chosen, probability = [], 0.0
    for i in kept:
        if chosen and probability >= top_p:
            break
        chosen.append(i)
        probability += math.exp(row[i]) / total
    return [row[i] if i in chosen else -math.inf for i in range(len(row))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_truncation_keeps_what_a_walk_down_the_sorted_values_keeps(top_k, top_p):
    torch.manual_seed(top_k)
    logits = torch.randn(20, 7).double()
    expected = [slow_truncation(row, top_k, top_p) for row in logits.tolist()]
    result = truncate_logits(logits, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(result, torch.tensor(expected).double())


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_truncation_to_nothing_is_refused(options):
    with pytest.raises(ValueError, match=r"top_k must be at least 0 and top_p in \(0, 1\]"):
        truncate_logits(torch.zeros(3), **options)
