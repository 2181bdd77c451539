"""Which validations a callback takes part in: said by the training's position, not the process's.

A checkpoint may be older than the validation of its own step, so that a count in it would be one
behind. Lightning counts batches over resumptions, and validates by that count.
"""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


def is_nth_validation(trainer: L.Trainer, *, every: int, so_far: int) -> bool:
    """Whether this validation is the first of a training, or every n-th one behind it.

    A resumed training goes on counting. Outside of a training every validation is one.

    Args:
        trainer: In its validation.
        every: Take part in every n-th one.
        so_far: Validations before this one, for trainers that do not validate every so many
            batches, but by epochs or by the clock; these count anew in every process.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return True
    between = trainer.val_check_interval
    if isinstance(between, int):
        so_far = (trainer.fit_loop.total_batch_idx + 1) // between - 1
    return so_far % every == 0
