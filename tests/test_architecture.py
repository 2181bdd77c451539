"""The house law, as far as a machine can read it: imports, measures, words, journal."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grn_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_STORY_LINES = 80  # of a `forward`, a `main` or a tool: their control flow stays in sight
MEDIAN_FUNCTION_LINES = 10
VAGUE_NAMES = {"utils", "util", "misc", "common", "helpers", "helper", "tools"}
HEADER = ("# What: ", "# Answers to: ", "# Command: ", "# Cost: ", "# Expect: ")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _num_code_lines(function: Function) -> int:
    """Lines without the docstring: explaining more must not cost anything."""
    first, end = function.body[0], function.end_lineno
    assert end is not None
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return end - function.lineno + 1 - docstring


def _text_files() -> list[Path]:
    """Files that git knows or would add; without git, those of the package and the documents."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    suffixes = {".py", ".md", ".yaml", ".toml", ".cff", ".ipynb", ""}
    if listing.returncode != 0:
        return [*MODULES, *EXPERIMENTS, *ROOT.glob("*.md"), ROOT / "Makefile"]
    files = (ROOT / line for line in listing.stdout.splitlines())
    return [file for file in files if file.suffix in suffixes and file.is_file()]


def test_imports_go_down_only() -> None:
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_keep_the_house_law(path: Path) -> None:
    tree, text = _tree(path), path.read_text(encoding="utf-8")
    issues = []
    if path.stem in VAGUE_NAMES:
        issues.append("the name has no subject")
    if text.strip() and ast.get_docstring(tree) is None:
        issues.append("no module docstring")
    if len(text.splitlines()) > MAX_FILE_LINES:
        issues.append(f"{len(text.splitlines())} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                issues.append(f"line {node.lineno}: print")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            issues.append(f"line {node.lineno}: bare except")
    for function in _functions(tree):
        is_tool = path.parent.name == "scripts" and function.name == path.stem
        is_story = is_tool or function.name in ("forward", "main")
        limit = MAX_STORY_LINES if is_story else MAX_FUNCTION_LINES
        if (lines := _num_code_lines(function)) > limit:
            issues.append(f"{function.name} has {lines} lines, at most {limit}")
    assert not issues


def test_functions_are_short() -> None:
    sizes = [_num_code_lines(function) for path in MODULES for function in _functions(_tree(path))]
    assert median(sizes) <= MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_of_a_stranger_is_unpickled(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            assert all(alias.name != "dill" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "dill")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr in ("Unpickler", "UnpicklingError"), f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "pickle.Unpickler", f"line {node.lineno}"
        elif isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            names = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            assert "find_class" in names, f"{node.name} takes any class"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=_name)
def test_annotations_of_the_ground_floor_stay_checkable(path: Path) -> None:
    # Postponed annotations would blind the run-time check of shapes.
    imports = [node for node in _tree(path).body if isinstance(node, ast.ImportFrom)]
    assert all(node.module != "__future__" for node in imports)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=_name)
def test_experiments_open_with_their_header(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()[: len(HEADER)]
    for line, start in zip(lines, HEADER, strict=True):
        assert line.startswith(start)
        assert line.removeprefix(start).strip()


def test_every_experiment_is_in_the_index() -> None:
    index = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    runs = [path for path in EXPERIMENTS if "_base" not in path.parts]
    assert runs
    for path in runs:
        assert path.relative_to(ROOT / "experiments").as_posix() in index


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    for folder in sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir()):
        if list(folder.glob("test_*.py")):
            assert folder.name in folders


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|work|workspace|tmp|mnt|scratch)/[\w.]")
    found = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in _text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    assert not found


def test_notebooks_carry_no_outputs() -> None:
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        assert '"output_type"' not in path.read_text(encoding="utf-8"), _name(path)
