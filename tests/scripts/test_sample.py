"""`grn sample`: the samples that were asked for, the same ones every time, nothing lost."""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grn_lightning.lit.generator import load_generator
from grn_lightning.media.images import decode_image, encode_png, to_uint8
from grn_lightning.media.video import decode_video, encode_mp4
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.drawing import draw_parts
from grn_lightning.scripts.runs import ClipSize
from grn_lightning.scripts.sample import sample
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

PROMPTS = ["the digit seven moves left", "the digit one moves up"]
QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)


def pictures_in(folder: Path) -> dict[str, bytes]:
    """Bytes of all files but the list."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"}


def frames_in(file: Path) -> torch.Tensor:
    """Frames of a clip on disk."""
    return decode_video(file, fps=None, num_frames=None)


def frames_of(clip: torch.Tensor) -> torch.Tensor:
    """Frames of a drawn clip as they come back from a file: rounded to 8 bits, then encoded."""
    return decode_video(
        encode_mp4(to_uint8(clip).transpose(0, 1), fps=8), fps=None, num_frames=None
    )


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_a_batch_size_changes_no_sample(trained: Runs, kind: str, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"prompts": PROMPTS} if kind == "text" else {"class_labels": [7, 1]}
    folders = []
    for batch_size in (8, 3, 1):
        folders.append(tmp_path / str(batch_size))
        sample(
            getattr(trained, kind),
            **wanted,
            num_samples=4,
            out=folders[-1],
            refine=QUICK,
            batch_size=batch_size,
        )
    first, *others = map(pictures_in, folders)
    assert len(first) == (8 * 2 + 1 if kind == "text" else 8 + 1)
    assert all(other == first for other in others)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_batch_size_changes_no_code(trained: Runs, scale: float) -> None:
    module = load_generator(trained.text)

    def drawn(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = draw_parts(
            module,
            {"captions": PROMPTS * 4},
            torch.arange(8),
            size=ClipSize(5, 16, 16),
            config=RefineConfig(num_steps=4, guidance_scale=scale),
            seed=5,
            batch_size=batch_size,
        )
        elements, clips = zip(*((part.elements, part.clips) for part in parts), strict=True)
        return torch.cat(elements), torch.cat(clips)

    elements, clips = drawn(8)
    for batch_size in (3, 1):
        others = drawn(batch_size)
        assert others[0].equal(elements)
        assert others[1].equal(clips)  # to the last bit, or else a pixel may move by a level
    assert len({one.numpy().tobytes() for one in elements}) == 8  # and all are different


def test_a_sample_is_drawn_again_by_its_prompt_and_number(trained: Runs, tmp_path: Path) -> None:
    many = sample(trained.text, prompts=PROMPTS, num_samples=2, out=tmp_path / "a", refine=QUICK)
    one = sample(trained.text, prompts=PROMPTS[1], first_index=3, out=tmp_path / "b", refine=QUICK)
    other = sample(
        trained.text, prompts=PROMPTS[1], first_index=3, out=tmp_path / "c", refine=QUICK, seed=1
    )
    assert [file.name for file in one.files] == [many.files[3].name]
    assert one.files[0].read_bytes() == many.files[3].read_bytes()
    assert one.files[0].read_bytes() != other.files[0].read_bytes()


def test_files_hold_what_was_drawn(trained: Runs, tmp_path: Path) -> None:
    module = load_generator(trained.classes)
    drawn = module.draw_clips(
        {"class_labels": torch.tensor([4])},
        torch.tensor([0]),
        size=(1, 16, 16),
        config=QUICK,
        seed=0,
    )
    picture = sample(trained.classes, class_labels=4, out=tmp_path / "a", refine=QUICK)
    assert decode_image(picture.files[0].read_bytes()).equal(to_uint8(drawn[0, :, 0]))

    clip = sample(trained.text, prompts=PROMPTS, out=tmp_path / "b", refine=QUICK, fps=4)
    assert decode_video(clip.files[1], fps=None, num_frames=None).shape == (5, 3, 16, 16)
    for gif in (clip.files[1].with_suffix(".gif"), clip.sheet):
        with Image.open(io.BytesIO(gif.read_bytes())) as film:
            assert film.n_frames == 5
            assert film.info["duration"] == 250


def test_the_list_tells_how_to_repeat_it(
    trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = sample(trained.text, prompts=PROMPTS, num_samples=2, refine=QUICK, seed=3)
    facts = json.loads((first.folder / "samples.json").read_text())
    rows = [(row["prompt"], row["sample_index"], row["files"][0]) for row in facts["samples"]]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    assert rows == [
        (prompt, n, file.name)
        for n, (prompt, file) in enumerate(zip(prompts, first.files, strict=True))
    ]
    assert {row["seed"] for row in facts["samples"]} == {3}
    assert {row["guidance_scale"] for row in facts["samples"]} == {2.0}

    again = call_grn(*shlex.split(facts["command"])[1:])
    assert again.folder != first.folder
    assert pictures_in(again.folder) == pictures_in(first.folder)


def test_what_is_there_is_never_overwritten(
    trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [sample(trained.classes, class_labels=[1], refine=QUICK).folder for _ in range(2)]
    assert [str(folder) for folder in folders] == ["runs/samples/001", "runs/samples/002"]
    before = pictures_in(folders[0])
    with pytest.raises(ValueError, match="`out` must be new or an empty folder"):
        sample(trained.classes, class_labels=[2], out=folders[0], refine=QUICK)
    assert pictures_in(folders[0]) == before


def test_guided_steps_cost_two_forwards(trained: Runs, tmp_path: Path) -> None:
    plain = sample(trained.text, prompts="x", out=tmp_path / "a", refine=RefineConfig(num_steps=3))
    guided = sample(trained.text, prompts="x", out=tmp_path / "b", refine=QUICK)
    assert (plain.forwards_per_sample, guided.forwards_per_sample) == (3, 6)


def test_a_clip_starts_from_the_picture_it_is_given(trained: Runs, tmp_path: Path) -> None:
    """The same file as through the pipeline, the picture cut to the clips' size, rounded once."""
    torch.manual_seed(0)
    picture = torch.randint(256, (3, 20, 40), dtype=torch.uint8)
    (tmp_path / "first.png").write_bytes(encode_png(picture))
    made = sample(
        trained.text,
        prompts=PROMPTS[:1],
        first_frame=tmp_path / "first.png",
        negative_prompt="a house",
        out=tmp_path / "out",
        refine=QUICK,
        seed=3,
    )
    drawn = load_generator(trained.text).pipeline.draw_text(
        PROMPTS[:1],
        size=(5, 16, 16),
        pictures=[picture],
        negative_prompt="a house",
        config=QUICK,
        seed=3,
    )
    assert frames_in(made.files[0]).equal(frames_of(drawn.clips[0]))
    facts = json.loads((made.folder / "samples.json").read_text())
    assert facts["negative_prompt"] == "a house"
    with pytest.raises(ValueError, match="pictures continue nothing"):
        sample(trained.classes, class_labels=1, first_frame=tmp_path / "first.png", refine=QUICK)


