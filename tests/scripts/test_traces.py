"""What `--trace` writes: a film of the steps, their curves, and the same samples as without."""

import io
from pathlib import Path

import pytest
from PIL import Image

from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.sample import sample
from tests.scripts.conftest import Runs

QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)


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
