"""Whoever is killed while saving leaves the checkpoint before, or the new one; never none or half.

A kill is played by an exception at every call that changes the disk, before and behind it. The code
under test handles no exception on its way, so that nothing is tidied up.
"""

import contextlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from grn_lightning.lit import saving
from grn_lightning.lit.saving import (
    COMPLETE,
    WholeCheckpointIO,
    checksum,
    link,
    note_complete,
    replace_folder,
    save_whole,
    sizes_of,
    unfinished_name,
)

ENOUGH = 40  # more calls than any save makes


class Killed(BaseException):
    """What a kill looks like from inside."""


class Killer:
    """Ends everything at the n-th call of what it watches."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int):
        self.left, self.has_struck = last, False
        for name in ("fsync", "replace", "rename", "unlink", "symlink"):
            patch.setattr(os, name, self.around(getattr(os, name)))
        patch.setattr(shutil, "rmtree", self.around(shutil.rmtree))
        patch.setattr(saving.torch, "save", self.around(torch.save))

    def strike(self) -> None:
        self.left -= 1
        if self.left < 0 and not self.has_struck:
            self.has_struck = True
            raise Killed

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **settings: Any) -> Any:
            self.strike()
            result = function(*args, **settings)
            self.strike()
            return result

        return watched


def killed_everywhere(save: Callable[[Path], None], make: Callable[[Path], None], root: Path
                      ) -> Iterator[Path]:  # fmt: skip
    """Yield, for every call inside `save`, a folder in which it was killed there."""
    for last in range(ENOUGH):
        folder = root / str(last)
        folder.mkdir()
        make(folder)
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, last)
            with contextlib.suppress(Killed):
                save(folder)
        if not killer.has_struck:
            assert last > 4
            return
        yield folder
    raise AssertionError("more calls than expected")


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    found = []

    def make(folder: Path) -> None:
        WholeCheckpointIO().save_checkpoint({"step": 1}, folder / "last.ckpt")

    def save(folder: Path) -> None:
        WholeCheckpointIO().save_checkpoint({"step": 2}, folder / "last.ckpt")

    for folder in killed_everywhere(save, make, tmp_path):
        found.append(torch.load(folder / "last.ckpt", weights_only=True)["step"])
        assert len(list(folder.glob("*.ckpt"))) == 1
        save(folder)  # what was left behind is in nobody's way
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == 2
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(os, "fsync", lambda handle: told.append(os.fstat(handle).st_ino))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (told.append("named"), replace(*paths)))
    WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    inodes = [(tmp_path / "last.ckpt").stat().st_ino, tmp_path.stat().st_ino]
    assert told == [inodes[0], "named", inodes[1]]


def test_an_address_of_a_store_is_left_to_lightning(monkeypatch):
    sent = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda *args: sent.append(args[2]))
    WholeCheckpointIO().save_checkpoint({}, "s3://bucket/last.ckpt")
    assert sent == ["s3://bucket/last.ckpt"]


# --- links and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["link", "folder"])
def test_a_link_never_points_to_nothing(tmp_path, before):
    def make(folder: Path) -> None:
        for name in ("step=1.ckpt", "step=2.ckpt"):
            (folder / name).mkdir()
        if before == "link":
            (folder / "last.ckpt").symlink_to("step=1.ckpt")
        else:
            (folder / "last.ckpt").mkdir()

    for folder in killed_everywhere(
        lambda folder: link(folder / "last.ckpt", folder / "step=2.ckpt"), make, tmp_path
    ):
        last = folder / "last.ckpt"
        assert last.exists() or (before == "folder" and not last.is_symlink())
        link(last, folder / "step=2.ckpt")
        assert last.resolve() == (folder / "step=2.ckpt").resolve()


def write_parts(folder: Path, step: int, number: int = 2) -> None:
    """A folder as several processes write it."""
    folder.mkdir(exist_ok=True)
    for rank in range(number):
        (folder / f"part_{rank}.pt").write_bytes(bytes([step]) * (100 + rank))


def steps_of(folder: Path) -> set[int]:
    return {path.read_bytes()[0] for path in folder.glob("part_*.pt")}


def test_a_folder_is_the_old_one_or_the_new_one_under_one_of_two_names(tmp_path):
    def make(folder: Path) -> None:
        write_parts(folder / "last.ckpt", 1)
        note_complete(folder / "last.ckpt", {})

    def save(folder: Path) -> None:
        part = unfinished_name(folder / "last.ckpt")
        write_parts(part, 2)
        note_complete(part, {})
        replace_folder(part, folder / "last.ckpt")

    for folder in killed_everywhere(save, make, tmp_path):
        places = (folder / "last.ckpt", unfinished_name(folder / "last.ckpt"))
        complete = [place for place in places if (place / COMPLETE).is_file()]
        assert complete
        for place in complete:
            noted = json.loads((place / COMPLETE).read_text())["files"]
            assert noted == sizes_of(place)
            assert len(steps_of(place)) == 1


def test_the_note_names_every_file_its_size_and_its_checksum(tmp_path):
    write_parts(tmp_path / "x.ckpt", 1, number=3)
    sums = {
        name: f"{zlib.crc32((tmp_path / 'x.ckpt' / name).read_bytes()):08x}"
        for name in ("part_0.pt", "part_1.pt", "part_2.pt")
    }
    note_complete(tmp_path / "x.ckpt", {"global_step": 7})
    note = json.loads((tmp_path / "x.ckpt" / COMPLETE).read_text())
    assert note == {
        "global_step": 7,
        "files": {"part_0.pt": 100, "part_1.pt": 101, "part_2.pt": 102},
        "crc32": sums,
    }


def test_a_checksum_is_that_of_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_CHUNK", 7)
    content = bytes(range(100))
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file") == zlib.crc32(content)


class Ranks(SimpleNamespace):
    """A strategy of two processes, of which this is the first; the other one sees no files."""

    global_rank, world_size, root_device = 0, 2, torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self, name: str) -> None:
        pass

    def reduce(self, mine: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        assert [value > 0 for value in mine.tolist()] == [True, False, True]
        return mine


def trainer_writing(kind: str, step: int) -> Any:
    """A trainer whose strategy writes files or folders."""

    def save(path: Path, weights_only: bool) -> None:
        if kind == "folder":
            write_parts(path, step, number=3)
        else:
            WholeCheckpointIO().save_checkpoint({"step": step}, path)

    return SimpleNamespace(
        strategy=Ranks(checkpoint_io=None),
        is_global_zero=True,
        global_step=step,
        world_size=2,
        save_checkpoint=save,
    )


def test_what_no_other_process_sees_is_summed_up_by_the_first(tmp_path):
    save_whole(trainer_writing("folder", 3), tmp_path / "last.ckpt")
    noted = json.loads((tmp_path / "last.ckpt" / COMPLETE).read_text())["crc32"]
    assert noted.keys() == {"part_0.pt", "part_1.pt", "part_2.pt"}
    assert all(
        int(value, 16) == checksum(tmp_path / "last.ckpt" / name) for name, value in noted.items()
    )


@pytest.mark.parametrize(("before", "after"), [("folder", "file"), ("file", "folder")])
def test_a_file_and_a_folder_give_way_to_each_other(tmp_path, before, after):
    """As when a run goes on with a strategy that stores in another way, at any kill."""

    def make(folder: Path) -> None:
        save_whole(trainer_writing(before, 1), folder / "last.ckpt")
        left = unfinished_name(folder / "last.ckpt")  # of an interrupted save
        if before == "folder":
            write_parts(left, 1)
        else:
            left.write_bytes(b"half")

    def save(folder: Path) -> None:
        save_whole(trainer_writing(after, 2), folder / "last.ckpt")

    for folder in killed_everywhere(save, make, tmp_path):
        places = (folder / "last.ckpt", unfinished_name(folder / "last.ckpt"))
        whole = [
            place for place in places if (place / COMPLETE).is_file() or zipfile.is_zipfile(place)
        ]
        assert whole
        save(folder)  # what was left behind is in nobody's way
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        assert (folder / "last.ckpt").is_dir() == (after == "folder")


def test_a_link_and_a_file_do_not_stumble_over_a_folder_that_was_left(tmp_path):
    write_parts(tmp_path / "step=1.ckpt", 1)
    write_parts(unfinished_name(tmp_path / "last.ckpt"), 1)
    link(tmp_path / "last.ckpt", tmp_path / "step=1.ckpt")
    assert (tmp_path / "last.ckpt").resolve() == tmp_path / "step=1.ckpt"
    write_parts(unfinished_name(tmp_path / "step=2.ckpt"), 1)
    WholeCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "step=2.ckpt")
    assert zipfile.is_zipfile(tmp_path / "step=2.ckpt")
