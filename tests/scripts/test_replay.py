"""`grn replay`: the same pixels from what a file says, or one sentence why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.media.images import decode_image, encode_png
from grn_lightning.media.video import encode_mp4
from grn_lightning.pipelines.recipes import read_recipes
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.edit import edit
from grn_lightning.scripts.replay import replay
from grn_lightning.scripts.sample import sample
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "clip.mp4"
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    file.write_bytes(encode_mp4(pixels, fps=5, lossless=True))
    return file


@pytest.fixture(scope="module")
def made(trained: Runs, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two variations of a clip."""
    out = tmp_path_factory.mktemp("made") / "out"
    return edit(
        trained.text,
        "vary",
        source=source,
        prompt="the digit two moves up",
        start_time=0.3,
        num_samples=2,
        out=out,
        refine=QUICK,
        seed=5,
    ).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be written to."""
    return shutil.copytree(made, tmp_path / "made")


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_samples_of_a_batch_are_made_again_alone(trained: Runs, kind: str, tmp_path: Path) -> None:
    wanted = {"prompts": ["seven", "the digit one"]} if kind == "text" else {"class_labels": [7, 1]}
    made = sample(
        getattr(trained, kind), **wanted, num_samples=2, out=tmp_path / "out", refine=QUICK, seed=3
    )
    rows = json.loads((made.folder / "samples.json").read_text())["samples"]
    assert [len(row["entropy"]) for row in rows] == [row["num_steps"] for row in rows] == [3] * 4
    for file, row in zip(made.files, rows, strict=True):
        [recipe] = read_recipes(file).values()
        assert json.loads(recipe.as_note()) == row["recipe"]
        assert recipe.num_steps == row["num_steps"]
    report = replay(made.files[2], out=tmp_path / "one")
    assert report.files[0].read_bytes() == made.files[2].read_bytes()
    whole = replay(made.folder / "samples.json", out=tmp_path / "all")
    assert (whole.same, whole.compared) == (4, 4)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_clip_is_made_again_bit_for_bit(folder: Path, tmp_path: Path, suffix: str) -> None:
    [file] = folder.glob(f"00001*{suffix}")
    moved = file.rename(tmp_path / f"renamed{suffix}")
    report = call_grn("replay", moved, f"--out={tmp_path / 'again'}")
    assert (report.same, report.compared) == (1, 1)
    assert "1 of 1 compared have the same pixels" in str(report)
    again = tmp_path / "again" / f"renamed{suffix}"
    assert again.read_bytes() == moved.read_bytes()


def test_a_list_is_made_again_as_a_whole(folder: Path, tmp_path: Path) -> None:
    report = replay(folder / "samples.json", out=tmp_path / "again")
    assert (report.same, report.compared, len(report.files)) == (2, 2, 2)
    for file in report.files:
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_a_picture_is_made_again_bit_for_bit(trained: Runs, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(encode_png(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)))
    made = edit(
        trained.classes,
        "inpaint",
        source=picture,
        box=(0, 0, 16, 7),
        class_label=4,
        out=tmp_path / "out",
        refine=QUICK,
    )
    report = replay(made.files[0], out=tmp_path / "again")
    first, second = (decode_image(file.read_bytes()) for file in (made.files[0], report.files[0]))
    assert first.equal(second)
    assert report.same == 1


def test_what_another_program_has_saved_is_found_in_the_list(folder: Path, tmp_path: Path) -> None:
    [file] = folder.glob("00000*.mp4")
    file.write_bytes(encode_mp4(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), fps=5))
    report = replay(file, out=tmp_path / "again")
    assert (report.same, report.compared) == (0, 1)  # its pixels are others now


def test_other_weights_are_refused_with_both_hashes(
    folder: Path, runs: Runs, tmp_path: Path
) -> None:
    [file] = folder.glob("00000*.mp4")
    [recipe] = read_recipes(file).values()
    checkpoint = runs.text / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    for state in (
        content["state_dict"],
        *(c["shadows"] for c in content["callbacks"].values() if "shadows" in c),
    ):
        for name, value in state.items():
            if name.startswith("generator.") and value.is_floating_point():
                state[name] = value + 1
    torch.save(content, checkpoint)
    made = recipe.weights["generator"]
    match = rf"made with generator {made}, but what is there \('.*'\) has [0-9a-f]{{16}}"
    with pytest.raises(ValueError, match=match):
        replay(file, checkpoint=runs.text, out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_given_files_must_be_the_same(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file] = folder.glob("00000*.mp4")
    before = source.read_bytes()
    try:
        source.write_bytes(encode_mp4(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), fps=5))
        with pytest.raises(ValueError, match="its source '.*clip.mp4' is another file now: "):
            replay(file, out=tmp_path / "again")
        source.unlink()
        with pytest.raises(ValueError, match="its source '.*clip.mp4' is gone"):
            replay(file, out=tmp_path / "again")
    finally:
        source.write_bytes(before)


def edited(folder: Path, **changes: Any) -> Path:
    """The list with other recipes."""
    file = folder / "samples.json"
    content = json.loads(file.read_text())
    for row in content["samples"]:
        row["recipe"] |= changes
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grn": 7}, "holds a recipe of format 7, this version reads 1"),
        ({"colour": "red"}, "holds a recipe that this version cannot follow .*colour"),
        ({"checkpoint": "gone/away"}, "made with 'gone/away', which is not there"),
    ],
)
def test_recipes_of_other_times_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        replay(edited(folder, **changes), out=tmp_path / "again")


def test_files_without_a_recipe_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    plain.write_bytes(encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="plain.png' does not say how it was made"):
        replay(plain)
    plain.write_bytes(encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8), note="by hand"))
    with pytest.raises(ValueError, match="does not say how it was made"):
        replay(plain)
    with pytest.raises(ValueError, match="there is no file 'nothing.png'"):
        replay(Path("nothing.png"))


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(ValueError, match="`out` must be new or an empty folder"):
        replay(folder / "samples.json", out=folder)
