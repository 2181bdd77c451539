"""What both stages share: counting samples, seeding, and what is written at a logging step."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from grn_lightning.lit.base import as_config, as_plain, require_stage
from grn_lightning.lit.callbacks import EMA
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.tokenizer import TokenizerConfig
from tests.tiny_runs import TINY_TOKENIZER, fit, generator_config, logged, source, tokenizer_config


def module_on(**trainer: Any) -> LitTokenizer:
    """A module that believes in a trainer."""
    module = LitTokenizer(TokenizerConfig(**TINY_TOKENIZER), seed=trainer.pop("seed", 0))
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    return module


# --- configurations -------------------------------------------------------------------------------


def test_a_configuration_survives_being_plain_data():
    config = OptimConfig(name="muon", lr=0.5, betas=(0.1, 0.2))
    plain = as_plain(config)
    assert type(plain) is dict
    assert as_config(OptimConfig, plain) == as_config(OptimConfig, config) == config
    assert as_config(OptimConfig, None) == OptimConfig()
    assert as_plain("a name") == "a name"


def test_every_way_to_describe_a_module_is_the_same_module():
    config = TokenizerConfig(**TINY_TOKENIZER)
    by_object, by_dict = LitTokenizer(config), LitTokenizer(TINY_TOKENIZER)  # type: ignore[arg-type]
    assert by_object.hparams == by_dict.hparams
    assert all(isinstance(v, dict | str | int | None) for v in by_object.hparams.values())


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_samples_are_counted_over_all_devices(world_size):
    module = module_on(world_size=world_size)
    for batch_size in (4, 2):
        module.count_samples(batch_size)
    assert module.samples_seen == 6 * world_size


def test_a_decay_ends_with_the_last_step(digits, tmp_path):
    """The trainer's `max_steps` times samples per step, also with sources of different size."""
    config = tokenizer_config(
        tmp_path,
        digits,
        sources=[source(digits, "image", 6), source(digits, "video", 2)],
        init_args={"optim": {"lr": 1.0, "schedule": "linear", "name": "adamw"}},
        trainer={"max_steps": 4},
    )
    trainer = fit(tmp_path, config)
    module = trainer.lightning_module
    assert isinstance(module, LitTokenizer)
    assert module._planned_samples() == module.samples_seen == 16
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.0]


def test_a_decay_counts_batches_whose_gradients_add_up(digits, tokenizer_run, tmp_path):
    config = generator_config(
        tmp_path, digits, tokenizer_run, kind="class",
        init_args={"optim": {"lr": 1.0, "schedule": "linear", "name": "adamw"}},
        trainer={"max_steps": 3, "accumulate_grad_batches": 2},
    )  # fmt: skip
    trainer = fit(tmp_path, config)
    module = trainer.lightning_module
    assert isinstance(module, LitGenerator)
    assert module._planned_samples() == module.samples_seen == 3 * 2 * 4
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.0}


# --- seeding --------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_samples_and_rank():
    def draw(seed: int, samples: int, rank: int) -> float:
        module = module_on(global_rank=rank, seed=seed)
        module.samples_seen = samples
        module.on_train_batch_start(None, 0)
        return float(torch.rand(()))

    places = [(seed, samples, rank) for seed in (0, 1) for samples in (0, 64) for rank in (0, 1)]
    drawn = [draw(*place) for place in places]
    torch.manual_seed(99)
    assert [draw(*place) for place in places] == drawn
    assert len(set(drawn)) == len(places)


# --- logging --------------------------------------------------------------------------------------


def test_what_is_logged_now_and_then_belongs_to_that_step(digits, tokenizer_run, tmp_path):
    found = {}
    for every in (1, 3):
        folder = tmp_path / f"every_{every}"
        config = generator_config(
            folder, digits, tokenizer_run, kind="class",
            trainer={"max_steps": 7, "log_every_n_steps": every, "gradient_clip_val": 1e-3},
        )  # fmt: skip
        fit(folder, config)
        found[every] = {
            name: logged(folder, name)
            for name in ("train/loss", "train/accuracy", "train/grad_norm", "train/samples_seen")
        }
    for name, always in found[1].items():
        assert list(always) == list(range(7)), name
        assert found[3][name] == {step: always[step] for step in (2, 5)}, name
    assert list(found[1]["train/samples_seen"].values()) == [f"{4.0 * n}" for n in range(1, 8)]
    # The norm is that of the gradient, not of what clipping has left of it.
    assert all(float(norm) > 0.01 for norm in found[1]["train/grad_norm"].values())


# --- refusals -------------------------------------------------------------------------------------


def test_a_checkpoint_of_something_else_is_refused():
    module = module_on()
    with pytest.raises(ValueError, match=r"not one of a LitTokenizer run: .* are \['width'\]"):
        module.on_load_checkpoint({"hyper_parameters": {"width": 3}, "state_dict": {}})
    with pytest.raises(ValueError, match=r"not one of a LitTokenizer run: .* are \[\]"):
        module.on_load_checkpoint({"state_dict": {}})


def test_a_callback_of_another_stage_is_refused():
    module = LitTokenizer(TokenizerConfig(**TINY_TOKENIZER))
    require_stage(EMA(), module, LitTokenizer)
    require_stage(EMA(), module, L.LightningModule)
    with pytest.raises(ValueError, match="EMA is for runs of LitGenerator, got LitTokenizer; take"):
        require_stage(EMA(), module, LitGenerator)
