"""The generator stage: noise by sample, frozen tokenizer, conditions, and training that is real."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grn_lightning.functional import (
    logit_normal,
    token_accuracy,
    token_cross_entropy,
)
from grn_lightning.lit.checkpoints import find_checkpoint, read_checkpoint, weights_hash
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import CorruptionConfig, LitGenerator, target_of
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.samplers import RefineConfig
from tests.tiny_runs import (
    TINY_CLASS,
    TINY_DIGITS,
    TINY_ENCODER,
    TINY_TEXT,
    TINY_TOKENIZER,
    call_grn,
    callback,
    fit,
    generator_config,
    logged,
    source,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*used to create the checkpoint need")

KINDS = ["class", "text"]


def build(kind: str, tokenizer: Path, **settings: Any) -> LitGenerator:
    """A generator with random weights, in evaluation mode."""
    network = {"class": GRNClassConfig, "text": GRNTextConfig}[kind](
        **({"class": TINY_CLASS, "text": TINY_TEXT}[kind])
    )
    encoder = TINY_ENCODER if kind == "text" else None
    module = LitGenerator(network, str(tokenizer), text_encoder=encoder, **settings)  # type: ignore[arg-type]
    module.configure_model()
    return module.eval()


def training_batch(kind: str, digits: Path, size: int = 6, **rest: Any) -> Any:
    """The first batch of the training stream."""
    media = "image" if kind == "class" else "video"
    sources = [source(digits, media, size, **rest)]
    config = generator_config(digits, digits, digits, kind=kind, sources=sources)
    data = ShardData(**config["data"]["init_args"])
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def rows(batch: Any, chosen: list[int]) -> Any:
    """Some samples of a batch."""
    return {
        name: value[chosen] if isinstance(value, Tensor) else [value[i] for i in chosen]
        for name, value in batch.items()
    }


class Spy:
    """Stands in for a generator: remembers what it is asked, and answers by the right elements."""

    def __init__(self, truth: Tensor | None, alphabet_size: int) -> None:
        self.truth, self.alphabet_size = truth, alphabet_size
        self.asked: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, codes: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.asked.append((codes, t, condition))
        truth = codes if self.truth is None else self.truth
        return 50.0 * one_hot(truth, self.alphabet_size).float()


def spy_on(module: LitGenerator, truth: Tensor | None = None) -> Spy:
    spy = Spy(truth, module.generator_config.alphabet_size)
    module.generator.forward = spy  # type: ignore[method-assign]
    return spy


# --- the form of the codes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "alphabet", "target"), [(4, 4, "index"), (8, 2, "bit"), (16, 2, None)]
)
def test_the_target_follows_from_the_sizes(elements, alphabet, target):
    generator = GRNClassConfig(**TINY_CLASS | {"num_elements": elements, "alphabet_size": alphabet})
    tokenizer = TokenizerConfig(**TINY_TOKENIZER)  # 4 channels, 2 rounds
    if target is None:
        with pytest.raises(ValueError, match=r"\(4, 4\) or \(8, 2\) for a tokenizer of 4 channels"):
            target_of(generator, tokenizer)
    else:
        assert target_of(generator, tokenizer) == target


@pytest.mark.parametrize("kind", KINDS)
def test_elements_are_the_tokenizer_s_codes_and_come_back_as_its_clips(kind, digits, tokenizer_run):
    module, clips = build(kind, tokenizer_run), training_batch(kind, digits)["clips"]
    tokenizer = load_tokenizer(tokenizer_run)
    elements = module.tokenize(clips)
    assert elements.shape == (6, 8, *module.latent_grid(*clips.shape[2:]))
    assert set(elements.unique().tolist()) <= {0, 1}
    with torch.no_grad():
        expected = tokenizer.detokenize(tokenizer.tokenize(clips)).clamp(-1, 1)
    torch.testing.assert_close(module.detokenize(elements), expected)


# --- the frozen tokenizer -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_no_part_of_what_is_trained_or_stored(kind, generator_runs, tokenizer_run):
    module = build(kind, tokenizer_run)
    assert not any("tokenizer" in name for name, _ in module.named_modules())
    assert not any(name.startswith("tokenizer") for name in module.state_dict())
    module.train()
    assert not module.tokenizer.training
    assert not any(parameter.requires_grad for parameter in module.tokenizer.parameters())
    checkpoint = read_checkpoint(generator_runs[kind])
    names = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert names == {"class": {"generator"}, "text": {"generator", "text_encoder"}}[kind]
    assert checkpoint["tokenizer_hash"] == weights_hash(load_tokenizer(tokenizer_run))


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sample_is_trained_on_does_not_depend_on_its_batch(kind, digits, tokenizer_run):
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    spy, x_1 = spy_on(module), module.tokenize(batch["clips"])
    module._predict(x_1, batch["sample_index"], batch, 0.5)
    chosen = [4, 1]
    part = rows(batch, chosen)
    module._predict(x_1[chosen], part["sample_index"], part, 0.5)
    (codes, t, condition), (codes_2, t_2, condition_2) = spy.asked
    assert codes_2.equal(codes[chosen])
    assert t_2.equal(t[chosen])
    if kind == "class":
        assert condition_2.equal(condition[chosen])
    else:
        torch.testing.assert_close(condition_2.embeds, condition.embeds[chosen])
        assert condition_2.mask.equal(condition.mask[chosen])


def test_another_seed_or_another_sample_has_other_noise(digits, tokenizer_run):
    batch = training_batch("class", digits)
    seen = []
    for seed, offset in ((0, 0), (1, 0), (0, 1000)):
        module = build("class", tokenizer_run, seed=seed)
        spy, x_1 = spy_on(module), module.tokenize(batch["clips"])
        module._predict(x_1, batch["sample_index"] + offset, batch, 0.0)
        seen.append(spy.asked[0])
    for other in seen[1:]:
        assert not other[0].equal(seen[0][0])
        assert not (other[1] == seen[0][1]).any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_and_kept_elements_follow_the_configuration(shift, tokenizer_run):
    n, mean, std = 4000, -0.8, 0.6
    module = build(
        "class",
        tokenizer_run,
        corruption=CorruptionConfig(time_mean=mean, time_std=std, time_shift=shift),
    )
    spy = spy_on(module)
    x_1 = torch.ones(n, 8, 2, 2, dtype=torch.long)
    labels = torch.zeros(n, dtype=torch.long)
    module._predict(x_1, torch.arange(n), {"class_labels": labels}, 0.3)  # type: ignore[typeddict-item]
    codes, t, condition = spy.asked[0]
    # Shifting by alpha subtracts its logarithm from logit(t). Four standard errors of each mean.
    logits = torch.logit(t)
    assert float(logits.mean()) == pytest.approx(mean - math.log(shift), abs=4 * std / n**0.5)
    assert float(logits.std()) == pytest.approx(std, abs=4 * std / (2 * n) ** 0.5)
    # An element is right because it was kept, or by luck.
    right = (codes == 1).float().mean((1, 2, 3)) - (t + (1 - t) / 2)
    assert float(right.mean()) == pytest.approx(0, abs=4 * 0.5 / (32 * n) ** 0.5)
    slope = (right * (t - t.mean())).mean() / t.var()  # nothing is left to explain by t
    assert float(slope) == pytest.approx(0, abs=0.05)
    # Which conditions are dropped has nothing to do with the time.
    is_dropped = condition == 10
    assert float(is_dropped.float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / n) ** 0.5)
    gap = logits[is_dropped].mean() - logits[~is_dropped].mean()
    assert float(gap) == pytest.approx(0, abs=4 * std / (0.21 * n) ** 0.5)


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_condition_is_the_null_condition(kind, digits, tokenizer_run):
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    dropped = torch.tensor([True, False] * 3)
    mixed, plain = module.condition(batch, dropped), module.condition(batch)
    null = module.null_condition(6)
    if kind == "class":
        assert mixed.equal(torch.where(dropped, null, plain))
        assert null.tolist() == [10] * 6
    else:
        for got, without, there in zip(mixed, null, plain, strict=True):
            torch.testing.assert_close(got[dropped], without[dropped])
            torch.testing.assert_close(got[~dropped], there[~dropped])


@pytest.mark.parametrize(("kind", "option"), [("class", "with_classes"), ("text", "with_captions")])
def test_batches_without_a_condition_are_refused(kind, option, digits, tokenizer_run):
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    without = {name: batch[name] for name in ("clips", "keys", "sample_index", "weights")}
    with pytest.raises(ValueError, match=f"set `data.{option}: true`"):
        module.condition(without)  # type: ignore[arg-type]


def test_a_text_encoder_of_another_width_is_refused(tokenizer_run):
    with pytest.raises(ValueError, match="must be the text encoder's width 24, got 16"):
        LitGenerator(
            GRNTextConfig(**TINY_TEXT),
            str(tokenizer_run),
            text_encoder=TINY_ENCODER | {"width": 24},  # type: ignore[arg-type]
        ).configure_model()


@pytest.mark.parametrize(
    "wrong", [{"time_std": 0.0}, {"time_shift": 0.0}, {"condition_dropout": 1.5}]
)
def test_a_corruption_that_cannot_be_meant_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"CorruptionConfig: `{name}` must be"):
        CorruptionConfig(**wrong)


# --- with a generator that knows the answer -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_that_is_right_has_no_loss_and_draws_the_clips(kind, digits, tokenizer_run):
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    x_1 = module.tokenize(batch["clips"])
    spy_on(module, truth=x_1)
    logits, _ = module._predict(x_1, batch["sample_index"], batch, 0.0)
    assert float(token_cross_entropy(logits, x_1).max()) < 1e-6
    assert token_accuracy(logits, x_1).tolist() == [1.0] * 6
    drawn = module.draw_clips(
        batch, torch.arange(6), size=tuple(batch["clips"].shape[2:]),
        config=RefineConfig(num_steps=3), seed=0,
    )  # fmt: skip
    assert drawn.equal(module.detokenize(x_1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind, digits, generator_runs, tokenizer_run):
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    settings: dict[str, Any] = {
        "grid": module.latent_grid(*batch["clips"].shape[2:]),
        "config": RefineConfig(num_steps=4, guidance_scale=2.0),
        "seed": 3,
    }
    with torch.no_grad():
        whole = module.sample(module.condition(batch), torch.arange(6), **settings).codes
        for chosen in ([5, 2], [0]):
            part = module.condition(rows(batch, chosen))
            found = module.sample(part, torch.tensor(chosen), **settings).codes
            assert found.equal(whole[chosen])


# --- remembered codes -----------------------------------------------------------------------------


def test_remembered_codes_are_the_tokenizer_s_even_where_keys_repeat(digits, tokenizer_run):
    """Stills and films of the embedded set have the same keys."""
    module = build("text", tokenizer_run, cache_codes=True)
    stills = training_batch("class", digits)
    films = training_batch("text", digits)
    keys = [f"{i:08d}" for i in range(6)]
    for _ in range(2):
        for batch in (stills, films):
            found = module._training_elements(batch | {"keys": keys})
            assert found.equal(module.tokenize(batch["clips"]))
            assert found.dtype == torch.long


def test_remembering_saves_the_tokenizer_s_work(digits, tokenizer_run, monkeypatch):
    module = build("class", tokenizer_run, cache_codes=True)
    batch = training_batch("class", digits)
    first = module._training_elements(batch)
    monkeypatch.setattr(module, "tokenize", None)
    chosen = [3, 0]
    assert module._training_elements(rows(batch, chosen)).equal(first[chosen])


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ([{"horizontal_flip": True}], "must be false where `horizontal_flip`"),
        ([{"name": "a"}, {"name": "b"}], "several sources of one medium"),
    ],
)
def test_remembering_what_would_be_mixed_up_is_refused(sources, match, digits, tokenizer_run):
    module = build("class", tokenizer_run, cache_codes=True)
    config = generator_config(
        digits, digits, digits, kind="class",
        sources=[source(digits, "image", 4, **settings) for settings in sources],
    )  # fmt: skip
    datamodule = ShardData(**config["data"]["init_args"])
    module._trainer = SimpleNamespace(datamodule=datamodule)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=match):
        module.on_fit_start()
    module.cache_codes = False
    module.on_fit_start()


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_a_mean_over_samples_with_fixed_noise(
    kind, digits, generator_runs, tokenizer_run, tmp_path
):
    found = []
    for size in (6, 4):
        folder, media = tmp_path / str(size), "image" if kind == "class" else "video"
        config = generator_config(
            folder, digits, tokenizer_run, kind=kind,
            sources=[source(digits, media, size)], callbacks=[callback("EMA")],
        )  # fmt: skip
        args = ("-c", write_yaml(folder, config), "--ckpt_path")
        trainer = call_grn("validate", *args, find_checkpoint(generator_runs[kind])).trainer
        found.append({name: float(v) for name, v in trainer.callback_metrics.items()})
    assert {"val/loss", "val/accuracy"} < found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert 0.3 < found[0]["val/loss"] < 1.5  # log 2 for one who knows nothing
    times = [name for name in found[0] if name.startswith("val_accuracy/t")]
    assert times


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_judged(kind, digits, tokenizer_run):
    """A rank that runs short repeats samples with weight 0; here they are others' codes."""
    module, batch = build(kind, tokenizer_run), training_batch(kind, digits)
    found = []
    for given in (rows(batch, [0, 1, 2]), batch | {"weights": torch.tensor([1.0] * 3 + [0.0] * 3)}):
        with torch.no_grad():
            module.validation_step(given, 0)
        found.append([float(value) for value in module.val_accuracy.compute()[:2]])
        module.val_accuracy.reset()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# --- training is real -----------------------------------------------------------------------------


