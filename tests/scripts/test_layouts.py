"""Layouts of GenEval and VBench: the files that their scorers look for, and no others."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.media.images import decode_image
from grn_lightning.media.video import decode_video
from grn_lightning.pipelines.recipes import read_recipes
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.draw_plan import DrawOptions, DrawPlan
from grn_lightning.scripts.evaluate_geneval import evaluate_geneval
from grn_lightning.scripts.evaluate_vbench import evaluate_vbench
from grn_lightning.scripts.layouts import LayoutJob
from grn_lightning.scripts.replay import replay
from grn_lightning.scripts.sample import sample
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

QUICK = RefineConfig(num_steps=2, guidance_scale=2.0)
PICTURES = DrawOptions(num_frames=1, refine=QUICK, seed=3, batch_size=4)
CLIPS = DrawOptions(refine=QUICK, seed=3, batch_size=4)
LINES = [
    '{"tag": "single_object", "include": [{"class": "seven", "count": 1}], "prompt": "a seven"}',
    '{"tag": "position", "prompt": "a one left of a two", "include": []}',
    '{"tag": "colors", "prompt": "a red zero"}',
]
NAMES = ["the digit seven moves left", "A cat, wide-angle; 50% of it.", "ein Bär"]


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(LINES) + "\n")
    return file


@pytest.fixture
def full_info(tmp_path: Path) -> Path:
    rows = [{"prompt_en": name, "dimension": ["x"]} for name in [*NAMES, NAMES[0]]]
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps(rows))
    return file


def files_in(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def read_as_geneval(folder: Path) -> list[tuple[dict[str, Any], list[str]]]:
    """What its scorer walks over: numbered folders, their metadata, pictures with numbers."""
    found = []
    for name in sorted(os.listdir(folder)):
        here = folder / name
        assert here.is_dir()
        assert name.isdigit()
        with open(here / "metadata.jsonl") as file:
            metadata = json.load(file)
        pictures = [n for n in os.listdir(here / "samples") if re.match(r"\d+\.png", n)]
        assert len(pictures) == len(os.listdir(here / "samples"))
        found.append((metadata, sorted(pictures)))
    return found


def read_as_vbench(folder: Path, prompts: list[str]) -> list[Path]:
    """What its standard mode looks for: the suffix of any file, behind every prompt and index."""
    names = os.listdir(folder)
    assert len({Path(name).suffix for name in names}) == 1
    wanted = [f"{prompt}-{index}{Path(names[0]).suffix}" for prompt in prompts for index in (0, 1)]
    assert set(wanted) == set(names)
    return [folder / name for name in wanted]


def test_geneval_finds_its_folders(trained: Runs, metadata: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate_geneval(trained.text, prompts=metadata, out=out, config=PICTURES)
    assert report is not None
    assert report.folder == out / "images"
    four = ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert read_as_geneval(report.folder) == [(json.loads(line), four) for line in LINES]
    assert (report.folder / "00001" / "metadata.jsonl").read_text() == LINES[1] + "\n"
    assert files_in(report.folder / "00002") == sorted(
        ["grid.png", "metadata.jsonl", *(f"samples/{name}" for name in four)]
    )
    pictures = [
        decode_image((report.folder / "00002" / "samples" / name).read_bytes()) for name in four
    ]
    grid = decode_image((report.folder / "00002" / "grid.png").read_bytes())
    rows = [torch.cat(pictures[:2], dim=-1), torch.cat(pictures[2:], dim=-1)]
    assert grid.equal(torch.cat(rows, dim=-2))


def test_vbench_finds_its_videos(trained: Runs, full_info: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate_vbench(trained.text, prompts=full_info, out=out, per_prompt=2, config=CLIPS)
    assert report is not None
    files = read_as_vbench(report.folder, NAMES)  # the prompt of two dimensions has one file
    clips = [decode_video(file, fps=None, num_frames=None) for file in files]
    assert {clip.shape for clip in clips} == {(5, 3, 16, 16)}
    assert len({clip.numpy().tobytes() for clip in clips}) == 6  # every one has noise of its own


def test_a_sample_is_the_one_that_grn_sample_draws(
    trained: Runs, metadata: Path, tmp_path: Path
) -> None:
    report = evaluate_geneval(
        trained.text, prompts=metadata, out=tmp_path / "out", per_prompt=2, config=PICTURES
    )
    assert report is not None
    rows = json.loads(report.list_file.read_text())["samples"]
    assert [row["sample_index"] for row in rows] == list(range(6))
    row = rows[3]
    file = tmp_path / "out" / row["files"][0]
    assert (file.parts[-3:], row["prompt"]) == (
        ("00001", "samples", "0001.png"),
        "a one left of a two",
    )
    again = sample(
        trained.text,
        prompts=row["prompt"],
        first_index=3,
        seed=row["seed"],
        num_frames=1,
        refine=QUICK,
        out=tmp_path / "again",
    )
    assert again.files[0].read_bytes() == file.read_bytes()  # the recipe in it included
    assert replay(file, out=tmp_path / "replayed").same == 1


def test_an_interrupted_job_goes_on(
    trained: Runs, full_info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"prompts": full_info, "per_prompt": 2, "config": CLIPS}
    whole = evaluate_vbench(trained.text, out=tmp_path / "whole", **options)
    write, written = LayoutJob._write, list[int]()

    def dies(self: LayoutJob, number: int, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(LayoutJob, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_vbench(trained.text, out=tmp_path / "cut", **options)
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cut" / "videos").iterdir()}
    assert len(files) == 3
    (tmp_path / "cut" / "unfinished" / "4.mp4").write_bytes(b"half a clip")

    monkeypatch.setattr(LayoutJob, "_write", write)
    draw, drawn = DrawPlan.draw, list[int]()

    def listens(self: DrawPlan, pipeline: Any, wanted: Any, numbers: Any, **rest: Any) -> Any:
        drawn.extend(numbers)
        return draw(self, pipeline, wanted, numbers, **rest)

    monkeypatch.setattr(DrawPlan, "draw", listens)
    again = evaluate_vbench(trained.text, out=tmp_path / "cut", **options)
    assert whole is not None
    assert again is not None
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())  # kept
    assert drawn == [*range(6)]  # in the batches of one go, which round alike
    for first in whole.folder.iterdir():
        assert (again.folder / first.name).read_bytes() == first.read_bytes()
    other = {**options, "config": DrawOptions(refine=RefineConfig(num_steps=3), seed=3)}
    with pytest.raises(ValueError, match=r"made otherwise .*refine.num_steps 2 and 3.*another"):
        evaluate_vbench(trained.text, out=tmp_path / "cut", **other)


def test_a_rewritten_prompt_is_read_and_the_name_stays(
    trained: Runs, full_info: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "rewritten.txt"
    lines.write_text("\n".join(["the digit two moves up", *NAMES[1:]]))
    report = evaluate_vbench(
        trained.text,
        prompts=full_info,
        out=tmp_path / "out",
        rewritten_prompts=lines,
        per_prompt=1,
        config=CLIPS,
    )
    assert report is not None
    [recipe] = read_recipes(report.folder / f"{NAMES[0]}-0.mp4").values()
    assert recipe.condition == {"captions": "the digit two moves up"}
    lines.write_text("one")
    with pytest.raises(ValueError, match="each of the 3 prompts, got 1"):
        evaluate_vbench(
            trained.text, prompts=full_info, out=tmp_path / "x", rewritten_prompts=lines
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("left/right", "holds a slash"),
        ("tab\there", "does not print"),
        (".hidden", "starts with a dot"),
        ("ä" * 124, "makes a name of 257 bytes, and file systems take 255"),
        ("The digit seven MOVES left", "by case alone"),
    ],
)
def test_names_that_no_file_can_have_are_refused(prompt: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt_en": NAMES[0]}, {"prompt_en": prompt}]))
    with pytest.raises(ValueError, match=f"cannot name a video: it .*{reason}"):
        evaluate_vbench(Path("nowhere"), prompts=file, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_list_of_prompts_is_refused(
    trained: Runs, metadata: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.json", tmp_path / "out"
    for text, match in (("[]", "holds no prompt"), ('{"a": 1}', "prompt_en"), ("[", "prompt_en")):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            evaluate_vbench(trained.text, prompts=file, out=out)
    with metadata.open("a") as stream:
        stream.write('{"tag": "no prompt"}\n')
    with pytest.raises(ValueError, match="line 4 of .* no JSON object with a `prompt`"):
        evaluate_geneval(trained.text, prompts=metadata, out=out)
    with pytest.raises(ValueError, match="no file of prompts at"):
        evaluate_geneval(trained.text, prompts=tmp_path / "gone", out=out)


def test_what_benchmarks_do_not_score_is_refused(
    trained: Runs, metadata: Path, full_info: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="draws classes"):
        evaluate_geneval(trained.classes, prompts=metadata, out=out)
    with pytest.raises(ValueError, match="scores pictures, got clips of 5 frames"):
        evaluate_geneval(trained.text, prompts=metadata, out=out, config=CLIPS)
    with pytest.raises(ValueError, match="scores clips, got pictures"):
        evaluate_vbench(trained.text, prompts=full_info, out=out, config=PICTURES)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(ValueError, match="must be new, empty, or the folder of the same command"):
        evaluate_geneval(trained.text, prompts=metadata, out=out, config=PICTURES)


def test_the_command_line_knows_them(trained: Runs, metadata: Path, tmp_path: Path) -> None:
    words = ["evaluate", "geneval", trained.text, "--prompts", metadata, "--out", tmp_path / "a"]
    words += ["--num_frames=1", "--refine.num_steps=1", "--per_prompt=1", "--seed=2"]
    report = call_grn(*words)
    assert "3 samples of 3 prompts" in str(report)
    facts = json.loads(report.list_file.read_text())
    assert facts["command"].startswith("grn evaluate geneval ")
    assert "--refine.num_steps=1" in facts["command"]
    assert "--seed=2" in facts["command"]
    assert {"generator", "tokenizer", "text_encoder"} == facts["weights"].keys()
