"""Tables of the pages are those that `docs/_tables.py` makes of experiments, sizes and results."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_tables", ROOT / "docs" / "_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(tables: ModuleType) -> None:
    named = []
    for file in tables.FILES:
        text = file.read_text(encoding="utf-8")
        named += [name for _, name in tables.MARKED.findall(text)]
        assert tables.written(text) == text, (
            f"{file.relative_to(ROOT)} is not current: run `python docs/_tables.py`"
        )
    assert sorted(named) == sorted(tables.TABLES)


def test_a_table_is_made_anew_between_its_marks_only(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.TABLES, "results", lambda: tables.table(("a",), [["1"]]))
    page = "before\n<!-- table: results -->\nold\n<!-- end -->\nafter\n"
    made = "before\n<!-- table: results -->\n\n| a |\n|---|\n| 1 |\n\n<!-- end -->\nafter\n"
    assert tables.written(page) == made == tables.written(made)


def test_results_name_files_and_commands_that_are_there(tables: ModuleType) -> None:
    told = tables._results()
    assert "command" in told["readme"][0]
    for run in told["run"]:
        assert all((ROOT / "experiments" / file).is_file() for file in run["files"])
        assert re.fullmatch(r"[0-9a-f]{7,}", run["commit"])
    for row in told["readme"]:
        words = shlex.split(row.get("command", "grn"))
        assert words[0] == "grn" or (ROOT / words[1]).is_file(), row["command"]
        # a number that depends on a protocol carries it
        assert "FID" not in row["what"] or re.search(r"FID\[[^\]]+\]", row["what"])


def test_parameters_are_those_of_the_published_sizes() -> None:
    page = (ROOT / "docs" / "generator.md").read_text(encoding="utf-8")
    counted = dict(re.findall(r"^\| `([\w-]+)` \|.* ([\d,.]+) \|$", page, re.MULTILINE))
    assert counted["B-index"] == "131"  # GRN: B 131M, L 459M, H 952M, G 2.01B
    assert counted["G-index"] == "2,007"
    assert counted["llamagen-B"] == "111"  # LlamaGen: B 111M, L 343M, XL 775M, XXL 1.4B, 3B 3.1B
    assert counted["llamagen-3B"] == "3,097"
