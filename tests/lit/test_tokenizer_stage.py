"""The tokenizer stage learns to reconstruct, and its numbers are means over held-out samples."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.checkpoints import find_checkpoint, read_checkpoint
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.tokenizer import LitTokenizer, ReconstructionLossConfig, load_tokenizer
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.variants import TOKENIZERS
from tests.tiny_runs import (
    TINY_TOKENIZER,
    call_grn,
    callback,
    fit,
    logged,
    source,
    tokenizer_config,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*used to create the checkpoint need")


def module(**settings: Any) -> LitTokenizer:
    built = LitTokenizer(TokenizerConfig(**TINY_TOKENIZER), **settings)
    built.configure_model()
    return built


def validated(folder: Path, config: dict[str, Any], *args: Any) -> dict[str, float]:
    """What `grn validate` logs."""
    trainer = call_grn("validate", "-c", write_yaml(folder, config), *args).trainer
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 2.0, 0.5), (0.5, 0.25, 0.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(weights):
    l1, l2, commitment = weights
    config = ReconstructionLossConfig(l1=l1, l2=l2, commitment=commitment)
    stage, clips = module(loss=config), torch.rand(2, 3, 5, 16, 16)
    output = stage(clips)
    losses = stage._losses(clips, output)
    difference = output.reconstruction - clips
    expected = {
        "l1": l1 * difference.abs().mean(),
        "l2": l2 * (difference**2).mean(),
        "commitment": commitment * ((output.z - output.z_hat) ** 2).mean(),
    }
    assert losses.keys() == {name for name, value in expected.items() if value}
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name])


def test_gradients_reach_every_parameter_through_the_quantizer():
    stage = module()
    output = stage(torch.rand(2, 3, 5, 16, 16))
    sum(stage._losses(torch.zeros_like(output.reconstruction), output).values()).backward()
    for name, parameter in stage.tokenizer.named_parameters():
        assert parameter.grad is not None, name
        # Zero-initialized projections pass no gradient to what comes before them, yet.
        assert parameter.grad.abs().sum() > 0 or "to_qkv" in name or "middle" in name, name


def test_commitment_pulls_latents_to_their_codes():
    """The straight-through estimate alone would give the distance no gradient."""
    stage = module(loss=ReconstructionLossConfig(commitment=1.0))
    output = stage(torch.rand(2, 3, 5, 16, 16))
    (gradient,) = torch.autograd.grad(
        stage._losses(output.reconstruction.detach(), output)["commitment"], output.z
    )
    expected = 2 * (output.z - output.z_hat) / output.z.numel()
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "weights",
    [{"l1": 0.0, "l2": 0.0}, {"l1": -1.0, "l2": 2.0}, {"commitment": -1.0},
     {"l1": 0.0, "commitment": 1.0}],
)  # fmt: skip
def test_a_loss_of_nothing_is_refused(weights):
    with pytest.raises(ValueError, match="at least 0 and l1 or l2 positive, got l1="):
        ReconstructionLossConfig(**weights)


def test_a_name_is_a_row_of_the_table():
    assert LitTokenizer("digits").tokenizer_config == TOKENIZERS["digits"]
    with pytest.raises(ValueError, match="unknown variant 'digit'; known are .*'digits'"):
        LitTokenizer("digit")


# --- validation -----------------------------------------------------------------------------------


def test_validation_does_not_depend_on_the_batch_size(digits, tokenizer_run, tmp_path):
    """Six clips and six stills; batches of 4 leave one of 2."""
    found = []
    for size in (1, 4, 6):
        folder = tmp_path / str(size)
        sources = [source(digits, media, size) for media in ("image", "video")]
        config = tokenizer_config(folder, digits, sources=sources, callbacks=[callback("EMA")])
        found.append(validated(folder, config, f"--ckpt_path={find_checkpoint(tokenizer_run)}"))
    assert {"val/psnr", "val/ssim"} < found[0].keys()
    assert any(name.startswith("codes/") for name in found[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_padding_is_not_judged(tokenizer_run):
    """A rank that runs short repeats samples with weight 0; here they are garbage."""
    stage, clips = module(init_from=str(tokenizer_run)).eval(), torch.rand(3, 3, 5, 16, 16) * 2 - 1
    batch: Any = {"clips": clips, "weights": torch.ones(3)}
    padded: Any = {
        "clips": torch.cat([clips, torch.ones_like(clips[:2])]),
        "weights": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]),
    }
    found = []
    for given in (batch, padded):
        with torch.no_grad():
            stage.validation_step(given, 0)
        found.append(
            {name: float(value) for name, value in stage.val_metrics.compute().items()}
            | {k: float(v) for k, v in stage.code_statistics.compute().scalars().items()}
        )
        stage.val_metrics.reset()
        stage.code_statistics.reset()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_validation_judges_the_average(digits, tokenizer_run, tmp_path):
    """PSNR of the loaded tokenizer, frame by frame."""
    sources = [source(digits, "video", 6)]
    config = tokenizer_config(tmp_path, digits, sources=sources, callbacks=[callback("EMA")])
    found = validated(tmp_path, config, f"--ckpt_path={find_checkpoint(tokenizer_run)}")

    data = ShardData(**config["data"]["init_args"])
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        output = load_tokenizer(tokenizer_run)(batch["clips"])
    frames = ((output.reconstruction.clamp(-1, 1) - batch["clips"]) / 2).square().mean((1, 3, 4))
    expected = (-10 * frames.log10()).mean()
    assert found["val/psnr"] == pytest.approx(float(expected), rel=1e-4)


# --- checkpoints and logs -------------------------------------------------------------------------


def test_a_checkpoint_holds_the_network_and_nothing_else(tokenizer_run):
    state = read_checkpoint(tokenizer_run)["state_dict"]
    assert state.keys() == {
        f"tokenizer.{name}" for name in load_tokenizer(tokenizer_run).state_dict()
    }


def test_every_step_is_logged(tokenizer_run):
    for name in ("train/loss", "train/loss_l1", "train/quantization_error", "train/grad_norm"):
        values = [float(value) for value in logged(tokenizer_run, name).values()]
        assert len(values) == 4
        assert all(math.isfinite(value) and value > 0 for value in values)


# --- training is real -----------------------------------------------------------------------------


@pytest.mark.slow
def test_four_clips_are_learned_by_heart(digits, tmp_path):
    """From 0.95 (everything gray) to below 0.03: every stroke and its motion are there."""
    config = tokenizer_config(
        tmp_path,
        digits,
        sources=[source(digits, "video", 4, max_samples=4)],
        data={"loader": {"cache_decoded": True}},
        init_args={
            "tokenizer": TINY_TOKENIZER | {"latent_channels": 16, "num_rounds": 4},
            "optim": {"name": "muon", "lr": 3e-3, "schedule": "linear", "decay_fraction": 0.5},
        },
        trainer={"max_steps": 240, "log_every_n_steps": 10},
    )
    fit(tmp_path, config)
    losses = [float(value) for value in logged(tmp_path, "train/loss").values()]
    assert losses[0] > 0.3
    assert losses[-1] < 0.03, losses


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_twenty_steps_on_stills_and_clips_lower_the_loss(name, digits, tmp_path):
    config = tokenizer_config(
        tmp_path, digits, init_args={"optim": {"name": name, "lr": 3e-3}}, trainer={"max_steps": 20}
    )
    fit(tmp_path, config)
    losses = [float(value) for value in logged(tmp_path, "train/loss").values()]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
