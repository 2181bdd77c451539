"""Folders in the layouts of DeepSpeed and FSDP, written by hand: what is read, what refused."""

import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from grn_lightning.lit.checkpoints import averaged_state, find_checkpoint, whole_checkpoint
from grn_lightning.lit.fsdp_folder import load_parts, read_index
from grn_lightning.lit.shards import (
    layout_of,
    read_shards,
    require_divided_alike,
    zero_facts,
)
from grn_lightning.lit.strategies import FSDP

SHAPES = {"net.a": (3, 5), "net.b": (7,), "net.c": (2, 2, 2)}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}


def stretches(tensor: Tensor, world_size: int) -> list[Tensor]:
    """Cut a tensor into equal flat parts; the last one is padded."""
    length = -(-tensor.numel() // world_size)
    flat = torch.zeros(length * world_size)
    flat[: tensor.numel()] = tensor.flatten()
    return list(flat.split(length))


def shapes_of(tensors: dict[str, Tensor]) -> list[Any]:
    return [OrderedDict((name, tensor.shape) for name, tensor in tensors.items())]


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text("checkpoint")
    torch.save(content, folder / "checkpoint" / name)


def optimizer(stage: int, world_size: int, **rest: Any) -> dict[str, Any]:
    return {"optimizer_state_dict": {"zero_stage": stage, "partition_count": world_size, **rest}}


def write_stage_3(folder: Path, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their averages as `world_size` processes write them."""
    state, frozen = weights(), {"net.frozen": torch.arange(9.0).view(3, 3)}
    averages = {name: tensor * 2 for name, tensor in state.items()}
    buffers = {"net.steps": torch.tensor(4)}
    for rank in range(world_size):
        shadows = {name: stretches(t, world_size)[rank] for name, t in averages.items()}
        model = {
            "module": buffers | {name: torch.empty(0) for name in state},
            "buffer_names": list(buffers),
            "param_shapes": shapes_of(state),
            "frozen_param_shapes": shapes_of(frozen)[0],
            "frozen_param_fragments": {
                n: stretches(t, world_size)[rank] for n, t in frozen.items()
            },
            "shared_params": {"net.same": "net.a"},
            "dp_world_size": world_size,
            "samples_seen": 32,
            "callbacks": {"ema": {"shadows": shadows, "num_updates": 3}},
        }
        write(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
        flat = torch.cat([stretches(tensor, world_size)[rank] for tensor in state.values()])
        part = optimizer(3, world_size, fp32_flat_groups=[flat[:4], flat[4:]])
        write(folder, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", part)
    return state | frozen | buffers | {"net.same": state["net.a"]}, averages


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])  # more processes than some have elements
def test_stage_3_is_put_together(world_size, tmp_path):
    expected, averages = write_stage_3(tmp_path, world_size)
    checkpoint = read_shards(tmp_path)
    assert checkpoint.keys() == {"state_dict", "callbacks", "samples_seen"}
    assert checkpoint["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint["state_dict"][name].equal(tensor), name
    state = averaged_state(checkpoint)
    assert all(state[name].equal(average) for name, average in averages.items())
    assert checkpoint["callbacks"]["ema"]["num_updates"] == 3


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_stage_3_float32_weights_come_from_where_they_are(stage, dtype, tmp_path):
    true, groups = weights(), (["net.a", "net.c"], ["net.b"])
    flats = []
    for names in groups:
        flat = torch.cat([true[name].flatten() for name in names])
        flats.append(stretches(flat, 2))
    for rank in range(2):
        part = [flat[rank] for flat in flats]
        content = optimizer(stage, 2, single_partition_of_fp32_groups=part)
        write(tmp_path, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", content)
    model = {
        "module": {name: tensor.to(dtype) for name, tensor in true.items()},
        "buffer_names": [],
        "param_shapes": [shapes_of({name: true[name] for name in names})[0] for names in groups],
        "shared_params": {},
    }
    write(tmp_path, "mp_rank_00_model_states.pt", model)
    state = read_shards(tmp_path)["state_dict"]
    assert state.keys() == true.keys()
    assert all(state[name].equal(tensor) for name, tensor in true.items())
    assert zero_facts(tmp_path).stage == stage


def write_fsdp(folder: Path, **more: Any) -> dict[str, Tensor]:
    """Weights and one average as a process of FSDP writes them."""
    state = weights()
    named = {f"state_dict.{name}": tensor for name, tensor in state.items()}
    named["state_dict.ema.net.a"] = state["net.a"] * 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save in a single process")  # it is
        save(named | more, checkpoint_id=folder, no_dist=True)
    rest = {"samples_seen": 32, "callbacks": {"ema": {"shadows": {}, "num_updates": 3}}}
    torch.save(rest, folder / "meta.pt")
    return state


def test_an_fsdp_folder_is_put_together(tmp_path):
    expected = write_fsdp(tmp_path)
    checkpoint = read_shards(tmp_path)
    assert checkpoint["state_dict"].keys() == expected.keys()
    assert all(checkpoint["state_dict"][name].equal(expected[name]) for name in expected)
    state = averaged_state(checkpoint)
    assert state["net.a"].equal(expected["net.a"] * 2)
    assert state["net.b"].equal(expected["net.b"])
    assert checkpoint["samples_seen"] == 32


# --- refusals -------------------------------------------------------------------------------------


class Stranger:
    """Would be called if it were unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_a_stranger_is_not_unpickled(tmp_path, capsys):
    write_stage_3(tmp_path, 2)
    write(tmp_path, "zero_pp_rank_1_mp_rank_00_optim_states.pt", {"x": Stranger()})
    with pytest.raises(ValueError, match="rank_1_.*cannot be read as a part of a checkpoint"):
        read_shards(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(ValueError, match=r"it names '(builtins|__builtin__).print'"):
        read_index(tmp_path)
    assert capsys.readouterr().out == ""


class Opener:
    """Would open the door if it were unpickled."""

    def __init__(self, door: Path):
        self.door = door

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.door),))


