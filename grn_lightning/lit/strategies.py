"""Strategies by name: DeepSpeed's ZeRO and torch's FSDP, on GPUs and, to try and test, on CPUs.

A YAML says `trainer.strategy: deepspeed_zero2` and nothing else changes: weights start as those of
one process, bfloat16 means autocast over float32 weights, the average is kept, and a checkpoint is
read by everything that reads one. What a strategy cannot do is refused before the first step.

| name | each process keeps its part of |
|---|---|
| `deepspeed_zero1` | the optimizer's state |
| `deepspeed_zero2` | and of the gradients |
| `deepspeed_zero3` | and of the weights |
| `deepspeed_zero2_offload`, `deepspeed_zero3_offload` | the same, in the memory of the host |
| `fsdp` | optimizer's state, gradients and weights; a checkpoint is a folder of parts |
| `fsdp_full` | the same; a checkpoint is one file, as of one process |
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.fsdp_folder import load_parts
from grn_lightning.lit.parts import blocks_of
from grn_lightning.lit.shards import (
    EMA_PREFIX,
    EMA_STATE,
    layout_of,
    load_part,
    read_rest,
    require_divided_alike,
    require_whole,
    stored_averages,
)

WAYS_IN = ("encode_text",)
"""Methods that use weights of a network past its `forward`."""

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""


# --- DeepSpeed ------------------------------------------------------------------------------------


class ZeroAutocast(DeepSpeedPrecision):
    """What `bf16-mixed` means everywhere else: float32 weights, bfloat16 where autocast says so.

    DeepSpeed's engine switches autocast on; Lightning's own reading of the name would cast the
    weights.
    """

    def __init__(self) -> None:
        super().__init__("32-true")


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020) for one optimizer that moves elements one by one.

    The network is built whole on every process, in the memory of the host, and then divided: a
    module that initializes the weights of its children would find them gone otherwise.

    Args:
        stage: 1 divides the optimizer's state, 2 also gradients, 3 also weights.
        offload: Keep in the memory of the host what is divided, and move the weights there.
        options: Entries of `zero_optimization` of a DeepSpeed configuration, such as
            `stage3_param_persistence_threshold`: weights with fewer elements stay whole.
        timeout: How long a process waits for the others.

    Raises:
        ValueError: If there is no such stage.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        options: dict[str, Any] | None = None,
        timeout: timedelta = PATIENCE,
    ):
        if stage not in (1, 2, 3):
            raise ValueError(f"`stage` must be 1, 2 or 3, got {stage!r}.")
        if offload and stage == 1:
            raise ValueError("`offload` needs stage 2 or 3, got 1.")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            logging_batch_size_per_gpu=1,
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        # torch's AdamW moves what is offloaded; DeepSpeed's own would be compiled first.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["zero_optimization"].update(options or {})

    @property
    def stage(self) -> int:
        """Stage of ZeRO."""
        assert isinstance(self.config, dict)
        return self.config["zero_optimization"]["stage"]

    @property
    def root_device(self) -> torch.device:
        """Device of this process; DeepSpeed wants a number even of a CPU."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    @property
    def asked_precision(self) -> str:
        """Precision of the products, as `trainer.precision` said it; the trainer says 32-true."""
        is_cast = isinstance(self.precision_plugin, ZeroAutocast)
        return "bf16-mixed" if is_cast else str(self.precision_plugin.precision)

    def setup_environment(self) -> None:
        """Start the processes; Lightning's own refuses CPUs.

        Raises:
            ValueError: If the module asks for what ZeRO cannot do.
        """
        refuse_unfit(self, self.lightning_module)
        if self.precision_plugin.precision == "bf16-mixed":
            self.precision_plugin = ZeroAutocast()
            assert isinstance(self.config, dict)
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # gradients are added up in float32
            }
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the processes; CPUs have no number that could be checked."""
        if super().root_device.type != "cpu":
            super().setup_distributed()
            return
        import deepspeed

        # A faster sum for processes of one machine, which would have to be compiled first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build whole; `setup` divides."""
        self._init_config_if_needed()
        yield

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the weights, then hand over to DeepSpeed."""
        self._init_config_if_needed()
        if self.stage == 3:
            import deepspeed

            assert self.model is not None
            for module in self.model.modules():
                if isinstance(module, nn.MultiheadAttention):  # reads the weights of its child
                    deepspeed.utils.set_z3_leaf_module(module, True)
            move_buffers(self.model, self.root_device)
            model = self.precision_plugin.convert_module(self.model)
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config)
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients; Lightning has divided the loss by the batches that add up already.

        DeepSpeed would do so once more, and clip at a multiple of `gradient_clip_val`.
        """
        return super().backward(closure_loss, *args, scale_wrt_gas=False, **kwargs)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what goes on training as it was divided, and everything else as one process would.

        Raises:
            ValueError: If training cannot go on from there with this strategy.
        """
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return read_checkpoint(checkpoint_path)
        require_divided_alike(Path(checkpoint_path), stage=self.stage, world_size=self.world_size)
        # DeepSpeed would unpickle whatever there is.
        self.deepspeed_engine.checkpoint_engine.load = lambda path, map_location=None: load_part(
            Path(path), is_for_deepspeed=True
        )
        return super().load_checkpoint(checkpoint_path, weights_only=None)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; those of a training have been loaded before."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            return
        if self.stage == 3:
            self._restore_zero_state(checkpoint, strict=strict)
        else:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)


def move_buffers(network: nn.Module, device: torch.device) -> None:
    """Move everything that is no parameter."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


