"""The last checkpoint is the last step's, whatever the interval."""

from pathlib import Path

import pytest

from grn_lightning.lit.checkpoints import read_checkpoint
from tests.tiny_runs import callback, fit, tokenizer_config


@pytest.mark.parametrize(("every", "max_steps"), [(3, 4), (2, 4), (9, 4)])
def test_the_end_of_training_is_saved(
    digits: Path, tmp_path: Path, every: int, max_steps: int
) -> None:
    folder = tmp_path / "checkpoints"
    saving = callback("Checkpoint", dirpath=str(folder), every_n_train_steps=every, save_last=True)
    config = tokenizer_config(
        tmp_path, digits, callbacks=[saving], trainer={"max_steps": max_steps}
    )
    fit(tmp_path, config)
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == max_steps
