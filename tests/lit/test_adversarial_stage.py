"""The tokenizer stage against discriminators: who learns what, what is counted, what is refused."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from grn_lightning.lit import tokenizer as stage_file
from grn_lightning.lit.adversarial import AdversarialConfig, Adversary
from grn_lightning.lit.checkpoints import EMA_STATE, read_checkpoint
from grn_lightning.lit.stepping import ProcedureConfig, parts_of, refuse_trainer_flags
from grn_lightning.lit.tokenizer import LitTokenizer, ReconstructionLossConfig
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.nn.discriminator import DiscriminatorConfig
from tests.tiny_runs import (
    TINY_TOKENIZER,
    call_grn,
    callback,
    checkpoints,
    fit,
    logged,
    source,
    tensors_equal,
    tokenizer_config,
    write_yaml,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*used to create the checkpoint need"),
]

FRAMES: dict[str, Any] = {"width": 4, "num_layers": 1}
SPECTRAL: dict[str, Any] = FRAMES | {"kind": "spectral"}
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 1e-3, "betas": [0.5, 0.9]}


def module(**settings: Any) -> LitTokenizer:
    built = LitTokenizer(TokenizerConfig(**TINY_TOKENIZER), **settings)
    built.configure_model()
    return built


def run(folder: Path, digits: Path, steps: int = 2, **settings: Any) -> dict[str, Any]:
    """Train for some steps and return the last checkpoint."""
    init_args = {"optim": ADAMW, **settings.pop("init_args", {})}
    callbacks = [callback("EMA", decay=0.9), checkpoints(folder, steps)]
    config = tokenizer_config(
        folder,
        digits,
        init_args=init_args,
        callbacks=callbacks,
        trainer={"max_steps": steps} | settings.pop("trainer", {}),
        **settings,
    )
    fit(folder, config)
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def moments(checkpoint: dict[str, Any], player: int) -> dict[int, Tensor]:
    state = checkpoint["optimizer_states"][player]["state"]
    return {index: entry["exp_avg"] for index, entry in state.items()}


def part(checkpoint: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


# --- who learns what ------------------------------------------------------------------------------


def test_the_tokenizers_term_is_minus_the_mean_logit_and_teaches_discriminators_nothing():
    stage = module(adversarial=AdversarialConfig(image=DiscriminatorConfig(**SPECTRAL)))
    clips = torch.rand(2, 3, 5, 16, 16)
    output = stage(clips)
    factor, terms = stage._adversarial_terms(stage._losses(clips, output), output, 0.5)
    assert float(factor) == 0.5
    frames = output.reconstruction.transpose(1, 2).flatten(0, 1)
    judge = stage.adversary.discriminators["image"].eval()
    expected = -0.3 * judge(frames).mean()
    torch.testing.assert_close(terms["image"], expected, rtol=1e-3, atol=1e-5)

    terms["image"].backward()
    assert all(p.grad is None and p.requires_grad for p in stage.adversary.parameters())
    assert stage.tokenizer.decoder.head[-1].weight.grad.abs().sum() > 0


def test_discriminators_are_told_what_is_real():
    """A few steps on bright data and dark fakes: the hinge ends, accuracy is 1."""
    torch.manual_seed(0)
    config = AdversarialConfig(
        image=DiscriminatorConfig(**SPECTRAL), video=DiscriminatorConfig(**SPECTRAL)
    )
    adversary = Adversary(config)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=0.02)
    clips, fakes = torch.rand(2, 3, 5, 16, 16), -torch.rand(2, 3, 5, 16, 16)
    for _ in range(40):
        loss, logs = adversary.discriminator_terms(clips, fakes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in ("image", "video"):
        assert logs[f"gan/logits_real_{name}"] > 0.8
        assert logs[f"gan/logits_fake_{name}"] < -0.8
        assert logs[f"gan/accuracy_{name}"] == 1
        assert logs[f"gan/loss_{name}"] < 0.3


def test_pictures_pass_the_discriminator_of_clips_by():
    config = AdversarialConfig(image=None, video=DiscriminatorConfig(**FRAMES))
    pictures = torch.rand(2, 3, 1, 16, 16)
    assert Adversary(config).generator_terms(pictures) == {}
    assert Adversary(config).discriminator_terms(pictures, pictures) == (None, {})


def test_lecam_keeps_averages_of_the_mean_logits():
    config = AdversarialConfig(image=DiscriminatorConfig(**SPECTRAL), lecam=1.0)
    adversary, expected = Adversary(config).eval(), torch.zeros(2)
    for seed in range(3):
        torch.manual_seed(seed)
        clips, fakes = torch.rand(2, 3, 1, 16, 16), torch.rand(2, 3, 1, 16, 16)
        _, logs = adversary.discriminator_terms(clips, fakes)
        means = torch.stack([logs["gan/logits_real_image"], logs["gan/logits_fake_image"]])
        expected = 0.99 * expected + 0.01 * means
    torch.testing.assert_close(adversary.averages[0], expected)
    assert expected.abs().min() > 0


@pytest.mark.parametrize(
    ("samples", "expected"), [(0, -1), (99, -1), (100, 0), (125, 0.25), (200, 1), (900, 1)]
)
def test_the_game_begins_late_and_gently(samples, expected):
    config = AdversarialConfig(
        image=DiscriminatorConfig(**FRAMES), start_samples=100, ramp_samples=100
    )
    assert Adversary(config).strength(samples) == expected


def test_a_game_from_the_first_step_is_at_full_strength():
    assert Adversary(AdversarialConfig(image=DiscriminatorConfig(**FRAMES))).strength(0) == 1


# --- counting -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def game(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of the tokenizer; discriminators join after the second."""
    folder = tmp_path_factory.mktemp("game")
    optim = ADAMW | {"schedule": "linear"}
    game = {
        "image": FRAMES,
        "video": FRAMES,
        "start_samples": 8,
        "ramp_samples": 8,
        "is_adaptive": True,
        "optim": optim | {"warmup_samples": 8},
    }
    config = tokenizer_config(
        folder,
        digits,
        init_args={"adversarial": game, "optim": optim},
        callbacks=[
            callback("EMA", decay=0.9),
            checkpoints(folder, 3),
            {
                "class_path": "lightning.pytorch.callbacks.LearningRateMonitor",
                "init_args": {"logging_interval": "step"},
            },
        ],
        trainer={"max_steps": 6},
    )
    trainer = fit(folder, config)
    assert trainer.global_step == 6
    return folder


