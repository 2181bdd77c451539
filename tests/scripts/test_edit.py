"""`grn edit`: every task from the command line, and what it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grn_lightning.media.images import decode_image, encode_png
from grn_lightning.media.video import decode_video, encode_mp4
from grn_lightning.pipelines.editing import InpaintConfig
from grn_lightning.pipelines.plans import TASKS, EditPlan, read_frames
from grn_lightning.samplers import EditConfig, RefineConfig
from grn_lightning.scripts.edit import edit
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)
SIZE = (16, 16)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Seven frames of noise, stored without loss."""
    pixels = torch.randint(0, 256, (7, 3, *SIZE), dtype=torch.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(pixels, fps=5, lossless=True))
    return tmp_path / "clip.mp4"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    file.write_bytes(encode_png(torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)))
    return file


def frames_of(file: Path) -> torch.Tensor:
    return decode_video(file, fps=None, num_frames=None)


def test_a_mask_says_what_is_drawn_and_the_rest_stays(
    trained: Runs, picture: Path, tmp_path: Path
) -> None:
    mask = torch.zeros(3, *SIZE, dtype=torch.uint8)
    mask[:, :, 8:] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(mask))
    report = edit(
        trained.classes,
        "inpaint",
        source=picture,
        mask=tmp_path / "mask.png",
        class_label=3,
        num_samples=2,
        out=tmp_path / "out",
        refine=QUICK,
    )
    given = decode_image(picture.read_bytes())
    results = [decode_image(file.read_bytes()) for file in report.files]
    for result in results:
        assert result[..., :8].equal(given[..., :8])
        assert not result[..., 8:].equal(given[..., 8:])
    assert not results[0].equal(results[1])
    assert [file.name for file in report.files] == [
        f"0000{n}-inpaint-class-3.png" for n in range(2)
    ]
    facts = json.loads((report.folder / "samples.json").read_text())
    assert [row["recipe"]["sample_index"] for row in facts["samples"]] == [0, 1]
    assert report.sheet.is_file()


def test_a_box_does_what_its_mask_does(trained: Runs, picture: Path, tmp_path: Path) -> None:
    mask = torch.zeros(3, *SIZE, dtype=torch.uint8)
    mask[:, 8:12, 4:] = 200
    (tmp_path / "mask.png").write_bytes(encode_png(mask))
    common: dict[str, Any] = {"source": picture, "class_label": 3, "refine": QUICK}
    first = edit(
        trained.classes, "inpaint", mask=tmp_path / "mask.png", out=tmp_path / "a", **common
    )
    second = edit(trained.classes, "inpaint", box=(8, 4, 4, 12), out=tmp_path / "b", **common)
    pixels = [decode_image(report.files[0].read_bytes()) for report in (first, second)]
    assert pixels[0].equal(pixels[1])


LENGTHS = {
    "inpaint": (["--box=[0,0,8,16]"], (5, 16, 16)),
    "outpaint": (["--borders=[8,0,0,8]"], (5, 24, 24)),
    "extend": (["--num_frames=12", "--overlap=3"], (12, 16, 16)),
    "vary": (["--start_time=0.4"], (5, 16, 16)),
    "swap": (["--source_prompt=the digit three"], (5, 16, 16)),
}


@pytest.mark.parametrize("task", LENGTHS)
def test_every_task_is_a_command(trained: Runs, clip: Path, tmp_path: Path, task: str) -> None:
    options, (frames, height, width) = LENGTHS[task]
    report = call_grn(
        "edit",
        trained.text,
        task,
        f"--source={clip}",
        "--prompt=the digit eight",
        f"--out={tmp_path / 'out'}",
        "--refine.num_steps=2",
        *options,
    )
    result = frames_of(report.files[0])
    assert result.shape == (frames, 3, height, width)
    with Image.open(io.BytesIO(report.sheet.read_bytes())) as sheet:
        assert sheet.info["duration"] == 200  # five frames per second, as the source


