"""`grn report`: one page that needs nothing else and says where each number comes from."""

import base64
import io
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from grn_lightning.media.images import encode_png
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts import report_page
from grn_lightning.scripts.draw_plan import DrawOptions
from grn_lightning.scripts.evaluate import evaluate
from grn_lightning.scripts.evaluate_samples import evaluate_samples
from grn_lightning.scripts.records import Figure, Picture, figures_from_json, read_evaluations
from grn_lightning.scripts.report import report
from grn_lightning.scripts.report_curves import charts_of, read_history, thin_out
from grn_lightning.scripts.report_inspector import lightened
from grn_lightning.scripts.report_page import Page
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

QUICK = RefineConfig(num_steps=2)
VOID = {"meta", "img", "wbr", "br", "use", "path"}


class Reader(HTMLParser):
    """Reads a page as a browser would, and minds what a browser forgives."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if tag == "img" and name == "src":
                self.sources.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def evaluated(trained: Runs, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Copies of the runs that have been evaluated, to be read only."""
    root = tmp_path_factory.mktemp("evaluated")
    runs = Runs(*(shutil.copytree(run, root / run.name) for run in trained))
    evaluate(runs.tokenizer, digits / "images")
    evaluate(runs.tokenizer, digits / "clips")
    evaluate(runs.text, digits / "clips", refine=QUICK)
    return runs


def page_of(runs: Runs, out: Path) -> str:
    return report([runs.tokenizer, runs.text], out=out).file.read_text()


def test_the_page_needs_nothing_but_itself(evaluated: Runs, tmp_path: Path) -> None:
    page = page_of(evaluated, tmp_path / "report.html")
    reader = Reader(page)
    assert all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert not {"script", "link", "iframe", "base", "object"} & reader.tags
    assert "http" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert len(page.encode()) < 5e6
    assert len(reader.ids) == len(set(reader.ids))
    anchors = {link[1:] for link in reader.links if link.startswith("#")}
    assert anchors <= set(reader.ids)


def test_it_opens_with_the_samples_and_their_captions(evaluated: Runs, tmp_path: Path) -> None:
    page = page_of(evaluated, tmp_path / "report.html")
    [record] = read_evaluations(evaluated.text)
    samples = [picture for picture in record["pictures"] if picture["kind"] == "sample"]
    positions = []
    for picture in samples:
        data = base64.b64encode((evaluated.text / picture["file"]).read_bytes()).decode()
        positions.append(page.index(data))
        assert picture["caption"] in page[positions[-1] :][: len(data) + 200]
    assert positions == sorted(positions)
    assert positions[-1] < page.index("<h2>")  # before all that has a heading


def test_every_number_stands_there_with_its_protocol(evaluated: Runs, tmp_path: Path) -> None:
    reader = Reader(page_of(evaluated, tmp_path / "report.html"))
    for run in (evaluated.tokenizer, evaluated.text):
        for record in read_evaluations(run):
            for figure in figures_from_json(record["figures"]):
                kinds = {"samples", "reconstructions", "real"}
                protocol = [part for part in figure.protocol if part not in kinds]
                assert f"{figure.name}[{','.join(protocol)}]" in reader.text
                assert figure.text in reader.text
                assert all(caveat in reader.text for caveat in figure.caveats)
            assert record["data"] in reader.text
            assert record["command"] in reader.text
    for version in read_evaluations(evaluated.text)[0]["environment"].values():
        assert version in reader.text
    assert "2 steps, guidance 1, temperature 1, seed 0" in reader.text
    assert "num_elements: 8" in reader.text  # the configuration


@pytest.mark.parametrize("kind", ["text", "tokenizer"])
def test_what_is_missing_comes_with_the_command_that_makes_it(
    runs: Runs, tmp_path: Path, kind: str
) -> None:
    out, run = tmp_path / "report.html", getattr(runs, kind)
    text = Reader(report(run, out=out).file.read_text()).text
    command = re.search(r"(grn evaluate \S+ \S+) makes it", text)
    assert command is not None
    quick = ["--refine.num_steps=1"] if kind == "text" else []
    call_grn(*shlex.split(command[1])[1:], *quick)
    assert "makes it" not in Reader(report(run, out=out).file.read_text()).text