def test_max_steps_counts_updates_of_the_tokenizer(game):
    names = {path.name for path in (game / "checkpoints").iterdir()}
    assert names == {"step=3.ckpt", "step=6.ckpt", "last.ckpt"}
    end = read_checkpoint(game / "checkpoints" / "last.ckpt")
    assert end["global_step"] == 6
    assert end["samples_seen"] == 6 * 4
    assert end["callbacks"][EMA_STATE]["num_updates"] == 6
    seen = [max(float(s["step"]) for s in o["state"].values()) for o in end["optimizer_states"]]
    assert seen == [6, 4]
    assert list(logged(game, "train/samples_seen").items()) == [
        (step, f"{4.0 * (step + 1)}") for step in range(6)
    ]


def test_schedules_count_samples_and_end_with_the_run(game):
    tokenizer = [float(v) for v in logged(game, "lr-AdamW/pg1").values()]
    opponent = [float(v) for v in logged(game, "lr-AdamW-1/pg1").values()]
    # The rate of a step is that of the samples seen before it; the opponent's begins two later.
    assert tokenizer == pytest.approx([1e-3 * (6 - n) / 6 for n in range(6)])
    since = [max(0, 4 * n - 8) for n in range(6)]
    expected = [1e-3 * min(1, (s + 1) / 8) * (16 - s) / 16 for s in since]
    assert opponent == pytest.approx(expected)
    end = read_checkpoint(game / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert {group["lr"] for optimizer in end for group in optimizer["param_groups"]} == {0.0}


def test_every_quantity_of_the_game_is_logged_since_it_began(game):
    names = ["loss", "logits_real", "logits_fake", "accuracy", "grad_norm"]
    for name in (f"gan/{name}_image" for name in names):
        values = logged(game, name)
        assert list(values) == [2, 3, 4, 5], name
        assert all(math.isfinite(float(value)) for value in values.values())
    factors = [float(value) for value in logged(game, "gan/weight_factor").values()]
    assert factors[0] == 0  # of the ramp
    assert min(factors[1:]) > 0
    assert len({round(factor, 6) for factor in factors[2:]}) == 2  # adaptive
    # Images and clips take turns, and the second are seen by both discriminators.
    assert list(logged(game, "gan/loss_video"))[0] == 3
    assert len(set(logged(game, "gan/loss_image").values())) == 4


def test_the_loss_is_the_sum_of_all_terms(game):
    names = ("l1", "adversarial_image", "adversarial_video")
    terms = [float(logged(game, f"train/loss_{name}")[5]) for name in names]
    assert float(logged(game, "train/loss")[5]) == pytest.approx(sum(terms), rel=1e-5)


def test_a_checkpoint_of_a_game_is_a_tokenizer_to_everybody_else(game):
    state = read_checkpoint(game)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"tokenizer", "adversary"}
    assert isinstance(stage_file.load_tokenizer(game), nn.Module)


