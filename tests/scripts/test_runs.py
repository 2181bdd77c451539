"""What a checkpoint says of its run, and what size its samples have."""

from pathlib import Path
from typing import Any

import pytest

from grn_lightning.scripts.runs import ClipSize, TrainedRun, choose_device, open_run
from tests.scripts.conftest import Runs


def run_on(*sources: dict[str, Any], **data: Any) -> TrainedRun:
    return TrainedRun(Path("x.ckpt"), "generator", 0, 0, {"sources": list(sources), **data})


STILLS = {"path": "a", "media": "image", "num_frames": 1, "image_size": None}
SHORT = {"path": "b", "media": "video", "num_frames": 5, "image_size": [16, 24]}
LONG = {"path": "c", "media": "video", "num_frames": 9, "image_size": None}


def test_a_checkpoint_knows_its_stage_and_folder(trained: Runs) -> None:
    for folder, stage in zip(trained, ("tokenizer", "generator", "generator"), strict=True):
        run = open_run(folder)
        assert (run.stage, run.folder, run.step, run.samples_seen) == (stage, folder, 4, 16)
    lonely = TrainedRun(Path("here/x.ckpt"), "tokenizer", 0, 0, {})
    assert lonely.folder == Path("here")


def test_the_longest_source_of_a_medium_counts_unless_another_lies_at_the_path() -> None:
    run = run_on(LONG, STILLS, SHORT)
    assert run.source() == LONG
    assert run.source(media="image") == STILLS
    assert run.source(media="video", path=Path("./b")) == SHORT
    assert run.source(media="video", path=Path("elsewhere")) == LONG
    assert run_on(STILLS).source(media="video") == {}


def test_what_is_asked_for_goes_before_the_training() -> None:
    run = run_on(LONG, SHORT, image_size=[32, 32])
    assert run.choose_size(LONG, num_frames=None, image_size=None) == ClipSize(9, 32, 32)
    assert run.choose_size(SHORT, num_frames=None, image_size=None) == ClipSize(5, 16, 24)
    assert run.choose_size(LONG, num_frames=1, image_size=(8, 12)) == ClipSize(1, 8, 12)
    with pytest.raises(ValueError, match="does not tell the size"):
        run_on(image_size=[32, 32]).choose_size({}, num_frames=None, image_size=None)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("fast", "meta"):
        with pytest.raises(ValueError, match=f"`device` must be 'auto', 'cpu' or .* got '{name}'"):
            choose_device(name)