@pytest.mark.parametrize("ends", [("first",), ("last",), ("first", "last")])
def test_frames_stand_at_the_ends(
    trained: Runs, picture: Path, clip: Path, tmp_path: Path, ends: tuple[str, ...]
) -> None:
    files: dict[str, Any] = {name: picture if name == "first" else clip for name in ends}
    report = edit(trained.text, "frames", **files, out=tmp_path / "out", refine=QUICK)
    assert frames_of(report.files[0]).shape == (5, 3, *SIZE)
    rows = json.loads((report.folder / "samples.json").read_text())["samples"]
    assert set(rows[0]["recipe"]["files"]) == set(ends)


def test_a_swap_without_a_source_draws_one(trained: Runs, tmp_path: Path) -> None:
    report = edit(
        trained.text,
        "swap",
        source_prompt="the digit three moves up",
        prompt="the digit eight moves up",
        out=tmp_path / "out",
        refine=QUICK,
        rules=EditConfig(position_threshold=0.0),
    )
    assert frames_of(report.files[0]).shape == (5, 3, *SIZE)


def test_a_clip_that_is_read_as_a_picture_gives_its_frames(clip: Path, picture: Path) -> None:
    assert read_frames(clip, num_frames=3, size=(8, 8)).shape == (1, 3, 3, 8, 8)
    assert read_frames(picture, num_frames=3, size=(8, 8)).shape == (1, 3, 1, 8, 8)
    assert read_frames(clip, num_frames=None, size=SIZE).shape == (1, 3, 7, *SIZE)


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        ("inpaint", {}, "inpaint needs `--source`.*either `--mask`"),
        ("inpaint", {"source": "x.png", "mask": "m.png", "box": (0, 0, 1, 1)}, "either `--mask`"),
        ("outpaint", {"source": "x.png"}, "outpaint needs `--borders`"),
        ("frames", {}, "frames needs `--first` or `--last`"),
        ("extend", {}, "extend needs `--source`"),
        ("vary", {"source": "x.png", "box": (0, 0, 1, 1)}, "`box` is for inpaint; vary does not"),
        ("swap", {"edges": InpaintConfig(grow=1)}, "`edges` is for inpaint and outpaint; swap"),
        ("swap", {"source": "x.png"}, "what the source shows, `--source_prompt`"),
        ("paint", {}, "`task` must be one of inpaint, outpaint"),
    ],
)
def test_a_plan_without_what_it_needs_is_refused(task: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EditPlan(task=task, size=(1, 16, 16), **options)


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_survives_plain_data(task: Any) -> None:
    needs: dict[str, dict[str, Any]] = {
        "inpaint": {"source": "x.png", "box": (0, 0, 1, 1), "edges": InpaintConfig(blend=None)},
        "outpaint": {"source": "x.png", "borders": (0, 0, 1, 1)},
        "frames": {"first": "x.png", "last": "y.png"},
        "extend": {"source": "x.mp4", "num_frames": 9, "overlap": 3},
        "vary": {"source": "x.png", "start_time": 0.2},
        "swap": {
            "source_condition": {"captions": "a"},
            "rules": EditConfig(position_threshold=-float("inf")),
        },
    }
    plan = EditPlan(task=task, size=(5, 16, 16), **needs[task])
    again = EditPlan.from_plain(json.loads(json.dumps(plan.as_plain())))
    assert again == plan


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": Path("missing.png")}, "`--source`: there is no file 'missing.png'"),
        ({"num_samples": 0, "fps": -1.0}, "`num_samples`.*`fps`"),
        ({"prompt": "x", "class_label": 3}, "give `--class_labels`"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    trained: Runs, picture: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    given: dict[str, Any] = {"source": picture, "class_label": 3} | options
    with pytest.raises(ValueError, match=match):
        edit(trained.classes, "vary", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_kind_is_refused(trained: Runs, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.png .*is no picture"):
        edit(trained.classes, "vary", source=tmp_path / "x.png", class_label=1, refine=QUICK)