# --- FSDP -----------------------------------------------------------------------------------------


class FSDP(ModelParallelStrategy):
    """torch's fully sharded data parallelism, parameter by parameter (`fully_shard`).

    Every block is a unit: its weights are gathered when it is reached and let go behind it.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a folder to which every process writes
            its part; else the first one gathers everything and writes one file.
        timeout: How long a process waits for the others.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, timeout: timedelta = PATIENCE):
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=timeout)

    def setup_environment(self) -> None:
        """Start the processes; all of them share the data, none a matrix product.

        Raises:
            ValueError: If the module asks for what FSDP cannot do.
        """
        refuse_unfit(self, self.lightning_module)
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Divide the averaged networks block by block."""
        # Views are returned here and there; nothing changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        module = self.lightning_module
        assert module is not None
        for name in getattr(module, "averaged", ()):
            network = getattr(module, name, None)
            if isinstance(network, nn.Module) and any(True for _ in network.parameters()):
                self._divide(network)
        super().setup(trainer)

    def _divide(self, network: nn.Module) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (*blocks_of(network), network):
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh)
        for name in WAYS_IN:
            if hasattr(network, name):
                register_fsdp_forward_method(network, name)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the average like the weights: in parts, or whole."""
        callbacks = checkpoint.get("callbacks", {})
        if EMA_STATE in callbacks:
            divided = self._as_divided(callbacks[EMA_STATE]["shadows"])
            if self._save_distributed_checkpoint:
                shadows: dict[str, Tensor] = {}
                named = {f"{EMA_PREFIX}{name}": shadow for name, shadow in divided.items()}
                checkpoint["state_dict"] = checkpoint["state_dict"] | named
            else:
                shadows = {name: shadow.full_tensor().cpu() for name, shadow in divided.items()}
            average = callbacks[EMA_STATE] | {"shadows": shadows}
            checkpoint["callbacks"] = callbacks | {EMA_STATE: average}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _as_divided(self, shadows: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """Tell torch of which tensors the averages of this process are parts."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        divided = {}
        for name, shadow in shadows.items():
            like = parameters[name]
            assert isinstance(like, DTensor)
            divided[name] = DTensor.from_local(
                shadow,
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        return divided

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what goes on training in parts, and everything else as one process would.

        Raises:
            ValueError: If training cannot go on from there with this strategy.
        """
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return read_checkpoint(path)
        if layout_of(path) == "zero":
            raise ValueError(
                f"'{path}' was written by DeepSpeed: go on with its strategy, or start from its "
                "weights by `model.init_from`."
            )
        if layout_of(path) == "file":
            return self._read_file(path)
        require_whole(path)
        self._load_divided(path)
        checkpoint = read_rest(path)
        state = checkpoint.get("callbacks", {}).get(EMA_STATE)
        if state is not None:
            state["shadows"] = self._read_shadows(path)
        return checkpoint

    def _load_divided(self, path: Path) -> None:
        """Read this process's part of weights and moments.

        Lightning would do so with torch's own reader, which unpickles.
        """
        module = self.lightning_module
        assert module is not None
        weights: dict[str, Any] = {"state_dict": get_model_state_dict(module)}
        load_parts(weights, path)
        module.load_state_dict(weights["state_dict"], strict=module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            moments: dict[str, Any] = {name: get_optimizer_state_dict(module, optimizer)}
            load_parts(moments, path)
            set_optimizer_state_dict(
                module,
                optimizer,
                moments[name],
                options=StateDictOptions(cpu_offload=True),
            )

    def _read_file(self, path: Path) -> dict[str, Any]:
        """Divide the weights and moments that one process, DDP or `fsdp_full` has written."""
        module, [optimizer] = self.lightning_module, self.optimizers
        assert module is not None
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        _load_raw_module_state(checkpoint.pop("state_dict"), module, strict=module.strict_loading)
        set_optimizer_state_dict(
            module,
            optimizer,
            by_name(checkpoint["optimizer_states"][0], self._names_of(optimizer)),
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        return checkpoint

    def _names_of(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimizer's parameters, in its order."""
        assert self.lightning_module is not None
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state to be stored: this process's part, or on the first process all of it.

        Lightning would number the parameters of a whole state in the order of the module, where
        every other strategy numbers them in the order of the optimizer.
        """
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning has wrapped it
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.lightning_module, optimizer, options=options)
        return by_number(state) if self.is_global_zero else {}

    def _read_shadows(self, path: Path) -> dict[str, Tensor]:
        """Read this process's part of the average."""
        assert self.lightning_module is not None
        stored = stored_averages(path)
        shadows = {
            name: torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in self.lightning_module.named_parameters()
            if name in stored
        }
        named = {f"state_dict.{EMA_PREFIX}{name}": shadow for name, shadow in shadows.items()}
        load_parts(named, path)
        return {name: shadow.to_local() for name, shadow in shadows.items()}  # type: ignore[attr-defined]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; those of a training have been loaded before."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            _load_raw_module_state(checkpoint["state_dict"], self.lightning_module, strict=strict)


def by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """Call the parameters of an optimizer's state by their number, as one process does.

    Args:
        state: `state` and `param_groups`, with names of parameters.
    """
    groups = state["param_groups"]
    numbers = {n: i for i, n in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: moments for name, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ],
    }


