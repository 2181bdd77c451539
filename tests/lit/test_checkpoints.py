"""Finding, reading and refusing checkpoints."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grn_lightning.lit.checkpoints import (
    EMA_STATE,
    averaged_state,
    find_checkpoint,
    read_checkpoint,
    select,
    weights_hash,
    whole_checkpoint,
)
from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from tests.tiny_runs import (
    TINY_TOKENIZER,
    call_grn,
    generator_config,
    tokenizer_config,
    write_yaml,
)


@pytest.fixture(scope="module")
def other_tokenizer(digits: Path, tokenizer_run: Path, tmp_path_factory: Any) -> Path:
    """The same tokenizer with one weight changed."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint = read_checkpoint(tokenizer_run)
    checkpoint["callbacks"][EMA_STATE]["shadows"]["tokenizer.conv1.weight"] += 0.01
    torch.save(checkpoint, folder / "last.ckpt")
    return folder


# --- finding --------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_newest_last_checkpoint_below_it(tmp_path):
    for age, name in ((30, "version_2"), (10, "version_0"), (20, "version_10")):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (1e9 - age, 1e9 - age))
        (file.parent / "step=3.ckpt").write_bytes(b"")
    assert find_checkpoint(tmp_path) == tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert find_checkpoint(str(file)) == file


@pytest.mark.parametrize("use", [find_checkpoint, read_checkpoint, load_tokenizer, load_generator])
def test_a_missing_checkpoint_is_told_with_what_makes_one(use, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint at '.*gone': it does not exist. Train one"):
        use(tmp_path / "gone")
    with pytest.raises(ValueError, match="no `last.ckpt` lies under that folder. Train one first"):
        use(tmp_path / "empty")


# --- reading --------------------------------------------------------------------------------------


class Anything:
    """A class that a safe file must not bring along."""


@pytest.mark.parametrize(
    "content", ["garbage", "cut", "object"], ids=["not torch's", "cut off", "pickled objects"]
)
@pytest.mark.parametrize("use", [read_checkpoint, load_tokenizer, load_generator])
def test_a_damaged_or_unsafe_file_is_one_sentence(use, content, tokenizer_run, tmp_path):
    file = tmp_path / "last.ckpt"
    if content == "garbage":
        file.write_bytes(b"hello" * 100)
    elif content == "cut":
        file.write_bytes(find_checkpoint(tokenizer_run).read_bytes()[:-2000])
    else:
        torch.save({"state_dict": {}, "extra": Anything()}, file)
    with pytest.raises(ValueError, match=r"last.ckpt' cannot be read as a checkpoint: it is damag"):
        use(tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"weight": torch.zeros(3)}])
def test_tensors_alone_are_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is no checkpoint of a run: it has no `state_dict`"):
        read_checkpoint(tmp_path / "weights.pt")


def test_what_is_resumed_from_is_found_and_whole(tokenizer_run, tmp_path):
    whole = find_checkpoint(tokenizer_run)
    assert whole_checkpoint(whole) == whole_checkpoint(str(tokenizer_run)) == whole
    (tmp_path / "sharded" / "checkpoint").mkdir(parents=True)  # as DeepSpeed begins to write it
    with pytest.raises(ValueError, match="sharded' is no whole checkpoint"):
        whole_checkpoint(tmp_path / "sharded")
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:-10_000])
    with pytest.raises(ValueError, match="cut.ckpt' cannot be read"):
        whole_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match="it does not exist"):
        whole_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="no `last.ckpt` lies under that folder"):
        whole_checkpoint(tmp_path)


# --- states ---------------------------------------------------------------------------------------


def test_averages_replace_the_weights_they_are_averages_of():
    checkpoint = {
        "state_dict": {"a.w": torch.zeros(1), "a.buffer": torch.ones(1)},
        "callbacks": {EMA_STATE: {"shadows": {"a.w": torch.full((1,), 5.0)}}, "Other": {}},
    }
    state = averaged_state(checkpoint)
    assert {name: float(value) for name, value in state.items()} == {"a.w": 5.0, "a.buffer": 1.0}
    assert float(checkpoint["state_dict"]["a.w"]) == 0  # type: ignore[index]


def test_a_run_without_an_average_has_its_weights():
    state = {"a.w": torch.zeros(1)}
    assert averaged_state({"state_dict": state}) == state


def test_selecting_takes_whole_names():
    state = {"net.a": torch.zeros(1), "network.a": torch.ones(1), "x.net.a": torch.ones(1)}
    assert select(state, "net") == {"a": state["net.a"]}