def test_the_newest_version_that_has_a_checkpoint_is_told(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "t2v"
    for number in (0, 1):
        (folder / f"version_{number}").parent.mkdir(parents=True, exist_ok=True)
        source = runs.text if number else runs.tokenizer
        source.rename(folder / f"version_{number}")
    (folder / "version_2").mkdir()
    result = report(tmp_path / "all", out=tmp_path / "report.html")
    assert result.runs == (folder / "version_1",)
    assert "<h1>t2v</h1>" in result.file.read_text()


def test_a_run_whose_sets_were_judged_has_numbers_and_no_samples_yet(
    runs: Runs, digits: Path, tmp_path: Path
) -> None:
    evaluate_samples(
        runs.classes,
        num_samples=10,
        features="digits-cnn",
        judge=digits / "judge.safetensors",
        config=DrawOptions(refine=QUICK),
    )
    text = Reader(report(runs.classes, out=tmp_path / "report.html").file.read_text()).text
    assert "IS[digits-cnn,10]" in text
    assert f"No samples of {runs.classes.name} yet" in text
    assert "none was picked" not in text


def test_a_report_replaces_a_report_and_nothing_else(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report(runs.text, out=out)
    report(runs.text, out=out)
    out.write_text("<html>my diary</html>")
    with pytest.raises(ValueError, match="exists and is no report"):
        report(runs.text, out=out)
    assert "diary" in out.read_text()
    with pytest.raises(ValueError, match="no checkpoint at"):
        report([runs.text, tmp_path / "nowhere"], out=tmp_path / "other.html")


def test_pictures_beyond_the_limit_are_left_out_and_named(
    evaluated: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "_MAX_PICTURE_BYTES", 3000)
    reader = Reader(page_of(evaluated, tmp_path / "report.html"))
    assert sum(len(base64.b64decode(s.partition(",")[2])) for s in reader.sources) <= 3000
    assert "pictures were left out to keep the page small" in reader.text
    assert str(evaluated.text / "evaluation" / "001") in reader.text


def test_what_people_write_is_text_and_no_markup(tmp_path: Path) -> None:
    page = Page("a <b> & c")
    tmp_path.joinpath("x.png").write_bytes(_png())
    page.paragraph("<script>alert(1)</script> and `a < b`")
    page.pictures(tmp_path, [Picture("x.png", "sample", '"<i>&', "<u>", False)], kind="samples")
    page.figures("<s>", [Figure("<em>", ("<q>",), 1.0, "<x>", "<y>")])
    reader = Reader(page.html())
    assert not {"script", "i", "u", "s", "em", "q", "x", "y", "b"} & reader.tags
    assert '"<i>&✗ read as <u>' in reader.text


def _png() -> bytes:
    return encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_the_last_panels_of_the_inspector_and_its_alarms_are_there(
    runs: Runs, tmp_path: Path
) -> None:
    with SummaryWriter(str(runs.text / "log")) as writer:
        for step in (1, 2):
            for number, tag in enumerate(("strip", "entropy", "unknown")):
                panel = torch.full((3, 30, 80), 100 * step + number, dtype=torch.uint8)
                writer.add_image(f"inspect/{tag}", panel, step)
            writer.add_text("inspect/alarms", f"- samples <alike> {step}\n- and another", step)
    page = report(runs.text, out=tmp_path / "report.html").file.read_text()
    reader = Reader(page)
    assert "Refinement" in reader.text
    assert "samples <alike> 2" in reader.text
    assert "and another" in reader.text
    assert "<alike> 1" not in reader.text
    pictures = [base64.b64decode(source.partition(",")[2]) for source in reader.sources]
    colours = [Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0)) for data in pictures]
    assert colours == [(200,) * 3, (201,) * 3]  # of the last step; what nobody explains stays away
    assert "How uncertain the prediction is" in reader.text
    assert "http" not in page