def accuracy_at(module: LitGenerator, batch: Any, t: float) -> float:
    """Share of right elements where a share t of them is known, over many masks."""
    x_1 = module.tokenize(batch["clips"])
    hits = []
    for trial in range(16):
        u = torch.rand(2, *x_1.shape, generator=torch.Generator().manual_seed(trial))
        noise = (u[0] * module.generator_config.alphabet_size).long()
        x_t = torch.where(u[1] < t, x_1, noise)
        with torch.no_grad():
            times = torch.full((len(x_1),), t)
            logits = module.generator(x_t, times, module.condition(batch))
        hits.append(token_accuracy(logits, x_1).mean())
    return float(torch.stack(hits).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_samples_are_learned_by_heart(kind, digits, tokenizer_run, tmp_path):
    """The loss goes to zero at all times, and what is half unknown is named without a mistake."""
    few = {"max_samples": 4}
    config = generator_config(
        tmp_path,
        digits,
        tokenizer_run,
        kind=kind,
        sources=[source(digits, "image" if kind == "class" else "video", 4, **few)],
        data={"loader": {"cache_decoded": True}},
        init_args={
            "cache_codes": True,
            "corruption": {"condition_dropout": 0.0},
            "optim": {"name": "muon", "lr": 3e-3, "schedule": "linear", "decay_fraction": 0.5},
        },
        trainer={"max_steps": 150},
    )
    trainer = fit(tmp_path, config)
    losses = [float(value) for value in logged(tmp_path, "train/loss").values()]
    module = trainer.lightning_module.eval()
    assert isinstance(module, LitGenerator)
    batch = training_batch(kind, digits, 4, **few)
    x_1 = module.tokenize(batch["clips"])
    assert min((x_1[i] != x_1[j]).float().mean() for i in range(4) for j in range(i)) > 0.02
    assert losses[0] > 0.6
    assert max(losses[-20:]) < 0.05
    assert accuracy_at(module, batch, 0.5) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lower_the_loss(kind, digits, tokenizer_run, tmp_path):
    config = generator_config(tmp_path, digits, tokenizer_run, kind=kind, trainer={"max_steps": 20})
    fit(tmp_path, config)
    losses = [float(value) for value in logged(tmp_path, "train/loss").values()]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_times_are_drawn_by_quantile():
    """One uniform number is one time: the function that `_predict` uses, at its median."""
    assert float(logit_normal(torch.tensor([0.5]), mean=0.7, std=2.0)) == pytest.approx(
        1 / (1 + math.exp(-0.7))
    )


def test_the_tiny_set_is_what_these_tests_think_it_is(digits):
    assert training_batch("text", digits)["clips"].shape == (6, 3, TINY_DIGITS.num_frames, 16, 16)