def test_an_index_beside_the_index_is_not_opened(tmp_path):
    """torch looks for `__0.metadata` where `.metadata` lets it stumble, and unpickles that."""
    folder, door = tmp_path / "f", tmp_path / "opened"
    expected = write_fsdp(folder)
    index = read_index(folder)
    index.storage_meta = 5  # type: ignore[assignment]  # takes no attributes
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "__0.metadata").write_bytes(pickle.dumps(Opener(door)))
    assert read_shards(folder)["state_dict"]["net.a"].equal(expected["net.a"])
    assert not door.exists()


def test_settings_in_an_fsdp_folder_are_plain_data(tmp_path, capsys):
    plain = {"lr": 0.5, "betas": (0.9, 0.95), "params": ["net.a"]}
    write_fsdp(tmp_path / "good", optimizer_0=plain)
    found: dict[str, Any] = {"optimizer_0": dict.fromkeys(plain)}
    load_parts(found, tmp_path / "good", is_alone=True)
    assert found["optimizer_0"] == plain
    write_fsdp(tmp_path / "evil", optimizer_0={"lr": Stranger()})
    with pytest.raises(ValueError, match="evil' cannot be read.*'optimizer_0.lr' is damaged or"):
        load_parts({"optimizer_0": {"lr": None}}, tmp_path / "evil", is_alone=True)
    assert capsys.readouterr().out == ""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


class Linear(L.LightningModule):
    """Two weights and their moments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 3)


def test_training_under_fsdp_does_not_go_on_from_a_stranger(alone, tmp_path, capsys):
    module, strategy = Linear(), FSDP()
    fully_shard(module, mesh=alone)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
    strategy._lightning_module, strategy.optimizers = module, [optimizer]
    settings = get_optimizer_state_dict(module, optimizer)
    state = {"state_dict": module.state_dict(), "optimizer_0": settings}
    save(state, checkpoint_id=tmp_path / "good")
    before = module.net.weight.full_tensor().clone()
    with torch.no_grad():
        module.net.weight.zero_()
    optimizer.param_groups[0]["lr"] = 0.25
    strategy._load_divided(tmp_path / "good")
    assert module.net.weight.full_tensor().equal(before)
    assert optimizer.param_groups[0]["lr"] == 0.5
    settings["param_groups"][0]["lr"] = Stranger()  # type: ignore[index]
    save(state, checkpoint_id=tmp_path / "evil")
    with pytest.raises(ValueError, match="optimizer_0.param_groups.*is damaged or more than plain"):
        strategy._load_divided(tmp_path / "evil")
    assert capsys.readouterr().out == ""


def test_a_damaged_part_is_refused(tmp_path):
    write_fsdp(tmp_path)
    [part] = tmp_path.glob("*.distcp")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint: .*Take another"):
        read_shards(tmp_path)


def test_what_is_missing_or_unfinished_is_named(tmp_path):
    write_stage_3(tmp_path, 2)
    part = tmp_path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"missing \[\], unfinished \['{part.name}'\]"):
        whole_checkpoint(tmp_path)
    part.unlink()
    (tmp_path / "latest").unlink()
    with pytest.raises(ValueError, match=rf"missing \['latest', '{part.name}'\]"):
        whole_checkpoint(tmp_path)


def test_training_goes_on_as_it_was_divided_or_not_at_all(tmp_path):
    write_stage_3(tmp_path / "z", 2)
    require_divided_alike(tmp_path / "z", stage=3, world_size=2)
    with pytest.raises(ValueError, match="divided among 2 processes, and 4 are running"):
        require_divided_alike(tmp_path / "z", stage=3, world_size=4)
    with pytest.raises(ValueError, match="written by ZeRO stage 3, and this is stage 2"):
        require_divided_alike(tmp_path / "z", stage=2, world_size=2)
    torch.save({}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="was not written by DeepSpeed"):
        require_divided_alike(tmp_path / "file.ckpt", stage=2, world_size=2)


def test_layouts_are_told_apart(tmp_path):
    assert layout_of(tmp_path) is None
    torch.save({}, tmp_path / "file.ckpt")
    assert layout_of(tmp_path / "file.ckpt") == "file"
    write_stage_3(tmp_path / "run" / "last.ckpt", 2)
    assert layout_of(tmp_path / "run" / "last.ckpt") == "zero"
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "last.ckpt"
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "meta.pt").write_bytes(b"")
    assert layout_of(tmp_path / "f") == "fsdp"


def test_what_an_allowed_module_has_imported_is_not_allowed(tmp_path: Path) -> None:
    names = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getcwd\x93)R."
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + names)
    (tmp_path / "meta.pt").write_bytes(b"")
    for read in (read_index, read_shards):
        with pytest.raises(ValueError, match=r"it names '.*metadata\.os\.getcwd'"):
            read(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    write_fsdp(tmp_path)
    index = read_index(tmp_path)
    for info in index.storage_data.values():
        info.relative_path = "../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"names the file '../secret', which is not in the folder"):
        read_shards(tmp_path)