# --- how an update is computed --------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches_take_the_step_of_the_whole_batch(digits, tmp_path):
    """Also in unequal parts: five samples in three. Spectral norms know of no batch."""
    found = []
    for number in (1, 3):
        init_args = {
            "adversarial": {"image": SPECTRAL, "optim": ADAMW},
            "procedure": {"micro_batches": number, "gradient_clip_val": 0},
        }
        sources = [source(digits, "video", 5)]
        found.append(run(tmp_path / str(number), digits, 1, init_args=init_args, sources=sources))
    for player in (0, 1):
        whole, parts = (moments(checkpoint, player) for checkpoint in found)
        assert whole.keys() == parts.keys()
        for index, moment in whole.items():
            # Every part's forward pass takes one step of the power iteration of spectral norms.
            tolerance = (1e-5 if player == 0 else 0.1) * float(moment.abs().max()) + 1e-8
            torch.testing.assert_close(parts[index], moment, rtol=0, atol=tolerance)


def test_parts_share_a_batch():
    parts = list(parts_of(torch.arange(5), 3))
    assert torch.cat([values for values, _ in parts]).tolist() == [0, 1, 2, 3, 4]
    assert [share for _, share in parts] == [0.4, 0.4, 0.2]
    assert len(list(parts_of(torch.arange(2), 3))) == 2


