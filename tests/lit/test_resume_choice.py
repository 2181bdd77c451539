"""Which checkpoint a run goes on from, and what is said about those that are passed over."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grn_lightning.lit.callbacks.resume import SameStart
from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.examine import Saved, examine, misfit
from grn_lightning.lit.resume import (
    Start,
    choose,
    finish_save,
    go_on_in_place,
    is_own,
    make_ready,
    newest_valid,
    place_of,
    run_folders,
    survey,
)
from grn_lightning.lit.saving import COMPLETE, note_complete
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.tokenizer import TokenizerConfig
from tests.tiny_runs import (
    TINY_TOKENIZER,
    call_grn,
    callback,
    fit,
    logger,
    tokenizer_config,
    write_yaml,
)

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")


def content(step: int, **rest: Any) -> dict[str, Any]:
    """What a checkpoint of a tiny tokenizer holds, but for its weights."""
    return {
        "state_dict": {"weight": torch.arange(1000.0)},
        "global_step": step,
        "samples_seen": 4 * step,
        "loops": {},
        "optimizer_states": [],
        "hyper_parameters": {"tokenizer": TINY_TOKENIZER},
        **rest,
    }


def save(path: Path, step: int, **rest: Any) -> Path:
    """Write a checkpoint whose time is that of its step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content(step, **rest), path)
    os.utime(path, (step, step))
    return path


def save_parts(path: Path, step: int) -> Path:
    """Write a folder as FSDP does, but for its index."""
    path.mkdir(parents=True)
    torch.save({key: value for key, value in content(step).items() if key != "state_dict"},
               path / "meta.pt")  # fmt: skip
    return path


@pytest.fixture
def module() -> LitTokenizer:
    return LitTokenizer(TokenizerConfig(**TINY_TOKENIZER))


# --- one checkpoint -------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change a byte among the weights."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.tensor(999.0).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(whole)


def rewrite(**change: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        whole = content(1, **change)
        torch.save({key: value for key, value in whole.items() if value is not None}, path)

    return write


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "is cut off"),
        (lambda path: path.write_bytes(b""), "is cut off"),
        (flip, "is damaged: '.*' in it has another checksum"),
        (rewrite(optimizer_states=None), "holds weights only: no training can go on"),
        (rewrite(state_dict=None), "is no checkpoint of a run"),
        (rewrite(extra=Path("x")), "holds more than tensors and plain data"),
        (Path.unlink, "does not exist"),
    ],
)
def test_every_way_to_be_unfit_has_its_reason(tmp_path, spoil, reason):
    path = save(tmp_path / "last.ckpt", 1)
    assert examine(path).step == 1
    spoil(path)
    with pytest.raises(ValueError, match=f"^{reason}"):
        examine(path)


def test_a_network_of_another_size_is_another_model(module):
    assert misfit(content(1), module) is None
    other = {"tokenizer": TINY_TOKENIZER | {"encoder_width": 32}}
    assert misfit(content(1, hyper_parameters=other), module) == (
        "is of another model: its `tokenizer.encoder_width` is 32, this run's is 16"
    )
    stage = {"generator": {"depth": 2}}
    assert misfit(content(1, hyper_parameters=stage), module) == (
        "is of another model: not one that LitTokenizer trains"
    )


def test_what_is_no_size_does_not_make_another_model(module):
    changed = {"tokenizer": TINY_TOKENIZER, "optim": {"lr": 1.0}, "seed": 7}
    assert misfit(content(1, hyper_parameters=changed), module) is None
    older = {key: value for key, value in TINY_TOKENIZER.items() if key != "patch_size"}
    assert misfit(content(1, hyper_parameters={"tokenizer": older}), module) is None


# --- folders of parts -----------------------------------------------------------------------------


def zero_folder(path: Path, step: int, processes: int = 2) -> Path:
    """Write a folder as ZeRO's stage 2 does."""
    parts = path / "checkpoint"
    parts.mkdir(parents=True)
    facts = {key: value for key, value in content(step).items() if key != "state_dict"}
    torch.save({**facts, "module": {}}, parts / "mp_rank_00_model_states.pt")
    for rank in range(processes):
        state = {"zero_stage": 2, "partition_count": processes}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, parts / name)
    (path / "latest").write_text("checkpoint")
    return path