def test_a_hash_tells_values_names_shapes_and_types_apart():
    def net(**parameters: torch.Tensor) -> nn.Module:
        return nn.ParameterDict(
            {k: nn.Parameter(v, requires_grad=False) for k, v in parameters.items()}
        )

    values = torch.arange(6.0)
    hashes = [
        weights_hash(module)
        for module in (
            net(a=values),
            net(a=values + torch.tensor([0, 0, 0, 0, 0, 1e-6])),
            net(b=values),
            net(a=values.reshape(2, 3)),
            net(a=values.double()),
            net(a=values.view(torch.int32)),
            net(a=values, b=values),
            net(a=values.new_zeros(())),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_a_hash_depends_on_nothing_else():
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.load_state_dict(first.state_dict())
    second.requires_grad_(False).eval()
    second.weight.data = second.weight.data.t().contiguous().t()  # another memory layout
    assert weights_hash(first) == weights_hash(second)


# --- trained things -------------------------------------------------------------------------------


def test_a_loaded_tokenizer_is_frozen(tokenizer_run):
    tokenizer = load_tokenizer(tokenizer_run)
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_loaded_generator_has_averaged_weights_its_tokenizer_and_settings(
    kind, generator_runs, tokenizer_run
):
    module = load_generator(generator_runs[kind])
    checkpoint = read_checkpoint(generator_runs[kind])
    shadows = checkpoint["callbacks"][EMA_STATE]["shadows"]
    state = module.state_dict()
    assert state.keys() == checkpoint["state_dict"].keys()
    for name, value in state.items():
        assert value.equal(shadows.get(name, checkpoint["state_dict"][name])), name
    moved = [name for name in shadows if not shadows[name].equal(checkpoint["state_dict"][name])]
    assert any(name.startswith("generator.") for name in moved)
    assert any(name.startswith("text_encoder.") for name in moved) == (kind == "text")
    assert weights_hash(module.tokenizer) == weights_hash(load_tokenizer(tokenizer_run))
    assert module.samples_seen == 16
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_generator_follows_its_tokenizer_to_another_place(
    generator_runs, tokenizer_run, tmp_path
):
    file = tmp_path / "moved.ckpt"
    shutil.copy(find_checkpoint(tokenizer_run), file)
    module = load_generator(generator_runs["class"], tokenizer=str(file))
    assert module.tokenizer_path == str(file)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_generator_is_no_tokenizer(kind, generator_runs):
    with pytest.raises(ValueError, match="is no checkpoint of a tokenizer run.*`LitTokenizer`"):
        load_tokenizer(generator_runs[kind])


def test_a_tokenizer_is_no_generator(tokenizer_run):
    with pytest.raises(ValueError, match="is no checkpoint of a generator run.*`LitGenerator`"):
        load_generator(tokenizer_run)


def test_another_tokenizer_is_refused_with_both_hashes(
    generator_runs, tokenizer_run, other_tokenizer
):
    hashes = [weights_hash(load_tokenizer(path)) for path in (tokenizer_run, other_tokenizer)]
    match = f"codes of tokenizer {hashes[0]}, but '.*' holds tokenizer {hashes[1]}. Set `model.tok"
    with pytest.raises(ValueError, match=match):
        load_generator(generator_runs["class"], tokenizer=str(other_tokenizer))


# --- through the command line ---------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], folder: Path, config: Any, *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        call_grn("fit", "-c", write_yaml(folder, config), *args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("grn: ")


def test_resuming_on_another_tokenizer_is_refused(
    capsys, generator_runs, other_tokenizer, digits, tmp_path
):
    config = generator_config(tmp_path, digits, other_tokenizer, kind="class")
    file = find_checkpoint(generator_runs["class"])
    text = answer(capsys, tmp_path, config, f"--ckpt_path={file}")
    assert text.startswith("the checkpoint was trained on codes of tokenizer ")
    assert text.endswith("or start a new run.")


def test_resuming_from_the_other_stage_is_refused(
    capsys, generator_runs, tokenizer_run, digits, tmp_path
):
    of_generator, of_tokenizer = (
        find_checkpoint(p) for p in (generator_runs["text"], tokenizer_run)
    )
    config = generator_config(tmp_path / "g", digits, tokenizer_run, kind="text")
    text = answer(capsys, tmp_path / "g", config, f"--ckpt_path={of_tokenizer}")
    assert text.startswith("the checkpoint is not one of a LitGenerator run")
    config = tokenizer_config(tmp_path / "t", digits)
    text = answer(capsys, tmp_path / "t", config, f"--ckpt_path={of_generator}")
    assert text.startswith("the checkpoint is not one of a LitTokenizer run")


def test_a_generator_as_tokenizer_is_refused(capsys, generator_runs, digits, tmp_path):
    config = generator_config(tmp_path, digits, generator_runs["class"], kind="class")
    assert "is no checkpoint of a tokenizer run" in answer(capsys, tmp_path, config)


def test_a_missing_tokenizer_is_refused(capsys, digits, tmp_path):
    config = generator_config(tmp_path, digits, tmp_path / "runs" / "none", kind="class")
    assert "none': it does not exist. Train one first" in answer(capsys, tmp_path, config)


# --- starting from another run --------------------------------------------------------------------


def test_a_new_run_starts_from_the_averaged_weights_of_another(
    tokenizer_run, generator_runs, digits
):
    tokenizer = LitTokenizer(TINY_TOKENIZER, init_from=str(tokenizer_run))  # type: ignore[arg-type]
    tokenizer.configure_model()
    assert weights_hash(tokenizer.tokenizer) == weights_hash(load_tokenizer(tokenizer_run))

    trained = load_generator(generator_runs["text"])
    settings = dict(trained.hparams) | {"init_from": str(generator_runs["text"])}
    started = LitGenerator(**settings)
    started.configure_model()
    assert weights_hash(started) == weights_hash(trained)
    assert started.samples_seen == 0
    assert any(parameter.requires_grad for parameter in started.parameters())


def test_hyper_parameters_alone_rebuild_the_module(tokenizer_run, generator_runs):
    for folder, kind in ((tokenizer_run, LitTokenizer), (generator_runs["class"], LitGenerator)):
        stored = read_checkpoint(folder)["hyper_parameters"]
        assert dict(kind(**stored).hparams) == stored
