"""Averaged weights: a hand loop's numbers, in place where they are wanted, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grn_lightning.lit.callbacks import EMA
from grn_lightning.lit.checkpoints import EMA_STATE
from grn_lightning.lit.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),  # as when resuming
    pytest.mark.filterwarnings("ignore:.*used to create the checkpoint need"),  # the saver is gone
]


class Toy(L.LightningModule):
    """One averaged network, one that is not, and a frozen part; sees what it validates with."""

    averaged = ("network",)

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.other = nn.Linear(3, 1)
        self.network[0].bias.requires_grad_(False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=rng)
        self.history: list[dict[str, Tensor]] = []
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.failure: Exception | None = None

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.network(batch) + self.other(batch)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(self.weights())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["validate"] = self.weights()
        if self.failure is not None:
            raise self.failure

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen["test"] = self.weights()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen["predict"] = self.weights()
        return self.network(batch)

    def train_dataloader(self) -> DataLoader[Tensor]:
        samples = torch.randn(24, 3, generator=torch.Generator().manual_seed(2))
        return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_steps": 6, "limit_val_batches": 0, "enable_checkpointing": False} | settings,
    )


def by_hand(
    start: dict[str, Tensor], history: list[dict[str, Tensor]], decay: float, *, warmup: bool
) -> dict[str, Tensor]:
    average = {name: value.double() for name, value in start.items()}
    for step, weights in enumerate(history, start=1):
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        average = {name: d * average[name] + (1 - d) * weights[name].double() for name in average}
    return average


def assert_average(ema: EMA, expected: dict[str, Tensor]) -> None:
    for name, shadow in ema.shadows.items():
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-5, atol=1e-6)


AVERAGED = {"network.0.weight", "network.1.weight", "network.1.bias", "network.2.weight",
            "network.2.bias"}  # fmt: skip


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_equals_a_loop_over_optimizer_steps(warmup, accumulate):
    module, ema = Toy(), EMA(decay=0.3, warmup=warmup)
    start = module.weights()
    trainer(ema, max_steps=6, accumulate_grad_batches=accumulate).fit(module)
    steps = module.history[accumulate - 1 :: accumulate]
    assert len(steps) == ema.num_updates == 6
    assert ema.shadows.keys() == AVERAGED
    assert_average(ema, by_hand(start, steps, 0.3, warmup=warmup))


def test_shadows_of_bfloat16_weights_keep_float32():
    module, ema = Toy().bfloat16(), EMA(decay=0.999, warmup=False)
    module.other = module.other.float()
    start = module.weights()
    ema.on_fit_start(None, module)  # type: ignore[arg-type]
    with torch.no_grad():
        module.network[0].weight.add_(1)
    for step in range(1, 4):  # a step of 0.001 is lost in bfloat16 next to 1
        ema.on_train_batch_end(type("Trainer", (), {"global_step": step})(), module)  # type: ignore[arg-type]
    assert {shadow.dtype for shadow in ema.shadows.values()} == {torch.float32}
    assert_average(ema, by_hand(start, [module.weights()] * 3, 0.999, warmup=False))
    moved = ema.shadows["network.0.weight"] - start["network.0.weight"].float()
    assert (moved > 0.0029).all()


# --- in place and back ----------------------------------------------------------------------------


def test_validation_sees_the_average_and_training_goes_on_with_the_weights():
    with_ema, without, ema = Toy(), Toy(), EMA(decay=0.5)
    settings: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 3, "max_steps": 5}
    trainer(ema, **settings).fit(with_ema)
    trainer(**settings).fit(without)
    for mine, theirs in zip(with_ema.history, without.history, strict=True):
        assert all(mine[name].equal(theirs[name]) for name in mine)
    start, raw = Toy().weights(), with_ema.history[2]
    average = by_hand(start, with_ema.history[:3], 0.5, warmup=True)
    seen = with_ema.seen["validate"]
    for name in seen:
        expected = average[name].float() if name in AVERAGED else raw[name]
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-6)
    assert not seen["network.2.weight"].equal(raw["network.2.weight"])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_is_judged_by_its_average(stage, tmp_path):
    module = Toy()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="six")
    trained = trainer(EMA(decay=0.5), saver, enable_checkpointing=True)
    trained.fit(module)
    expected = by_hand(Toy().weights(), module.history, 0.5, warmup=True)

    other = Toy()
    judge = trainer(EMA(decay=0.5), limit_val_batches=1.0)
    getattr(judge, stage)(other, ckpt_path=tmp_path / "six.ckpt")
    for name in AVERAGED:
        torch.testing.assert_close(
            other.seen[stage][name].double(), expected[name], rtol=1e-5, atol=1e-6
        )
    assert all(other.weights()[name].equal(module.weights()[name]) for name in AVERAGED)


def test_weights_are_put_back_when_validation_fails():
    module, ema = Toy(), EMA(decay=0.5)
    module.failure = RuntimeError("a broken judge")
    with pytest.raises(RuntimeError, match="a broken judge"):
        trainer(ema, limit_val_batches=1, val_check_interval=3).fit(module)
    raw = module.history[-1]
    assert not module.seen["validate"]["network.2.weight"].equal(raw["network.2.weight"])
    assert all(module.weights()[name].equal(raw[name]) for name in raw)


def test_what_validation_saves_are_the_weights_and_not_the_average(tmp_path):
    module = Toy()
    saver = ModelCheckpoint(tmp_path, filename="best", save_on_train_epoch_end=False)
    trained = trainer(EMA(decay=0.5), saver, enable_checkpointing=True, limit_val_batches=1,
                      val_check_interval=3, max_steps=3)  # fmt: skip
    trained.fit(module)
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    raw = module.history[2]
    assert all(state[name].equal(raw[name]) for name in raw)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_average_once_and_as_plain_tensors(tmp_path):
    module, ema = Toy(), EMA(decay=0.5)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="six")
    trainer(ema, saver, enable_checkpointing=True).fit(module)
    checkpoint = torch.load(tmp_path / "six.ckpt", weights_only=True)
    state = checkpoint["callbacks"][EMA_STATE]
    assert state.keys() == {"shadows", "num_updates"}
    assert state["num_updates"] == 6
    assert state["shadows"].keys() == AVERAGED
    assert all(state["shadows"][name].equal(ema.shadows[name]) for name in AVERAGED)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_average_is_bitwise_the_one_that_went_on(accumulate, tmp_path):
    settings = {"max_steps": 12, "accumulate_grad_batches": accumulate}
    straight, ema = Toy(), EMA(decay=0.9)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="{step}", save_top_k=-1)
    trainer(ema, saver, enable_checkpointing=True, **settings).fit(straight)

    resumed, later = Toy(), EMA(decay=0.9)
    again = trainer(later, **settings)
    again.fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")  # the end of an epoch
    assert later.num_updates == ema.num_updates == 12
    assert all(later.shadows[name].equal(ema.shadows[name]) for name in AVERAGED)


def test_an_average_that_joins_later_starts_from_the_restored_weights(tmp_path):
    first = Toy()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="six")
    trainer(saver, enable_checkpointing=True).fit(first)
    module, ema = Toy(), EMA(decay=0.5, warmup=False)
    trainer(ema, max_steps=8).fit(module, ckpt_path=tmp_path / "six.ckpt")
    assert_average(ema, by_hand(first.weights(), module.history, 0.5, warmup=False))


def test_the_loaded_tokenizer_has_the_averaged_weights(tokenizer_run: Path):
    checkpoint = torch.load(tokenizer_run / "checkpoints" / "last.ckpt", weights_only=True)
    shadows = checkpoint["callbacks"][EMA_STATE]["shadows"]
    loaded = {f"tokenizer.{n}": p for n, p in load_tokenizer(tokenizer_run).named_parameters()}
    assert loaded.keys() == shadows.keys()
    assert all(loaded[name].equal(shadows[name]) for name in loaded)
    raw = checkpoint["state_dict"]
    assert not any(raw[name].equal(shadows[name]) for name in shadows if name.endswith("weight"))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"`decay` must be in \[0, 1\), got {decay}"):
        EMA(decay=decay)


def test_a_module_that_names_nothing_to_average_is_refused():
    module = Toy()
    module.averaged = ()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Toy names no submodule to average"):
        trainer(EMA()).fit(module)


def test_the_average_of_a_copy_is_its_own():
    ema = EMA()
    ema.load_state_dict({"shadows": {"a": torch.zeros(2)}, "num_updates": 3})
    other = copy.deepcopy(ema)
    other.shadows["a"] += 1
    assert not ema.shadows["a"].any()