def test_a_run_without_an_inspector_has_no_such_section(runs: Runs, tmp_path: Path) -> None:
    page = report(runs.text, out=tmp_path / "report.html").file.read_text()
    assert "Refinement" not in Reader(page).text


def test_panels_beyond_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page("p")
    monkeypatch.setattr(report_page, "_MAX_PICTURE_BYTES", len(_png()) + 10)
    page.panels([report_page.Panel(_png(), "first"), report_page.Panel(_png(), "second")])
    reader = Reader(page.html())
    assert "first" in reader.text
    assert "second" not in reader.text


def test_a_lightened_panel_looks_the_same_and_a_film_stays() -> None:
    picture = Image.new("RGB", (60, 40), "#ffffff")
    picture.paste("#3b6fb6", (5, 5, 30, 30))
    buffers = {kind: io.BytesIO() for kind in ("PNG", "GIF")}
    for kind, buffer in buffers.items():
        picture.save(buffer, format=kind)
    film = buffers["GIF"].getvalue()
    assert lightened(film) == film
    again = Image.open(io.BytesIO(lightened(buffers["PNG"].getvalue()))).convert("RGB")
    assert again.tobytes() == picture.tobytes()


# --- curves ---------------------------------------------------------------------------------------


def test_curves_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None
    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in range(10):
            writer.add_scalar("train/loss", 1 / (1 + step), step, walltime=1000 + 60 * step)
        writer.add_scalar("val/digit_accuracy", 0.25, 9, walltime=1000 + 60 * 12)
    history = read_history(tmp_path)
    assert history is not None
    series = history.series["train/loss"]
    np.testing.assert_array_equal(series.steps, np.arange(10))
    np.testing.assert_allclose(series.values, 1 / (1 + np.arange(10)), rtol=1e-6)
    np.testing.assert_allclose(np.diff(series.minutes), 1)
    assert history.started + history.seconds == 1000 + 60 * 12


def test_each_quantity_that_was_logged_has_its_chart(tmp_path: Path) -> None:
    judged = [
        f"{name}[adm,5k,truncate]"
        for name in ("FID", "sFID", "IS", "KID", "precision", "recall", "FVD")
    ]
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20):
            for tag in ("train/loss", "val/loss", "val/psnr", *(f"val/{name}" for name in judged)):
                writer.add_scalar(tag, step, step)
            shares = ("digit_accuracy", "_accuracy/t0.0", "_accuracy/t0.9", "_accuracy/round0")
            for tag in (f"val{'' if name[0] == '_' else '/'}{name}" for name in shares):
                writer.add_scalar(tag, 0.5, step)
    history = read_history(tmp_path)
    assert history is not None
    charts = charts_of(history, judged_how="8 samples")
    titles = [chart.title for chart in charts]
    assert titles == [
        "Loss",
        "PSNR of held-out samples, dB",
        "Share of right elements, held-out samples, by time t",
        "Share of right bits, held-out samples, by round",
        "Share of samples judged right (8 samples)",
        *(f"{name} of samples (8 samples)" for name in judged),
    ]
    for chart in charts:
        assert chart.svg.startswith('<svg role="img"')
        assert "currentColor" in chart.svg  # it takes the ink of the page
        assert "#000000" not in chart.svg
        assert "DejaVu" not in chart.svg


def test_thinning_a_line_keeps_its_mean_and_its_ends_near() -> None:
    x, y = np.arange(1200.0), np.sin(np.arange(1200.0) / 100)
    thin_x, thin_y = thin_out(x, y)
    assert len(thin_x) == 300
    assert thin_y.mean() == pytest.approx(y.mean())
    np.testing.assert_allclose(thin_y, np.sin(thin_x / 100), atol=1e-3)
    few = thin_out(x[:7], y[:7])
    np.testing.assert_array_equal(few[1], y[:7])
