r"""Global refinement sampling: draw the whole map, keep a growing part, draw it all again (GRN).

The algorithm, for one batch of samples on a grid of any rank:

    1. Draw a random map ``x_0``, every element uniform over the alphabet. It stays fixed; start
       from ``x_t = x_0`` at ``t = t_0 = 0``.
    2. For every step ``i = 0 .. S - 1``, with ``t = t_i`` and ``t_next = t_{i+1}``:
       a. ask the generator for the logits of *every* element given ``x_t`` and ``t``: both branches
          in one call where the guidance scale is not 1, the conditional branch alone where it is;
       b. note the entropy of the conditional branch, before guidance and temperature; where steps
          are adaptive, the one at the decision step says how many there are (`stopping`);
       c. guide, divide by the temperature, and draw every element on its own: ``x_hat``;
       d. draw a fresh mask, True with probability ``t_next`` for every element, and mix:
          ``x_t = x_hat`` where True, ``x_0`` elsewhere.
    3. Return the last complete sample ``x_hat``. Since ``t_S = 1`` keeps everything, it is also
       the last ``x_t``: no element of the answer is left unpredicted.

Choices where the published samplers differ from one another:

* ``t`` is the nominal value of the schedule, as published for class-conditional sampling, or, with
  ``realised_time``, the share of elements that were kept, as published for text.
* Every walk ends by keeping everything. Where the published cosine grid stays below a cap, the last
  prediction is returned whole as well, only without being called a step.
* The branch without a condition is skipped where it would have no weight; published code computes
  and discards it.
* Every random number is a function of (seed, sample index, step, purpose, element), every decision
  one of the sample alone. If the generator maps a row to the same logits in any batch, a sample is
  the same in any batch, at any place in it, on any rank, whoever else leaves or comes. A network
  does so up to rounding; ``rows_per_call`` makes it exact.
* Samples walk on their own: in one batch they may stand at different steps, and one that is done
  leaves the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grn_lightning.samplers.conditions import Condition
from grn_lightning.samplers.config import RefineConfig as RefineConfig
from grn_lightning.samplers.config import Step as Step
from grn_lightning.samplers.constraints import Constraint
from grn_lightning.samplers.pool import Finished, RefineJob, RefinePool, Requests
from grn_lightning.samplers.results import ForwardCount as ForwardCount
from grn_lightning.samplers.results import Generator as Generator
from grn_lightning.samplers.results import RefineResult as RefineResult
from grn_lightning.samplers.results import StepInfo as StepInfo


def _in_order(groups: list[Finished], num_forwards: ForwardCount) -> RefineResult:
    """Put samples that were done at different steps back into the order of their requests."""
    tickets = torch.tensor([number for group in groups for number in group.tickets])
    codes, curves = (
        torch.cat(parts) if len(parts) > 1 else parts[0]
        for parts in zip(*((group.codes, group.entropy) for group in groups), strict=True)
    )
    counts = [
        torch.tensor([n for group in groups for n in getattr(group, name)], device=codes.device)
        for name in ("num_steps", "num_evaluations")
    ]
    num_steps, num_evaluations = counts
    if len(groups) > 1:
        order = tickets.argsort().to(codes.device)
        codes, curves = codes[order], curves[order]
        num_steps, num_evaluations = num_steps[order], num_evaluations[order]
    most = max(n for group in groups for n in group.num_steps)
    return RefineResult(codes, num_forwards, curves[:, :most].t(), num_steps, num_evaluations)


@torch.no_grad()
def refine(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    condition: Condition,
    null_condition: Condition | None = None,
    sample_index: Tensor,
    seed: int,
    alphabet_size: int,
    config: RefineConfig,
    observer: Callable[[StepInfo], None] | None = None,
    constraint: Constraint | None = None,
) -> RefineResult:
    """Draw one batch of samples by global refinement.

    Args:
        generator: Callable `(codes, t, condition) -> logits`; it is asked in the mode (evaluation,
            autocast, compiled) in which the caller left it.
        shape: Elements of one sample, `(c, *grid)`.
        condition: What to draw, `b` rows.
        null_condition: What guidance steers away from: `b` rows, or one that serves all. Needed
            only if some step is guided.
        sample_index: `(b,)` long, the running number of every sample; with `seed` it fixes all
            random numbers of that sample. Everything is computed on its device.
        seed: Another seed gives other samples.
        alphabet_size: Number of values `k` of an element.
        config: Steps, guidance, temperature.
        observer: Called with a `StepInfo` after every step.
        constraint: Elements that are known beforehand, and where to start. The answer has exactly
            the known codes.

    Returns:
        Codes `(b, c, *grid)`, number of forwards and entropies; without adaptive steps the forwards
        are `num_steps` calls with `b (num_steps + guided steps)` rows. A constraint that starts
        later leaves out the steps before.

    Raises:
        ValueError: If rows do not match, if guidance lacks its null condition, if the constraint
            does not fit, or if the generator returns logits of another shape.
    """
    if len(sample_index) == 0:
        empty = sample_index.new_empty(0)
        codes = sample_index.new_empty(0, *shape)
        return RefineResult(codes, ForwardCount(0, 0), torch.empty(0, 0), empty, empty)
    job = RefineJob(generator, tuple(shape), seed, alphabet_size, config, observer)
    tickets = list(range(len(sample_index)))
    pool = RefinePool(job, Requests(tickets, sample_index, condition, null_condition, constraint))
    groups = []
    while pool.num_active:
        finished = pool.step()
        if finished is not None:
            groups.append(finished)
            if config.compact:
                pool.compact()
    return _in_order(groups, pool.num_forwards)
