"""What the two stages must obey whatever they learn: first losses, degenerate clusters, the oracle.

The codebook is real and small, its clusters are given, and the losses are those of training.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.functional import token_cross_entropy
from grn_lightning.lit import coarse_to_fine, code_stage
from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster
from grn_lightning.models.clusters import Clusters, ClustersInfo
from grn_lightning.models.code_transformer import BackboneConfig
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.samplers.coarse_to_fine import DrawConfig, draw_fine

NUM_CODES = 12
VQ = VQTokenizerConfig(
    codebook_size=NUM_CODES, codebook_dim=3, width=32, width_multipliers=(1, 1), feature_width=4
)
BACKBONE = BackboneConfig(depth=2, width=32, num_heads=2, mlp_width=64, dropout=0.0)
UNEVEN = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3])
EVEN = torch.arange(NUM_CODES) // 3
Build = Callable[..., Any]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds a stage over given clusters, with weights as they start, or random ones of `std`."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQ).eval()
    monkeypatch.setattr(code_stage, "load_tokenizer", lambda path: tokenizer)
    known: dict[str, Clusters] = {}
    monkeypatch.setattr(coarse_to_fine, "read_clusters", lambda path, **_: known[path])

    def stage(kind: type, cluster_of: Tensor | None, std: float | None = None, **rest: Any) -> Any:
        if cluster_of is not None:
            count = int(cluster_of.max()) + 1
            info = ClustersInfo(kind="codewords", tokenizer_hash="any")
            sizes = cluster_of.bincount()
            known["here"] = Clusters(info, torch.zeros(count, 3), sizes, cluster_of)
            rest["split"] = {"clusters": "here"}
        torch.manual_seed(1)
        grid_size = rest.pop("grid_size", (2, 2))
        module = kind(BACKBONE, "any", grid_size=grid_size, num_classes=5, **rest)
        module.configure_model()
        for parameter in module.network.parameters() if std else ():
            torch.nn.init.normal_(parameter, std=std)
        return module.eval()

    return stage


@torch.no_grad()
def loss_of(stage: Any, codes: Tensor) -> Tensor:
    index = torch.arange(len(codes))
    return token_cross_entropy(*stage._predict(codes, index % 5, index))


def some_codes(count: int = 50) -> Tensor:
    return torch.randint(NUM_CODES, (count, 1, 2, 2), generator=torch.Generator().manual_seed(0))


def test_first_losses_are_those_of_knowing_nothing(build):
    codes = some_codes()
    assert loss_of(build(LitRaster, None), codes).mean() == pytest.approx(math.log(NUM_CODES))
    assert loss_of(build(LitRaster, UNEVEN), codes).mean() == pytest.approx(math.log(4))
    unmasked = build(LitFine, UNEVEN, fine_mask="none")
    assert loss_of(unmasked, codes).mean() == pytest.approx(math.log(NUM_CODES))
    log_sizes = UNEVEN.bincount()[UNEVEN[codes]].log().mean()
    assert loss_of(build(LitFine, UNEVEN), codes).mean() == pytest.approx(float(log_sizes))


def test_clusters_of_one_code_leave_stage_2_nothing_and_stage_1_everything(build):
    codes, each = some_codes(), torch.arange(NUM_CODES)
    assert torch.equal(loss_of(build(LitFine, each, std=0.3), codes), torch.zeros(len(codes)))
    one, plain = (build(LitRaster, c, std=0.3) for c in (each, None))
    assert torch.equal(loss_of(one, codes), loss_of(plain, codes))


@torch.no_grad()
def test_a_single_cluster_leaves_stage_1_nothing_and_stage_2_the_class(build):
    codes, all_in_one = some_codes(), torch.zeros(NUM_CODES, dtype=torch.long)
    zeros = torch.zeros(len(codes))
    assert torch.equal(loss_of(build(LitRaster, all_in_one, std=0.3), codes), zeros)
    fine = build(LitFine, all_in_one, std=0.3)
    index = torch.zeros(len(codes), dtype=torch.long)
    logits, targets = fine._predict(codes, index, index)
    assert torch.equal(targets, codes)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))  # whatever the codes are
    other, _ = fine._predict(codes, index + 1, index)
    assert not torch.allclose(logits, other)


@pytest.mark.parametrize(
    ("fine_mask", "total", "sees_earlier"),
    [("train+sample", 1.0, False), ("train+sample", 1.0, True), ("none", None, False)],
)
def test_only_masked_stages_are_a_likelihood_of_codes(fine_mask, total, sees_earlier, build):
    """Over all maps of two positions; the rest of the mass lies where stages contradict."""
    maps = torch.tensor([*product(range(NUM_CODES), repeat=2)]).view(-1, 1, 1, 2)
    stages = (
        build(LitRaster, UNEVEN, std=0.3, grid_size=(1, 2)),
        build(
            *(LitFine, UNEVEN),
            std=0.3,
            grid_size=(1, 2),
            fine_mask=fine_mask,
            sees_earlier=sees_earlier,
        ),
    )
    index = torch.zeros(len(maps), dtype=torch.long)
    with torch.no_grad():
        nats = sum(token_cross_entropy(*s._predict(maps, index, index)) * 2 for s in stages)
    found = float(torch.exp(-nats).sum())
    if total is None:
        assert found < 0.5
    else:
        assert found == pytest.approx(total, abs=1e-5)


def coupled_codes(count: int, seed: int) -> Tensor:
    """Coarse maps at random; the member at a position is told by the cluster of the next one."""
    coarse = torch.randint(4, (count, 4), generator=torch.Generator().manual_seed(seed))
    return (3 * coarse + coarse.roll(-1, dims=1) % 3).view(-1, 1, 2, 2)


def agreeing_codes(count: int, seed: int) -> Tensor:
    """Coarse maps at random, and one member at random that all positions of a map share."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(4, (count, 4), generator=generator)
    member = torch.randint(3, (count, 1), generator=generator)
    return (3 * coarse + member).view(-1, 1, 2, 2)


