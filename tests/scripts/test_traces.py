"""What a traced refinement looks like: colours of elements, steps of the film, curves."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.sample import sample
from grn_lightning.scripts.traces import COLOURS, element_map
from tests.scripts.conftest import Runs

QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)
RGB = [torch.tensor(ImageColor.getrgb(colour)) for colour in COLOURS.values()]


def one_hot_masks(kinds: torch.Tensor) -> list[torch.Tensor]:
    return [kinds == n for n in range(4)]


def test_every_element_has_its_place_and_colour() -> None:
    kinds = torch.randint(0, 4, (8, 2, 3))
    picture = element_map(one_hot_masks(kinds), 16)  # a board of 3 x 3 places of 5 pixels
    assert picture.shape == (3, 32, 48)
    for c, y, x in torch.ones(kinds.shape).nonzero().tolist():
        row, column = 16 * y + 5 * (c // 3), 16 * x + 5 * (c % 3)
        place = picture[:, row : row + 5, column : column + 5]
        assert (place == RGB[kinds[c, y, x]].view(3, 1, 1)).all()
    assert (picture[:, 15::16] == 255).all()


def test_small_squares_show_the_mean() -> None:
    kinds = torch.tensor([0, 0, 1, 3]).view(4, 1, 1)
    picture = element_map(one_hot_masks(kinds), 4)
    mean = torch.stack([RGB[n] for n in (0, 0, 1, 3)]).float().mean(0).round()
    assert (picture == mean.view(3, 1, 1)).all()


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_a_trace_is_asked_for_by_number_of_samples(
    trained: Runs, kind: str, tmp_path: Path
) -> None:
    wanted = {"prompts": ["a", "b"]} if kind == "text" else {"class_labels": [3, 5]}
    options = {"num_samples": 2, "first_index": 4, "refine": QUICK, **wanted}
    report = sample(getattr(trained, kind), out=tmp_path / "a", trace=3, batch_size=3, **options)
    films = sorted(file.name for file in report.folder.glob("*-steps.gif"))
    assert films == [f"0000{n}-steps.gif" for n in (4, 5, 6)]
    with Image.open(io.BytesIO((report.folder / films[0]).read_bytes())) as film:
        assert film.n_frames == 3  # one per step; the last one stays longer
    with Image.open(report.folder / "steps.png") as curves:
        assert curves.width > curves.height

    without = sample(getattr(trained, kind), out=tmp_path / "b", batch_size=3, **options)
    for file in without.files:
        assert file.read_bytes() == (report.folder / file.name).read_bytes()
    assert not list(without.folder.glob("*steps*"))