def by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Call the parameters of an optimizer's state by their names; undoes `by_number`."""
    groups = state["param_groups"]
    return {
        "state": {names[number]: moments for number, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in groups
        ],
    }


def asked_precision(trainer: L.Trainer) -> str:
    """Return what `trainer.precision` was set to, also where a strategy has its own way to it."""
    strategy = trainer.strategy
    return strategy.asked_precision if isinstance(strategy, ZeRO) else str(trainer.precision)


# --- what does not go together --------------------------------------------------------------------


def refuse_unfit(strategy: Strategy, module: L.LightningModule | None) -> None:
    """Refuse what a strategy cannot do for a module, before anything is built.

    Raises:
        ValueError: Naming what can.
    """
    refuse_lightnings_own(strategy)
    if module is None or not isinstance(strategy, ZeRO | FSDP):
        return
    name = f"ZeRO stage {strategy.stage}" if isinstance(strategy, ZeRO) else "FSDP"
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} trains with one optimizer, and {type(module).__name__} has one for each "
            "player; set `trainer.strategy: ddp`."
        )
    if (precision := strategy.precision_plugin.precision) not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"{name} trains float32 weights, got `trainer.precision: {precision}`; take "
            "bf16-mixed, which computes in bfloat16, or 32-true."
        )
    optim = getattr(module, "optim", None)
    if isinstance(strategy, ZeRO) and getattr(optim, "name", None) == "muon":
        raise ValueError(
            f"{name} cuts the optimizer's state wherever it falls, and Muon orthogonalizes whole "
            "matrices; set `model.optim.name: adamw`, or `trainer.strategy` to fsdp or ddp."
        )
    trainer = module._trainer
    is_predicting = trainer is not None and trainer.state.fn == TrainerFn.PREDICTING
    if is_predicting and not (isinstance(strategy, ZeRO) and strategy.stage < 3):
        raise ValueError(
            f"{name} divides the weights, and processes that predict ask for them in their own "
            "time; set `trainer.strategy: ddp`, which reads the same checkpoints."
        )