def train(stage: Any, codes_of: Callable[[int, int], Tensor], num_steps: int) -> None:
    """Some steps of Adam on the loss of the stage."""
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=1e-2)
    index = torch.arange(128)
    for step in range(num_steps):
        loss = token_cross_entropy(*stage._predict(codes_of(128, 100 + step), index % 5, index))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


def test_the_control_tells_what_independence_costs(build):
    """Positions agree on a member: alone each costs ln 3, and together they do."""
    nats = {}
    for sees_earlier in (False, True):
        fine = build(LitFine, EVEN, sees_earlier=sees_earlier)
        train(fine, agreeing_codes, num_steps=80)
        nats[sees_earlier] = float(loss_of(fine, agreeing_codes(64, seed=0)).mean()) * 4
    assert nats[False] == pytest.approx(4 * math.log(3), abs=0.2)
    assert nats[True] == pytest.approx(math.log(3), abs=0.2)


def test_stage_2_on_true_coarse_maps_beats_random_members(build):
    """The oracle of coarse maps: what stage 2 draws lies nearer to the truth than any member."""
    fine = build(LitFine, EVEN)
    train(fine, coupled_codes, num_steps=120)

    truth = coupled_codes(64, seed=0)
    held_out = torch.arange(len(truth))
    coarse = fine.split.coarse(truth)
    drawn = draw_fine(
        fine.network,
        coarse,
        condition=held_out % 5,
        allowed=fine.split.allowed(coarse),
        sample_index=held_out,
        seed=0,
        config=DrawConfig(),
    )
    members = torch.randint(3, truth.shape, generator=torch.Generator().manual_seed(2))
    random = 3 * coarse + members
    words = fine.tokenizer.quantize.codewords().detach()
    error = {
        name: (words[found] - words[truth]).square().sum(-1).mean()
        for name, found in (("stage 2", drawn), ("random member", random))
    }
    assert (drawn == truth).float().mean() > 0.8 > 0.5 > (random == truth).float().mean()
    assert error["stage 2"] < 0.4 * error["random member"]
    assert torch.equal(EVEN[drawn], coarse)
    _assert_nothing_is_left_to_learn_from_targets(fine, truth, held_out)


@torch.no_grad()
def _assert_nothing_is_left_to_learn_from_targets(fine: Any, truth: Tensor, index: Tensor) -> None:
    """Other members of the same clusters do not change a prediction."""
    others = 3 * (truth // 3) + (truth + 1) % 3
    before, after = (fine._predict(codes, index % 5, index)[0] for codes in (truth, others))
    assert torch.equal(before, after)