def test_a_folder_is_whole_with_all_its_parts(tmp_path):
    folder = zero_folder(tmp_path / "last.ckpt", 6)
    assert examine(folder).step == 6
    lost = next(folder.glob("checkpoint/*rank_1*"))
    lost.rename(tmp_path / lost.name)
    with pytest.raises(ValueError, match=f"^is unfinished: missing .*{lost.name}"):
        examine(folder)
    shutil.copy(tmp_path / lost.name, lost)
    cut(lost)
    with pytest.raises(ValueError, match=f"^is unfinished: .*{lost.name}"):
        examine(folder)


def test_a_folder_that_differs_from_its_note_is_passed_over(tmp_path):
    folder = zero_folder(tmp_path / "last.ckpt", 6)
    note_complete(folder, {})
    (folder / "latest").write_text("check")
    with pytest.raises(ValueError, match="^is damaged: 'latest' has 5 bytes, not 10"):
        examine(folder)
    (folder / "latest").unlink()
    with pytest.raises(ValueError, match="^is unfinished: 'latest' is missing"):
        examine(folder)


def fsdp_folder(path: Path, step: int) -> Path:
    """Write a folder as FSDP does on one process: the weights are in no archive."""
    save_parts(path, step)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save.* in a single process")
        state = {"state_dict": content(step)["state_dict"]}
        torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("is_old", [False, True])
def test_weights_outside_of_archives_have_checksums(tmp_path, is_old):
    folder = fsdp_folder(tmp_path / "last.ckpt", 6)
    note_complete(folder, {"global_step": 6})
    if is_old:
        note = json.loads((folder / COMPLETE).read_text())
        del note["crc32"]
        (folder / COMPLETE).write_text(json.dumps(note))
    assert examine(folder).step == 6
    flip(folder / "__0_0.distcp")
    assert examine(folder, reads_all=False).step == 6
    if is_old:
        assert examine(folder).step == 6  # sizes are all that it has noted
        return
    with pytest.raises(ValueError, match="^is damaged: '__0_0.distcp' in it has another checksum"):
        examine(folder)


def test_sizes_are_compared_where_bytes_are_not(tmp_path):
    folder, file = fsdp_folder(tmp_path / "a.ckpt", 6), save(tmp_path / "b.ckpt", 7)
    note_complete(folder, {})
    for path in (folder / "__0_0.distcp", file):
        cut(path)
    with pytest.raises(ValueError, match="^is damaged: '__0_0.distcp' has .* bytes, not"):
        examine(folder, reads_all=False)
    with pytest.raises(ValueError, match="^is cut off"):
        examine(file, reads_all=False)


