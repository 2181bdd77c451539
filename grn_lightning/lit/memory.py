"""Memory of a training step, found by taking it without memory.

Tensors that have sizes but no contents ("fake") let the stage's own `training_step`, the gradients
and the optimizer run in seconds for a network of any size; whoever keeps a tensor keeps its fake,
and what is alive at every moment can be added up. What kernels take for themselves and give back
before they return is not seen.

The other design, a formula per network, lost. The customary one, 34 bytes per token, width and
block in half precision (Korthikanti et al. 2022), told 33 % and 46 % too little for the peak of two
trainings of `benchmarks/plan_memory.py`: it knows neither what autograd keeps of this code, nor
which casts autocast makes, nor noise, logits and whatever the optimizer needs for a moment.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive; fake ones and real ones alike.

    Attributes:
        live: Bytes at this moment.
        peak: Most bytes since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, each storage once."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name not in self._known:
            size = storage.nbytes()
            self._known.add(name)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, name, size).atexit = False
        return tensor

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


class AnsweredQuestions(TorchDispatchMode):
    """Answers what code asks a tensor without contents.

    Masks are said to have gaps, and no caption to have been dropped: the dearer branch in both
    cases. Numbers are 1.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, but for the one that reads a value."""
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device that holds everything."""

    parameters: int
    """Of networks that are trained."""
    frozen: int
    """Of networks that are not: the tokenizer."""
    gradients: int
    """Of all gradients together."""
    optimizer: int
    """State of the optimizer."""
    average: int
    """Moving average."""
    compute: int
    """Most bytes alive from the batch to the last gradient, everything above included."""
    update: int
    """Most bytes alive while optimizer and average are moved, likewise."""

    @property
    def states(self) -> int:
        """Whatever stays from step to step, gradients included: they live until the next loss."""
        return self.parameters + self.frozen + self.gradients + self.optimizer + self.average

    @property
    def activations(self) -> int:
        """Most that forward and backward need above the states."""
        return max(0, self.compute - self.states)

    @property
    def peak(self) -> int:
        """Most bytes alive."""
        return max(self.compute, self.update)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Add up the storages of tensors, each once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor)]


@dataclass
class TracedStep:
    """A training as Lightning runs it, in its order: loss, old gradients away, gradients, update.

    Attributes:
        module: What is trained.
        frozen: Networks that lie beside it.
        optimizer: Moves it.
        loss_of: Returns the loss of a micro-batch, by its number.
        autocast: Context of the loss.
        num_micro_batches: Whose gradients add up to a step.
        averaged: Parameters that have an average.
        clip: Largest norm of the gradients; 0 for any.
    """

    module: nn.Module
    frozen: tuple[nn.Module, ...]
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[int], Tensor]
    autocast: Callable[[], Any]
    num_micro_batches: int = 1
    averaged: tuple[nn.Parameter, ...] = ()
    clip: float = 0.0

    def _micro_batch(self, number: int) -> None:
        with self.autocast():
            loss = self.loss_of(number)
        if number == 0:
            self.optimizer.zero_grad()
        (loss / self.num_micro_batches).backward()

    def _closure(self) -> None:
        self._micro_batch(self.num_micro_batches - 1)
        if self.clip:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def steps(self, shadows: list[Tensor], on_update: Callable[[], None]) -> Iterator[None]:
        """Take steps, for ever.

        Args:
            shadows: The average, moved in place.
            on_update: Called between the last gradient and the update.
        """
        while True:
            for number in range(self.num_micro_batches - 1):
                self._micro_batch(number)

            def closure() -> float:
                self._closure()
                on_update()
                return 0.0

            self.optimizer.step(closure)
            if shadows:
                sources = [p.detach().float() for p in self.averaged]
                with torch.no_grad():
                    torch._foreach_lerp_(shadows, sources, 1e-4)
                del sources
            yield

    def measure(self, live: LiveBytes) -> StepMemory:
        """Take two steps, of which the second finds all states in place, and look at the second.

        Args:
            live: Counts, and has been entered before the step's tensors were made, or has been told
                of them.
        """
        shadows = [p.detach().to(torch.float32, copy=True) for p in self.averaged]
        compute: list[int] = []

        def on_update() -> None:
            compute.append(live.peak)
            live.restart()

        steps = self.steps(shadows, on_update)
        next(steps)
        live.restart()
        next(steps)
        tensors = [*self.module.parameters(), *self.module.buffers()]
        frozen = [
            tensor for part in self.frozen for tensor in (*part.parameters(), *part.buffers())
        ]
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return StepMemory(
            parameters=bytes_of(tensors),
            frozen=bytes_of(frozen),
            gradients=bytes_of(gradients),
            optimizer=bytes_of(state_tensors(self.optimizer)),
            average=bytes_of(shadows),
            compute=compute[-1],
            update=live.peak,
        )


@contextmanager
def without_memory() -> Iterator[LiveBytes]:
    """Let tensors that are made here have sizes but no contents, and count them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), AnsweredQuestions(), LiveBytes() as live:
        yield live