def test_bfloat16_is_the_generator_s_alone(trained: Runs, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    made = sample(trained.text, prompts="x", out=tmp_path / "a", refine=QUICK, precision="bf16")
    pipeline = load_generator(trained.text).pipeline
    pipeline.autocast = torch.bfloat16
    block = pipeline.generator.block_chunks[0].module[0].attn  # type: ignore[union-attr]
    block.register_forward_hook(lambda *args: seen.append(args[2][0].dtype))
    decoded: list[torch.dtype] = []
    pipeline.tokenizer.decoder.register_forward_hook(lambda *args: decoded.append(args[2].dtype))
    drawn = pipeline.draw_text(["x"], size=(5, 16, 16), config=QUICK)
    assert (set(seen), set(decoded)) == ({torch.bfloat16}, {torch.float32})
    assert frames_in(made.files[0]).equal(frames_of(drawn.clips[0]))


def test_an_export_draws_what_its_run_draws(trained: Runs, tmp_path: Path) -> None:
    for run, name in ((trained.tokenizer, "tok"), (trained.classes, "c2i")):
        call_grn("export", run, "--out", tmp_path / "weights" / name)
    wanted: dict[str, Any] = {"class_labels": [7, 1], "refine": QUICK}
    first = sample(trained.classes, out=tmp_path / "a", **wanted)
    second = sample(tmp_path / "weights" / "c2i", out=tmp_path / "b", **wanted)
    for one, other in zip(first.files, second.files, strict=True):  # their recipes differ
        assert decode_image(one.read_bytes()).equal(decode_image(other.read_bytes()))
    with pytest.raises(ValueError, match="is a tokenizer, which draws nothing"):
        sample(tmp_path / "weights" / "tok", class_labels=1)


def test_long_clips_are_decoded_a_few_frames_at_a_time(
    trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit the limit; the file is the same to a level, and never was one long clip."""
    wanted: dict[str, Any] = {"prompts": "x", "num_frames": 9, "refine": QUICK}
    whole = sample(trained.text, out=tmp_path / "a", **wanted)
    longest: list[int] = []
    monkeypatch.setattr("grn_lightning.pipelines.generator.POSITIONS_AT_ONCE", 4)
    monkeypatch.setattr(
        "grn_lightning.scripts.frames.to_uint8",
        lambda frames: longest.append(len(frames)) or to_uint8(frames),
    )
    parts = sample(trained.text, out=tmp_path / "b", **wanted)
    assert longest == [1, 2, 2, 2, 2]
    clips = [decode_video(one.files[0], fps=None, num_frames=9).int() for one in (whole, parts)]
    assert (clips[0] - clips[1]).abs().max() <= 2


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("text", {}, "give `--prompts`"),
        ("text", {"class_labels": [1]}, "give `--prompts`"),
        ("classes", {"prompts": ["seven"]}, "draws 10 classes: give `--class_labels`"),
        ("classes", {"class_labels": [3, 10, -1]}, r"in \[0, 10\), got \[10, -1\]"),
        ("classes", {"class_labels": 1, "image_size": 32}, "draws 1 x 16 x 16 only, got 1 x 32"),
        ("classes", {"class_labels": 1, "num_frames": 5}, "draws 1 x 16 x 16 only, got 5 x 16"),
        ("text", {"prompts": ["x"], "num_frames": 4}, "frames"),
        ("text", {"prompts": ["x"], "image_size": (16, 20)}, "multiple"),
        ("text", {"prompts": ["x"], "num_samples": 0, "fps": 0.0}, "`num_samples`.*`fps`"),
        ("text", {"prompts": ["x"], "device": "tpu9"}, "`device`"),
        ("text", {"prompts": ["x"], "seed": -1}, "`seed` must be at least 0, got -1"),
        ("tokenizer", {"prompts": ["x"]}, "no checkpoint of a generator"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(
    trained: Runs, tmp_path: Path, kind: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        sample(getattr(trained, kind), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_without_a_known_size_it_asks(runs: Runs, tmp_path: Path) -> None:
    file = runs.text / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["datamodule_hyper_parameters"]
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="give `--num_frames`.*and `--image_size`"):
        sample(runs.text, prompts="x", out=tmp_path / "a", refine=QUICK)
    made = sample(
        runs.text, prompts="x", out=tmp_path / "a", refine=QUICK, num_frames=1, image_size=16
    )
    assert made.files[0].suffix == ".png"