def test_an_empty_folder_is_unfinished(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(ValueError, match="^is unfinished: the folder holds no checkpoint"):
        examine(tmp_path / "last.ckpt")


def test_a_complete_folder_that_waits_for_its_name_is_found_and_gets_it(tmp_path):
    zero_folder(tmp_path / "last.ckpt", 6)
    waiting = zero_folder(tmp_path / ".last.ckpt.part", 8)
    assert survey(tmp_path).newest.step == 6  # it is not complete without a note
    note_complete(waiting, {})
    found = survey(tmp_path).newest
    assert (found.path, found.step) == (waiting, 8)
    assert place_of(found) == tmp_path / "last.ckpt"
    finish_save(found)
    assert examine(tmp_path / "last.ckpt").step == 8
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# --- all of a run ---------------------------------------------------------------------------------


def test_the_newest_that_is_fit_is_taken_and_the_others_are_named(tmp_path, module):
    save(tmp_path / "a" / "step=1.ckpt", 1)
    expected = save(tmp_path / "a" / "step=2.ckpt", 2)
    cut(save(tmp_path / "b" / "last.ckpt", 3))
    os.utime(tmp_path / "b" / "last.ckpt", (3, 3))
    other = {"tokenizer": TINY_TOKENIZER | {"num_rounds": 3}}
    save(tmp_path / "b" / "other.ckpt", 4, hyper_parameters=other)
    (tmp_path / "b" / "gone.ckpt").symlink_to("nowhere.ckpt")
    found = survey(tmp_path, module=module)
    assert found.newest.path == expected
    assert [(path.name, reason.split(",")[0]) for path, reason in found.skipped] == [
        ("gone.ckpt", "points to nothing"),
        ("other.ckpt", "is of another model: its `tokenizer.num_rounds` is 3"),
        ("last.ckpt", "is cut off"),
    ]
    assert newest_valid(tmp_path, module=module) == expected
    assert newest_valid(tmp_path).name == "other.ckpt"


def test_a_link_is_what_it_points_to(tmp_path):
    save(tmp_path / "step=1.ckpt", 1)
    expected = save(tmp_path / "step=2.ckpt", 2)
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    assert survey(tmp_path).newest.path == expected
    assert newest_valid(tmp_path / "last.ckpt") == expected


def test_none_that_is_fit_is_refused_with_all_reasons(tmp_path):
    for step in (1, 2):
        cut(save(tmp_path / f"step={step}.ckpt", step))
    with pytest.raises(ValueError, match=r"no checkpoint .* fit .*'.*=\d.ckpt' is cut .*'.*=\d.c"):
        newest_valid(tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint under '.*empty'"):
        newest_valid(tmp_path / "empty")


# --- a run ----------------------------------------------------------------------------------------


def trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults = {"logger": TensorBoardLogger(folder, "name"), "callbacks": [ModelCheckpoint()]}
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_steps=9,
        enable_progress_bar=False, **(defaults | options),
    )  # fmt: skip


def test_a_run_lies_where_its_checkpoints_and_its_logger_say(tmp_path):
    assert run_folders(trainer(tmp_path)) == [tmp_path / "name"]
    numbered = CSVLogger(tmp_path, "name", version=3)
    assert run_folders(trainer(tmp_path, logger=numbered)) == [tmp_path / "name" / "version_3"]
    assert run_folders(trainer(tmp_path, logger=False)) == [tmp_path / "checkpoints"]
    elsewhere = [ModelCheckpoint(tmp_path / "elsewhere")]
    assert run_folders(trainer(tmp_path, callbacks=elsewhere)) == [tmp_path / "elsewhere"]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package has told."""
    return [
        record.getMessage() for record in caplog.records if record.name.endswith("grn_lightning")
    ]


def test_auto_begins_only_where_there_is_nothing(tmp_path, module, caplog):
    caplog.set_level("INFO", "lightning.pytorch.grn_lightning")
    assert choose("none", trainer(tmp_path), module) is None
    assert choose(None, trainer(tmp_path), module) is None
    assert told(caplog) == []
    assert choose("auto", trainer(tmp_path), module) is None
    assert told(caplog) == [
        f"resume: no checkpoint under '{tmp_path}/name' yet, so the run begins."
    ]
    cut(save(tmp_path / "name" / "version_0" / "checkpoints" / "last.ckpt", 3))
    with pytest.raises(ValueError, match="fit to go on from: .* is cut off.*Nothing was begun"):
        choose("auto", trainer(tmp_path), module)
    with pytest.raises(ValueError, match="there is no checkpoint under '.*version_7'"):
        choose(str(tmp_path / "version_7"), trainer(tmp_path), module)


def test_what_was_chosen_and_skipped_is_told(tmp_path, module, caplog):
    caplog.set_level("INFO", "lightning.pytorch.grn_lightning")
    folder = tmp_path / "name" / "version_0" / "checkpoints"
    save(folder / "step=9.ckpt", 9)
    cut(save(folder / "last.ckpt", 10))
    os.utime(folder / "last.ckpt", (10, 10))
    saved = choose("auto", trainer(tmp_path), module)
    assert saved is not None
    assert saved.step == 9
    skipped, chosen = told(caplog)
    assert "last.ckpt', which is cut off" in skipped
    assert chosen.endswith("step 9 after 36 samples; all 9 steps of `trainer.max_steps` are done.")


def test_a_path_is_a_folder_or_a_checkpoint(tmp_path, module):
    first = save(tmp_path / "name" / "version_0" / "checkpoints" / "last.ckpt", 3)
    second = save(tmp_path / "name" / "version_1" / "checkpoints" / "last.ckpt", 4)
    for path, expected in (
        (first, first), (first.parents[1], first), (tmp_path, second),
    ):  # fmt: skip
        saved = choose(str(path), trainer(tmp_path), module)
        assert saved is not None
        assert saved.path == expected


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_loggers_go_on_where_the_run_lies(tmp_path, module, kind):
    path = save(tmp_path / "name" / "version_4" / "checkpoints" / "last.ckpt", 3)
    table = path.parents[1] / "metrics.csv"
    table.write_text("loss\n1\n")
    run = trainer(tmp_path, logger=kind(tmp_path, "name"))
    go_on_in_place(run, examine(path))
    assert Path(run.logger.log_dir) == path.parents[1]
    if kind is TensorBoardLogger:
        assert run.logger._kwargs["purge_step"] == 3
    else:
        assert table.with_name("metrics-1.csv").read_text() == "loss\n1\n"
    own = trainer(tmp_path, logger=kind(tmp_path, "name", version="mine"))
    go_on_in_place(own, examine(path))
    assert Path(own.logger.log_dir) == tmp_path / "name" / "mine"


@pytest.mark.parametrize("is_link", [False, True])
def test_a_last_one_that_is_older_becomes_what_is_gone_on_from(tmp_path, is_link):
    """As after a kill between the two, with nothing left to train."""
    first, second = (save(tmp_path / f"step={step}.ckpt", step) for step in (1, 2))
    last = tmp_path / "last.ckpt"
    if is_link:
        last.symlink_to(first.name)
    else:
        save(last, 1)
        os.utime(last, (9, 9))  # times say nothing
    finish_save(examine(second))
    assert examine(last).step == 2
    assert last.is_symlink() == is_link


@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_a_last_one_that_is_unfit_becomes_what_is_gone_on_from(tmp_path, spoil):
    path = save(tmp_path / "step=2.ckpt", 2)
    spoil(save(tmp_path / "end.ckpt", 3))
    (tmp_path / "last.ckpt").symlink_to("end.ckpt")
    finish_save(examine(path))
    assert examine(tmp_path / "last.ckpt").step == 2


@pytest.mark.parametrize("make", [save, zero_folder])
def test_a_later_last_one_stays_whatever_the_times_say(tmp_path, make):
    first, last = make(tmp_path / "step=1.ckpt", 1), make(tmp_path / "last.ckpt", 2)
    for path in (first, *first.rglob("*")):
        os.utime(path, (2e9, 2e9))  # as of a copy
    assert newest_valid(tmp_path) == last
    finish_save(examine(first))
    assert examine(last).step == 2
    assert not last.is_symlink()


def test_between_runs_the_last_written_counts_and_within_one_the_step(tmp_path):
    save(tmp_path / "version_0" / "last.ckpt", 1000)
    expected = save(tmp_path / "version_1" / "last.ckpt", 20)
    os.utime(save(tmp_path / "version_1" / "step=10.ckpt", 10), (2e9, 2e9))
    assert newest_valid(tmp_path) == expected


def gone_back(folder: Path, **options: Any) -> Start:
    return Start(examine(folder / "step=1.ckpt"), **({"is_auto": False, "is_own": True} | options))


def test_what_is_later_than_where_a_run_goes_back_to_is_kept(tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch.grn_lightning")
    for step in (1, 2):
        save(tmp_path / f"step={step}.ckpt", step)
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    note_complete(zero_folder(tmp_path / ".last.ckpt.part", 3), {})
    make_ready(gone_back(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"step=1.ckpt", "later-1"}
    assert examine(tmp_path / "later-1" / "last.ckpt").step == 2
    assert examine(tmp_path / "later-1" / "last-1.ckpt").step == 3
    assert told(caplog) == [f"resume: moved checkpoints of later steps to '{tmp_path}/later-1'."]

    assert newest_valid(tmp_path).name == "step=1.ckpt"  # they are not gone on from by chance
    assert examine(newest_valid(tmp_path / "later-1")).step == 3
    save(tmp_path / "last.ckpt", 5)
    make_ready(gone_back(tmp_path))
    assert examine(tmp_path / "later-2" / "last.ckpt").step == 5


def test_the_folder_of_another_run_is_only_read(tmp_path, module):
    theirs = tmp_path / "theirs" / "version_0" / "checkpoints"
    save(theirs / "step=2.ckpt", 2)
    save(theirs / "last.ckpt", 1)
    waiting = zero_folder(theirs / ".end.ckpt.part", 3)
    note_complete(waiting, {})
    before = sorted(path.name for path in theirs.iterdir())
    for path, place in ((theirs / "step=2.ckpt", None), (waiting, theirs / "end.ckpt")):
        saved = examine(path)
        run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, "mine"))
        start = Start(saved, is_auto=False, is_own=is_own(run, saved))
        make_ready(start)
        assert start.path == path
        assert sorted(path.name for path in theirs.iterdir()) == before
        run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, "theirs"))
        assert Start(saved, is_auto=False, is_own=is_own(run, saved)).path == (place or path)


def test_going_on_from_a_path_leaves_an_older_last_one(tmp_path):
    path, last = save(tmp_path / "step=1.ckpt", 2), save(tmp_path / "last.ckpt", 1)
    make_ready(gone_back(tmp_path))
    assert (examine(path).step, examine(last).step) == (2, 1)
    make_ready(gone_back(tmp_path, is_auto=True))
    assert (examine(path).step, examine(last).step) == (2, 2)


# --- several processes ----------------------------------------------------------------------------


def start_from(path: Path, step: int) -> SameStart:
    start = SameStart()
    start.start = Start(Saved(path, step, {}), is_auto=True, is_own=True)
    return start


def hears(run: L.Trainer, path: str | None) -> L.Trainer:
    """Let a process hear what the first one has chosen."""
    run.strategy.broadcast = lambda value, src=0: path  # type: ignore[method-assign]
    run.strategy.global_rank = 1
    return run


def test_processes_that_see_different_checkpoints_are_refused(tmp_path, module):
    with pytest.raises(
        ValueError, match="different checkpoints, the first one 'theirs.ckpt', this"
    ):
        start_from(tmp_path / "mine.ckpt", 1).setup(
            hears(trainer(tmp_path), "theirs.ckpt"), module, "fit"
        )
    with pytest.raises(ValueError, match="different checkpoints, the first one None, this"):
        start_from(tmp_path / "mine.ckpt", 1).setup(hears(trainer(tmp_path), None), module, "fit")


def test_only_the_first_process_reads_every_byte(tmp_path, module, monkeypatch):
    """Damage that sizes do not show is seen by the first process, and the others follow it."""
    folder = tmp_path / "name" / "version_0" / "checkpoints"
    older = save(folder / "step=1.ckpt", 1)
    flip(save(folder / "last.ckpt", 2))
    run = trainer(tmp_path)
    assert choose("auto", run, module).step == 1
    monkeypatch.setattr(type(run), "local_rank", 1)
    mine = choose("auto", run, module)
    assert mine.step == 2

    restored = []
    connector = run._checkpoint_connector
    monkeypatch.setattr(connector, "resume_start", lambda path, **rest: restored.append(path))
    start_from(mine.path, mine.step).setup(hears(run, str(older)), module, "fit")
    connector.resume_start(str(mine.path), weights_only=None)
    assert restored == [str(older)]


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.scale
def test_a_run_goes_on_in_its_own_folder(digits, tmp_path, capsys):
    config = tokenizer_config(
        tmp_path,
        digits,
        callbacks=[callback("Checkpoint", every_n_train_steps=2, save_last=True)],
        trainer={"logger": logger("TensorBoardLogger", tmp_path)},
    )
    config["trainer"]["logger"]["init_args"]["version"] = None
    config["resume"] = "auto"
    for max_steps in (4, 6, 6):
        fit(tmp_path, config, f"--trainer.max_steps={max_steps}")
    [run] = (tmp_path / "log").iterdir()
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 6
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    before, now = ((run / name).read_text() for name in ("config-1.yaml", "config.yaml"))
    assert before.replace("max_steps: 4", "max_steps: 6") == now
    assert not (run / "config-2.yaml").exists()

    for path in (run / "checkpoints").iterdir():
        cut(path)
    for options, message in (
        ([], "is fit to go on from: "),
        (["--ckpt_path", str(path)], "cannot be read as a checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            call_grn("fit", "-c", tmp_path / "run.yaml", *options)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert len(list((tmp_path / "log").iterdir())) == 1


def test_two_ways_to_go_on_are_refused(digits, tmp_path, capsys):
    save(tmp_path / "a.ckpt", 1)
    file = write_yaml(tmp_path, tokenizer_config(tmp_path, digits))
    with pytest.raises(SystemExit):
        call_grn("fit", "-c", file, "--resume=auto", f"--ckpt_path={tmp_path / 'a.ckpt'}")
    assert "give either `resume` ('auto') or `ckpt_path`" in capsys.readouterr().err


# --- strategies -----------------------------------------------------------------------------------


def test_parts_of_another_strategy_are_refused_with_a_way(tmp_path, module):
    folder = zero_folder(tmp_path / "last.ckpt", 6)
    with pytest.raises(
        ValueError, match=r"by deepspeed_zero2 on 2 processes, .* SingleDevice.*`model.init_from`"
    ):
        choose(str(folder), trainer(tmp_path), module)
