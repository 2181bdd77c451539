"""The stages of coarse-to-fine prediction: targets, leaks, learning, and joining the stages."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.coarse_to_fine import (
    LitFine,
    LitRaster,
    SplitConfig,
    load_coarse_to_fine,
    load_stage,
)
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.clusters import Clusters, ClustersInfo, fit_latents, write_clusters
from grn_lightning.models.code_transformer import BackboneConfig
from grn_lightning.models.hashes import weights_hash
from tests.tiny_runs import (
    TINY_ENCODER,
    callback,
    checkpoints,
    fit,
    logged,
    run_config,
    source,
    tensors_equal,
)

BACKBONE = {"depth": 2, "width": 32, "num_heads": 2, "mlp_width": 64, "dropout": 0.0}
SPLITS = {
    "none": None,
    "prefix": {"coarse_rounds": 1},
    "joint": {"coarse_rounds": 1, "is_joint": True},
}


def build(kind: type, tokenizer: Path, split: Any = None, **rest: Any) -> Any:
    """A stage with weights that matter, in evaluation mode."""
    torch.manual_seed(0)
    module = kind(
        BackboneConfig(**rest.pop("backbone", BACKBONE)),
        str(tokenizer),
        grid_size=(2, 2),
        split=split,
        **({"num_classes": 10} | rest),
    )
    module.configure_model()
    for parameter in module.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def stage_config(
    folder: Path, digits: Path, tokenizer: Path, *, role: str, split: Any, **rest: Any
) -> dict[str, Any]:
    init_args = {
        "backbone": BACKBONE,
        "tokenizer": str(tokenizer),
        "grid_size": [2, 2],
        "split": split,
        "num_classes": 10,
        "optim": {"name": "muon", "lr": 3e-3, "warmup_samples": 16},
        **rest.pop("init_args", {}),
    }
    sources = rest.pop("sources", [source(digits, "image", 4)])
    return run_config(
        folder, model=f"coarse_to_fine.{role}", init_args=init_args, sources=sources, **rest
    )


@pytest.fixture(scope="module")
def batch(digits: Path) -> Any:
    data = ShardData(
        **run_config(digits, model="", init_args={}, sources=[source(digits, "image", 6)])["data"][
            "init_args"
        ]
    )
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@torch.no_grad()
def test_both_stages_learn_the_parts_of_the_same_codes(tokenizer_run, batch):
    codes = load_tokenizer(tokenizer_run).tokenize(batch["clips"]).squeeze(2)
    raster = build(LitRaster, tokenizer_run, SplitConfig(coarse_rounds=1))
    fine = build(LitFine, tokenizer_run, SplitConfig(coarse_rounds=1))
    labels, index = batch["class_labels"], batch["sample_index"]
    _, coarse = raster._predict(codes, labels, index)
    _, rest = fine._predict(codes, labels, index)
    assert torch.equal(fine.split.join(coarse, rest), codes)
    assert torch.equal(coarse, codes >> 1)
    baseline = build(LitRaster, tokenizer_run)
    assert torch.equal(baseline._predict(codes, labels, index)[1], codes)


@torch.no_grad()
def test_stage_2_does_not_see_its_targets(tokenizer_run, batch):
    fine = build(LitFine, tokenizer_run, SplitConfig(coarse_rounds=1))
    codes, labels = fine.tokenize(batch["clips"]), batch["class_labels"]
    before = fine._predict(codes, labels, batch["sample_index"])[0]
    after = fine._predict(codes ^ 1, labels, batch["sample_index"])[0]  # other fine bits
    assert torch.equal(before, after)
    other = fine._predict(codes ^ 2, labels, batch["sample_index"])[0]  # other coarse bits
    assert not torch.equal(before, other)


@pytest.mark.parametrize(
    ("kind", "backbone"), [(LitRaster, {"channel_depth": 1}), (LitFine, {"dropout": 0.3})]
)
def test_activation_checkpointing_saves_memory_and_nothing_else(
    kind, backbone, tokenizer_run, batch
):
    gradients, sizes = [], []
    for is_on in (False, True):
        options = {"activation_checkpointing": is_on, "backbone": BACKBONE | backbone}
        stage = build(kind, tokenizer_run, {"coarse_rounds": 1}, **options)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        stage.train()
        torch.manual_seed(1)
        codes = stage.tokenize(batch["clips"])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits, targets = stage._predict(codes, batch["class_labels"], batch["sample_index"])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 3), targets.flatten())
        sizes.append(sum(kept.values()))
        loss.backward()
        gradients.append({n: p.grad for n, p in stage.network.named_parameters()})
    assert sizes[1] < 0.7 * sizes[0]
    assert tensors_equal(*gradients)


def test_codes_of_another_size_are_refused_by_the_setting(tokenizer_run, batch):
    stage = build(LitRaster, tokenizer_run)
    stage.grid_size = (4, 4)
    sentence = r"`model.grid_size` must be the map of codes .*, \[2, 2\], got \[4, 4\]"
    with pytest.raises(ValueError, match=sentence):
        stage.tokenize(batch["clips"])
    codes = torch.zeros(1, 4, 1, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=sentence):
        stage._elements_of_codes({"codes": codes, "tokenizer_hash": stage.tokenizer_hash})


@torch.no_grad()
def test_coarse_noise_disturbs_training_alone_and_by_its_share(tokenizer_run, batch):
    fine = build(LitFine, tokenizer_run, SplitConfig(coarse_rounds=1), coarse_noise=0.5)
    coarse = torch.zeros(400, 4, 2, 2, dtype=torch.long)
    index = torch.arange(400)
    assert torch.equal(fine._disturbed(coarse, index), coarse)
    fine.train()
    noisy = fine._disturbed(coarse, index)
    assert noisy.float().mean() == pytest.approx(0.25, abs=0.02)  # half of the noise is right
    assert torch.equal(fine._disturbed(coarse[7:9], index[7:9]), noisy[7:9])


@torch.no_grad()
def test_latent_clusters_of_another_tokenizer_are_refused(tokenizer_run, batch, tmp_path):
    tokenizer = load_tokenizer(tokenizer_run)
    clusters = fit_latents(tokenizer, tokenizer.tokenize(batch["clips"]), num_clusters=3)
    write_clusters(tmp_path / "mine", clusters)
    fine = build(LitFine, tokenizer_run, SplitConfig(clusters=str(tmp_path / "mine")))
    assert fine.split.coarse_sizes == (1, 3)
    assert fine.split.fine_sizes == (4, 4)
    foreign = ClustersInfo(kind="latents", tokenizer_hash="other", num_rounds=2)
    write_clusters(tmp_path / "theirs", Clusters(foreign, clusters.centroids, clusters.sizes))
    mine = weights_hash(tokenizer)
    with pytest.raises(ValueError, match=f"belong to tokenizer other, .* is {mine}"):
        build(LitRaster, tokenizer_run, SplitConfig(clusters=str(tmp_path / "theirs")))


@pytest.fixture(scope="module")
def stages(digits, tokenizer_run, tmp_path_factory) -> dict[str, Path]:
    """Trained stage 1 and stage 2, and a captioned baseline, each for a few steps."""
    folders = {}
    texts = {"num_classes": None, "text_encoder": TINY_ENCODER}
    for name, role, split, init_args in (
        ("raster", "LitRaster", SPLITS["prefix"], {}),
        ("fine", "LitFine", SPLITS["prefix"], {}),
        ("baseline", "LitRaster", None, texts),
    ):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        config = stage_config(
            folder,
            digits,
            tokenizer_run,
            role=role,
            split=split,
            init_args=init_args,
            callbacks=[callback("EMA", decay=0.5), checkpoints(folder, 2)],
            trainer={"val_check_interval": 2},
        )
        fit(folder, config)
    return folders


def test_the_first_bits_are_those_of_a_uniform_guess_and_then_fewer(stages):
    for name, bits in (("raster", 4.0), ("fine", 4.0), ("baseline", 8.0)):
        losses = logged(stages[name], "train/bits_per_position")
        assert float(losses[0]) == pytest.approx(bits, rel=1e-5)
        validated = [*map(float, logged(stages[name], "val/bits_per_position").values())]
        assert validated[-1] < bits


def test_trained_stages_draw_what_both_have_learned(stages):
    pipeline = load_coarse_to_fine(stages["raster"], stages["fine"])
    labels, index = torch.tensor([3, 5]), torch.tensor([0, 1])
    drawn = pipeline.draw(labels, index)
    assert drawn.clips.shape == (2, 3, 1, 16, 16)
    assert torch.equal(drawn.codes >> 1, drawn.coarse)
    averaged, last = (
        load_stage(stages["raster"]),
        torch.load(stages["raster"] / "checkpoints" / "last.ckpt", weights_only=True),
    )
    plain = {
        n.removeprefix("network."): v
        for n, v in last["state_dict"].items()
        if n.startswith("network.")
    }
    assert not tensors_equal(averaged.network.state_dict(), plain)

    captioned = load_coarse_to_fine(stages["baseline"])
    prompts = captioned.condition({"captions": ["the digit three", "the digit five"]})
    texts = captioned.draw(prompts, index)
    assert texts.codes.shape == (2, 4, 2, 2)


def test_stages_that_do_not_fit_are_refused(stages, generator_runs):
    with pytest.raises(ValueError, match="got LitFine and NoneType"):
        load_coarse_to_fine(stages["fine"])
    with pytest.raises(ValueError, match="both stages must have one split"):
        load_coarse_to_fine(stages["baseline"], stages["fine"])
    with pytest.raises(ValueError, match="no checkpoint of a stage of coarse-to-fine"):
        load_stage(generator_runs["class"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_interrupted_run_goes_on_bit_for_bit(stages, digits, tokenizer_run, tmp_path):
    config = stage_config(
        tmp_path,
        digits,
        tokenizer_run,
        role="LitFine",
        split=SPLITS["prefix"],
        callbacks=[callback("EMA", decay=0.5), checkpoints(tmp_path, 2)],
        trainer={"val_check_interval": 2},
    )
    half = stages["fine"] / "checkpoints" / "step=2.ckpt"
    fit(tmp_path, config, "--ckpt_path", half)
    whole, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (stages["fine"], tmp_path)
    )
    assert tensors_equal(whole["state_dict"], resumed["state_dict"])
    assert whole["samples_seen"] == resumed["samples_seen"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("role", ["LitRaster", "LitFine"])
def test_four_samples_are_learned_by_heart(role, digits, tokenizer_run, tmp_path):
    config = stage_config(
        tmp_path,
        digits,
        tokenizer_run,
        role=role,
        split=SPLITS["prefix"] if role == "LitFine" else None,
        init_args={"cache_codes": True, "condition_dropout": 0.0},
        sources=[source(digits, "image", 4, max_samples=4)],
        trainer={"max_steps": 100},
    )
    fit(tmp_path, config)
    losses = [float(v) for v in logged(tmp_path, "train/loss").values()]
    assert losses[-1] < 0.1 < math.log(2) / 2 < losses[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": None}, "one of `num_classes` and `text_encoder`"),
        ({"text_encoder": TINY_ENCODER}, "one of `num_classes` and `text_encoder`"),
        ({"condition_dropout": 2.0}, r"must be in \[0, 1\], got 2.0"),
        ({"num_classes": -1}, "`num_classes` must be at least 1, got -1"),
        ({"grid_size": (0, 4)}, r"`grid_size` must be positive, got \(0, 4\)"),
        ({"backbone": "digitz"}, "`model.backbone`: unknown variant 'digitz'; known are"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, match):
    usual = {"backbone": "digits", "tokenizer": "nowhere", "grid_size": (2, 2), "num_classes": 10}
    with pytest.raises(ValueError, match=match):
        LitRaster(**usual | options)
    with pytest.raises(ValueError, match="one of `clusters` and `coarse_rounds` must be given"):
        SplitConfig()
