"""Notebooks: stripped, honest about their data, built on public names, and they run."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 900  # of one cell, on a very busy machine; a quiet one takes a thirtieth


def _name(path: Path) -> str:
    return path.stem


def _cells(path: Path, kind: str) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def _code(path: Path) -> Iterator[ast.AST]:
    """Every node of the code; cell magics are looked into."""
    transform = TransformerManager().transform_cell
    for source in _cells(path, "code"):
        plain = re.sub(r"^%%\w+.*\n", "", source)
        yield from ast.walk(ast.parse(transform(plain)))


# --- what a reader finds --------------------------------------------------------------------------


def test_there_are_six_and_their_page_lists_them() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\(([\w.]+\.ipynb)\)", page) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_a_notebook_is_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_a_notebook_reads_like_a_lesson(path: Path) -> None:
    prose, code = _cells(path, "markdown"), _cells(path, "code")
    number = path.stem.partition("_")[0]
    assert prose[0].startswith(f"# {number}. ")
    assert re.search(r"\*\*Where the data come from\.\*\*|Its data are", prose[0])
    assert len(prose) > len(code) / 2
    assert any("plt.subplots" in source or "_figure" in source for source in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_a_notebook_uses_public_names_only(path: Path) -> None:
    imported = 0
    for node in _code(path):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
        imported += "grn_lightning" in names
        assert "tests" not in names
        private = [name for name in names if name.startswith("_")]
        assert not private
    assert imported or path.stem.startswith("4"), "a lesson on reading files needs only files"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    for source in _cells(path, "markdown"):
        for link in re.findall(r"\]\(([^)\s]+)\)", source):
            assert link.startswith("https://") or (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_runs_of_a_notebook_come_from_experiments_of_the_checkout(path: Path) -> None:
    named = set(re.findall(r"[\w/{}.]+\.yaml", "\n".join(_cells(path, "code")))) - {"config.yaml"}
    for file in named:
        assert list(ROOT.glob(re.sub(r"\{\w+\}", "*", file))), file


# --- what it does ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout, as far as notebooks are concerned: experiments, no data, no runs."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "experiments", root / "experiments")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    return root


@pytest.mark.scale
@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_a_notebook_runs_from_a_clean_checkout(
    path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    folder = checkout / "notebooks"
    notebook = nbformat.read(folder / path.name, as_version=4)
    NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "Warning" not in said
