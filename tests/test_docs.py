"""The pages of docs/ as a site: commands parse, links and anchors lead somewhere, it builds."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from grn_lightning.cli import TOOLS, TRAINER_COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / room / "README.md" for room in ("data", "experiments", "notebooks")),
]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
NOT_RUN = "not run: "
MARKS = (NOT_RUN, "resolved only: ", "run by tests/")
LONG = re.compile(r"(make|python|torchrun|srun|grn fit)\b")
TRAINED = {"ctf.md", "official-weights.md", "own-data.md"}  # tests train what these pages train


class Block(NamedTuple):
    """A fenced block of a page."""

    mark: str
    """The comment above it, if there is one."""
    language: str
    lines: list[str]
    """With continued lines joined."""

    @property
    def is_done(self) -> bool:
        """Whether a reader would do it: shell commands, or Python; `text` is for looking only."""
        shell = ("grn ", "make ", ".venv/bin/", "pip ", "python ", "torchrun ", "srun ")
        is_shell = self.language in ("", "sh", "bash") and any(
            line.startswith(shell) for line in self.lines
        )
        return is_shell or self.language == "python"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["mark"] or "", m["language"], m["text"].replace("\\\n", " ").splitlines())
        for m in FENCE.finditer(text)
    ]


def _grn_lines(page: Path) -> Iterator[str]:
    for block in _blocks(page):
        if block.language in ("", "sh", "bash", "text"):
            plain = (re.sub(r"\s+#.*$", "", line) for line in block.lines)
            yield from (line for line in plain if re.match(r"grn [a-z]", line))


def _is_template(command: str) -> bool:
    """Whether words in capitals or dots stand for what a reader puts in."""
    return bool(re.search(r"(?<![\w/.])[A-Z]{3,}(?![\w/.])|\.\.\.", command))


def _is_plain(command: str) -> bool:
    """Whether it only names files, which `test_experiments.py` parses."""
    return not re.search(r"--(?!config\b)", command)


def _tool_of(words: list[str]) -> tuple[str, list[str]]:
    count = 2 if " ".join(words[:2]) in TOOLS else 1
    return " ".join(words[:count]), words[count:]


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_tool_takes_the_options_that_a_page_gives_it(
    page: Path, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for command in _grn_lines(page):
        words = shlex.split(command)[1:]
        name, rest = _tool_of(words)
        if name in TRAINER_COMMANDS or (name == "check" and "-c" in rest) or _is_template(command):
            continue
        assert name in TOOLS, command
        before = len(called)
        monkeypatch.setattr(sys, "argv", ["grn", *words])
        main()
        assert called[before:] == [name.replace(" ", "_")], command


@pytest.mark.scale
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_training_takes_the_options_that_a_page_gives_it(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {name for block in _blocks(page) for name in re.findall(r"`(\w+\.yaml)`", block.mark)}
    monkeypatch.chdir(ROOT)
    for command in dict.fromkeys(_grn_lines(page)):
        words = shlex.split(command)[1:]
        name = "fit" if words[0] == "check" and "-c" in words else words[0]
        files = [Path(word).is_file() for word in words if word.endswith(".yaml")]
        if name not in TRAINER_COMMANDS or _is_template(command) or not all(files):
            continue  # a page's own file is written by the test that walks the page
        if _is_plain(command) and not written:
            continue
        monkeypatch.setattr(sys, "argv", ["grn", name, *words[1:], "--print_config"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0, f"{command}\n{capsys.readouterr().err}"
        capsys.readouterr()


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"], ids=_name)
def test_a_page_is_walked_by_a_test_or_says_why_not(page: Path) -> None:
    tests = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if p != Path(__file__)]
    mentions = re.compile(rf"docs[/\"' ,]+.*{re.escape(page.name)}|{re.escape(page.name)}[\"']")
    walkers = [path for path in tests if mentions.search(path.read_text(encoding="utf-8"))]
    for block in _blocks(page):
        if block.mark.startswith(NOT_RUN):
            assert len(block.mark) > len(NOT_RUN) + 10, f"{page.name}: say why: {block.mark}"
        elif block.is_done:
            assert walkers, (
                f"{page.name}: no test names this page, and this block does not say "
                f"`<!-- {NOT_RUN}why -->`: {block.lines[0]}"
            )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_takes_long_says_how_much_of_it_tests_do(page: Path) -> None:
    for block in _blocks(page):
        is_long = any(LONG.match(line) for line in block.lines) and block.language != "python"
        if not is_long or not block.is_done:
            continue
        if block.mark.startswith("run by "):
            assert (ROOT / re.split("[ ,]", block.mark)[2]).is_file(), f"{page.name}: {block.mark}"
        elif page.name not in TRAINED or block.lines[0].startswith("make"):
            assert block.mark.startswith(MARKS), (
                f"{page.name}: no test does this; say `<!-- {NOT_RUN}why -->` or "
                f"`<!-- {MARKS[1]}why -->` above it: {block.lines[0]}"
            )


def test_marks_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: a week -->\n```\ngrn fit \\\n  -c a.yaml\n```\n\n```yaml\na: 1\n```\n"
    )
    first, second = _blocks(page)
    assert first == Block("not run: a week", "", ["grn fit    -c a.yaml"])
    assert first.is_done
    assert not second.is_done
    assert second.mark == ""


# --- links ----------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles)
    return {re.sub(r"[ ]+", "-", title.strip()) for title in plain}


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{_name(page)}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{_name(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_pictures_of_a_page_are_there_and_small(page: Path) -> None:
    for picture in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        text, link = picture
        assert text, f"{link} needs words for who cannot see it"
        assert (page.parent / link).stat().st_size < 500_000, link


def test_the_front_page_lists_every_lesson() -> None:
    listed = set(
        re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    )
    assert listed == {page.name for page in PAGES} - {"README.md"}


# --- the site -------------------------------------------------------------------------------------


@pytest.mark.scale
def test_the_site_builds_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)
    warnings = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert not warnings

    site = tmp_path / "site"
    pages = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    assert {page.with_suffix(".html").name for page in PAGES if page.stem != "README"} <= pages
    hbq = (site / "reference" / "functional.html").read_text(encoding="utf-8")
    assert "hbq_encode" in hbq
    assert "Latents in [-1, 1]" in hbq
    assert ":math:" not in hbq
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f"grn {tool}" in commands for tool in TOOLS)
    # a file that the site does not have is named, not linked
    assert 'href="../' not in (site / "quickstart.html").read_text(encoding="utf-8")