def test_gradients_of_both_players_are_clipped(digits, tmp_path):
    init_args = {
        "adversarial": {"image": FRAMES, "optim": ADAMW},
        "procedure": {"gradient_clip_val": 0.01},
    }
    end = run(tmp_path, digits, 1, init_args=init_args)
    for player, name in enumerate(("train/grad_norm", "gan/grad_norm_image")):
        assert float(logged(tmp_path, name)[0]) > 0.02  # before clipping
        squares = [float((m / 0.5).square().sum()) for m in moments(end, player).values()]
        assert sum(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_trains_float32_weights(digits, tmp_path):
    init_args = {"adversarial": {"image": FRAMES, "lecam": 0.1}}
    end = run(tmp_path, digits, 2, init_args=init_args, trainer={"precision": "bf16-mixed"})
    assert {value.dtype for value in end["state_dict"].values()} == {torch.float32}
    assert all(math.isfinite(float(v)) for v in logged(tmp_path, "gan/loss_image").values())
    assert moments(end, 0)
    assert moments(end, 1)


@pytest.mark.parametrize("kind", ["hbq", "vq"])
def test_a_decoder_can_be_trained_behind_codes_that_stay(kind, digits, tmp_path):
    init_args = {
        "tokenizer": TINY_TOKENIZER | {"quantizer": {"name": kind}},
        "procedure": {"trains": "decoder"},
        "adversarial": {"image": FRAMES},
    }
    torch.manual_seed(0)
    start = LitTokenizer(init_args["tokenizer"])  # type: ignore[arg-type]
    start.configure_model()
    torch.save({"state_dict": start.state_dict()}, tmp_path / "start.ckpt")
    init_args["init_from"] = str(tmp_path / "start.ckpt")
    end = run(tmp_path, digits, 2, init_args=init_args)
    for name, before in start.state_dict().items():
        is_behind = name.startswith(("tokenizer.decoder", "tokenizer.conv2"))
        if not is_behind:
            assert end["state_dict"][name].equal(before), name
    moved = {n for n, v in start.state_dict().items() if not end["state_dict"][n].equal(v)}
    assert len(moved) > 5
    assert set(end["callbacks"][EMA_STATE]["shadows"]) >= moved


def test_activation_checkpointing_saves_memory_and_nothing_else():
    clips, found, sizes = torch.rand(1, 3, 5, 16, 16), [], []
    for is_on in (False, True):
        torch.manual_seed(0)
        stage = module(procedure=ProcedureConfig(activation_checkpointing=is_on))
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = stage._losses(clips, stage(clips))["l1"]
        sizes.append(sum(kept.values()))
        loss.backward()
        found.append({n: p.grad for n, p in stage.tokenizer.named_parameters()})
    assert sizes[1] < 0.7 * sizes[0]
    assert tensors_equal(found[0], found[1])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_compiled_networks_compute_the_same_under_the_same_names():
    torch.manual_seed(0)
    plain = module()
    compiled = module(procedure=ProcedureConfig(compile="eager"))
    compiled.load_state_dict(plain.state_dict())  # strictly: no wrapper's prefix
    clips = torch.rand(1, 3, 5, 16, 16)
    assert compiled.tokenizer.decoder._compiled_call_impl is not None
    torch.testing.assert_close(compiled(clips).reconstruction, plain(clips).reconstruction)


# --- LPIPS ----------------------------------------------------------------------------------------


class _FakeLPIPS(nn.Module):
    """A distance that is known beforehand; its weights must stay out of checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.ndim == second.ndim == 4
        return self.weight * (first - second).square().mean((1, 2, 3))


def test_the_perceptual_term_is_a_mean_over_frames(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_file.LPIPS, "load", lambda path: _FakeLPIPS())
    loss = {"l1": 0.0, "l2": 1.0, "perceptual": 3.0}
    end = run(tmp_path, digits, 2, init_args={"loss": loss})
    squares = [float(value) for value in logged(tmp_path, "train/loss_l2").values()]
    found = [float(value) for value in logged(tmp_path, "train/loss_perceptual").values()]
    assert found == pytest.approx([3 * value for value in squares], rel=1e-5)
    assert all(name.startswith("tokenizer.") for name in end["state_dict"])


def test_lpips_without_weights_is_refused_before_training(digits, tmp_path, capsys):
    config = tokenizer_config(
        tmp_path, digits, init_args={"loss": {"perceptual": 1.0, "vgg_weights": "nowhere.pth"}}
    )
    with pytest.raises(SystemExit):
        fit(tmp_path, config)
    assert re.search(
        "^grn: LPIPS .* no file 'nowhere.pth': fetch https://", capsys.readouterr().err
    )


def test_a_quantizers_own_terms_are_part_of_the_loss():
    config = TINY_TOKENIZER | {"quantizer": {"name": "vq"}}
    stage = LitTokenizer(config)  # type: ignore[arg-type]
    stage.configure_model()
    clips = torch.rand(2, 3, 5, 16, 16)
    output = stage(clips)
    losses = stage._losses(clips, output)
    assert output.auxiliary_terms
    assert losses.keys() == {"l1", *output.auxiliary_terms}
    others = sum(value for name, value in losses.items() if name != "l1")
    torch.testing.assert_close(others, output.auxiliary_loss)


# --- resuming and starting from other weights -----------------------------------------------------


def test_a_game_cannot_begin_or_end_in_the_middle_of_a_run(
    game, digits, tokenizer_run, tmp_path, capsys
):
    last = [folder / "checkpoints" / "last.ckpt" for folder in (game, tokenizer_run)]
    without = write_yaml(tmp_path / "a", tokenizer_config(tmp_path / "without", digits))
    with pytest.raises(SystemExit):
        call_grn("fit", "-c", without, f"--ckpt_path={last[0]}")
    assert re.search("trained with discriminators, .*model.init_from", capsys.readouterr().err)
    adversarial = {"adversarial": {"image": FRAMES}}
    config = tokenizer_config(tmp_path / "with", digits, init_args=adversarial)
    with pytest.raises(SystemExit):
        call_grn("fit", "-c", write_yaml(tmp_path, config), f"--ckpt_path={last[1]}")
    assert "was trained without discriminators" in capsys.readouterr().err


@pytest.mark.parametrize("has_game", [False, True])
def test_either_kind_of_checkpoint_can_be_validated_by_either(
    has_game, game, digits, tokenizer_run, tmp_path
):
    found = []
    for adversarial in (None, {"image": FRAMES, "video": FRAMES}):
        config = tokenizer_config(
            tmp_path / str(len(found)), digits, init_args={"adversarial": adversarial}
        )
        folder = game if has_game else tokenizer_run
        trainer = call_grn(
            "validate", "-c", write_yaml(tmp_path, config), f"--ckpt_path={folder}"
        ).trainer
        found.append(float(trainer.callback_metrics["val/psnr"]))
    assert found[0] == found[1] > 3


def test_discriminators_can_be_taken_from_another_run(game, digits, tmp_path):
    stage = module(
        adversarial=AdversarialConfig(
            image=DiscriminatorConfig(**FRAMES),
            video=DiscriminatorConfig(**FRAMES),
            init_from=str(game),
        )
    )
    before = part(read_checkpoint(game), "adversary.")
    assert tensors_equal(before, part({"state_dict": stage.state_dict()}, "adversary."))
    with pytest.raises(ValueError, match="has not the discriminators that `adversarial` describes"):
        module(
            adversarial=AdversarialConfig(
                image=DiscriminatorConfig(width=5, num_layers=1), init_from=str(game)
            )
        )


def test_a_checkpoint_of_automatic_optimization_goes_on_with_its_count(
    tokenizer_run, digits, tmp_path
):
    checkpoint = read_checkpoint(tokenizer_run)
    loops = checkpoint["loops"]["fit_loop"]
    done = loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]
    assert done["completed"] == checkpoint["global_step"] == 4
    done.update(ready=0, completed=0)
    del checkpoint["hyper_parameters"]["adversarial"], checkpoint["hyper_parameters"]["procedure"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    config = tokenizer_config(
        tmp_path,
        digits,
        callbacks=[callback("EMA", decay=0.9), checkpoints(tmp_path, 1)],
        trainer={"max_steps": 6},
    )
    trainer = fit(tmp_path, config, f"--ckpt_path={tmp_path / 'old.ckpt'}")
    assert trainer.global_step == 6
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step=5.ckpt", "step=6.ckpt", "last.ckpt",
    }  # fmt: skip


# --- refusals -------------------------------------------------------------------------------------


def test_trainer_flags_that_would_not_act_are_refused(digits, tmp_path, capsys):
    flags = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    with pytest.raises(SystemExit):
        fit(tmp_path, tokenizer_config(tmp_path, digits, trainer=flags))
    told = capsys.readouterr().err
    assert "is 0.5, but this stage clips by itself" in told
    assert "use `model.procedure.gradient_clip_val`" in told
    assert "is 2, but a batch is an update here" in told
    assert "split it by `model.procedure.micro_batches`" in told


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"precision": "16-mixed"}, "is 16-mixed, .* take bf16-mixed or 32-true"),
        ({"precision": "bf16-true"}, "is bf16-true, .* take bf16-mixed or 32-true"),
        ({"strategy": DeepSpeedStrategy()}, "DeepSpeedStrategy takes a single optimizer; set"),
    ],
)
def test_settings_that_two_players_cannot_share_are_refused(wrong, text):
    right = {
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
        "precision": "bf16-mixed",
        "strategy": SingleDeviceStrategy(),
    }
    refuse_trainer_flags(SimpleNamespace(**right))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=text):
        refuse_trainer_flags(SimpleNamespace(**right | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"weight": -1.0}, "`weight` must be at least 0, got -1.0"),
        ({"loss": "wasserstein"}, "`loss` must be one of .*'vanilla'.*, got 'wasserstein'"),
        ({"image": None}, "`image` and `video` are both null; .* set `adversarial: null`"),
        ({"r1": 1.0}, "`r1` needs .* take `kind: spectral` or `kind: stylegan`"),
    ],
)
def test_impossible_games_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        AdversarialConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"gradient_clip_val": -1.0}, "`gradient_clip_val` must be at least 0"),
        ({"micro_batches": 0}, "`micro_batches` must be at least 1, got 0"),
        ({"trains": "encoder"}, "`trains` must be 'all' or 'decoder', got 'encoder'"),
    ],
)
def test_impossible_procedures_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        ProcedureConfig(**wrong)


def test_a_perceptual_weight_alone_is_no_loss():
    with pytest.raises(ValueError, match="l1 or l2 positive, got l1=0.0, .* perceptual=1.0"):
        ReconstructionLossConfig(l1=0.0, perceptual=1.0)


def test_r1_lowers_the_gradient_at_real_samples():
    config = AdversarialConfig(image=DiscriminatorConfig(**SPECTRAL), r1=10.0)
    adversary = Adversary(config)
    with torch.no_grad():  # steep from the start
        adversary.discriminators["image"].layers[0].weight.mul_(10)
        adversary.discriminators["image"].layers[-1].weight.mul_(50)
    clips = torch.rand(2, 3, 1, 16, 16)
    optimizer = torch.optim.SGD(adversary.parameters(), lr=0.05)
    found = []
    for _ in range(12):
        loss, logs = adversary.discriminator_terms(clips, clips)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(logs["gan/r1_image"]))
    assert found[-1] < 0.8 * found[0]