def refuse_lightnings_own(strategy: Strategy | type | str | None) -> None:
    """Refuse strategies of Lightning that divide a network in their own way.

    The average of a process would be one of its pieces, or none.

    Args:
        strategy: A strategy, its class, or a name that Lightning knows.

    Raises:
        ValueError: Naming ours.
    """
    kind: Any = strategy
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        kind = StrategyRegistry[strategy]["strategy"]
    kind = kind if isinstance(kind, type) else type(kind)
    divides = issubclass(kind, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)
    if divides and not issubclass(kind, ZeRO | FSDP):
        name = f"'{strategy}', " if isinstance(strategy, str) else ""
        raise ValueError(
            f"`trainer.strategy` is {name}Lightning's own {kind.__name__}, which loses the "
            f"average; set it to {', '.join(STRATEGIES)} or, with settings of your own, to the "
            f"class ZeRO or FSDP of {ZeRO.__module__}."
        )


# --- names ----------------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "deepspeed_zero1": lambda: ZeRO(1),
    "deepspeed_zero2": lambda: ZeRO(2),
    "deepspeed_zero2_offload": lambda: ZeRO(2, offload=True),
    "deepspeed_zero3": lambda: ZeRO(3),
    "deepspeed_zero3_offload": lambda: ZeRO(3, offload=True),
    "fsdp": FSDP,
    "fsdp_full": lambda: FSDP(save_distributed_checkpoint=False),
}
"""Named strategies of this package; "ddp" and "auto" are Lightning's."""

LIGHTNINGS_OWN = {
    "deepspeed": "deepspeed_zero2",
    "deepspeed_stage_1": "deepspeed_zero1",
    "deepspeed_stage_2": "deepspeed_zero2",
    "deepspeed_stage_2_offload": "deepspeed_zero2_offload",
    "deepspeed_stage_3": "deepspeed_zero3",
    "deepspeed_stage_3_offload": "deepspeed_zero3_offload",
}
"""Names for which Lightning has a strategy that loses the average; ours takes their place."""


def named_strategy(name: Any, *, accelerator: Any = "auto") -> Any:
    """Return the strategy of a name; what is no name of ours stays as it is.

    Args:
        name: What a configuration says.
        accelerator: What it says beside it; DeepSpeed looks for a GPU unless that is "cpu".

    Raises:
        ValueError: If it is a strategy of Lightning that ours take the place of, or of nobody.
    """
    if accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    build = STRATEGIES.get(LIGHTNINGS_OWN.get(name, name)) if isinstance(name, str) else None
    if build is not None:
        return build()
    if isinstance(name, str) and name != "auto" and name not in StrategyRegistry:
        near = get_close_matches(name, [*STRATEGIES, *StrategyRegistry.available_strategies()], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`trainer.strategy` must be 'auto', one of {', '.join(map(repr, STRATEGIES))}, or one "
            f"of Lightning's such as 'ddp', got {name!r}.{hint}"
        )
    refuse_lightnings_own(name)
    return name
