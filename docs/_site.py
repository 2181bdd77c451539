"""What the documentation site adds to the pages of docs/: pages from elsewhere, and the reference.

The pages are plain Markdown that reads well in a checkout. Three things are done to them here, as
hooks of MkDocs: cards that lie in other folders become pages too; links to them are bent, and links
to files that the site does not have become plain text; and a page per room of the package asks
mkdocstrings for everything public in it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "data/README.md": "shards.md",
    "notebooks/README.md": "notebooks.md",
    "experiments/README.md": "experiments.md",
    "experiments/LOG.md": "journal.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages that lie outside docs/, and what they are called on the site."""

ROOMS = (
    ("functional", "pure functions on tensors"),
    ("media", "pictures and videos: bytes, tensors, sheets"),
    ("nn", "layers that models share"),
    ("models", "networks, their sizes, conversion"),
    ("samplers", "loops over a callable that returns logits"),
    ("datasets", "shards, their order, samples"),
    ("metrics", "judges"),
    ("pipelines", "networks, sampler and media joined"),
    ("lit", "whatever needs a Trainer"),
)
"""Rooms of the package, from the ground up."""

NAV = {
    "Start": ("README", "quickstart", "own-data", "faq"),
    "Tokenizer": ("tokenizer", "quantizers"),
    "Generator": ("generator", "data", "check", "packing", "ctf"),
    "Draw": ("sampling", "pipelines", "official-weights"),
    "Judge and look": ("judging", "metrics", "inspector", "notebooks"),
    "Scale": ("plan", "scale", "resume", "launch"),
    "House": ("shards", "experiments", "journal", "contributing", "changelog"),
}
"""Pages by section, in reading order; those that are not there are left out."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def _source(page: str) -> str:
    """Return where a page of the site lies in the checkout."""
    from_site = {name: path for path, name in ELSEWHERE.items()}
    return from_site.get(page, f"docs/{page}")


def bend(markdown: str, page: str) -> str:
    """Bend the links of a page to where their targets are on the site."""
    folder = posixpath.dirname(_source(page))

    def bent(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        path, _, anchor = link.partition("#")
        if mark or not path or "://" in link or page.startswith("reference/"):
            return match.group()
        target = posixpath.normpath(posixpath.join(folder, path))
        if target in ELSEWHERE:
            path = ELSEWHERE[target]
        elif target.startswith("docs/"):
            path = target.removeprefix("docs/")
        else:
            return text if "`" in text else f"`{text}`"
        return f"[{text}]({path}{'#' if anchor else ''}{anchor})"

    return LINK.sub(bent, markdown)


def _room_page(name: str, about: str) -> str:
    """Return the reference of a room: every module, everything public."""
    lines = [f"# {name}", "", f"{about[0].upper()}{about[1:]}.", ""]
    folder = ROOT / "grn_lightning" / name
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            lines += [f"## {'.'.join(parts[2:])}", "", f"::: {'.'.join(parts)}", ""]
            lines += ["    options: {show_root_heading: false, show_root_toc_entry: false}", ""]
    return "\n".join(lines)


def _commands_page() -> str:
    """Return the reference of the command line: every tool's docstring."""
    from grn_lightning.cli import TOOLS

    lines = ["# Commands", "", "`grn COMMAND --help` says the same in a terminal.", ""]
    for tool in TOOLS:
        name = tool.replace(" ", "_")
        lines += [f"## grn {tool}", "", f"::: grn_lightning.scripts.{name}.{name}"]
        lines += ["    options: {show_root_heading: false, show_root_toc_entry: false}", ""]
    return "\n".join(lines)


def navigation() -> list[dict[str, list[str]]]:
    """Return the sections of the site with the pages that are there."""
    there = {path.name for path in (ROOT / "docs").glob("*.md")} | set(ELSEWHERE.values())
    sections = {
        title: [f"{name}.md" for name in names if f"{name}.md" in there]
        for title, names in NAV.items()
    }
    rooms = ["commands", *(name for name, _ in ROOMS)]
    sections["Reference"] = [f"reference/{name}.md" for name in rooms]
    return [{title: pages} for title, pages in sections.items() if pages]


def on_config(config: Any) -> Any:
    """Order the pages; one that `NAV` lacks makes a strict build fail."""
    config.nav = navigation()
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in ELSEWHERE.items()}
    pages |= {f"reference/{name}.md": _room_page(name, about) for name, about in ROOMS}
    pages["reference/commands.md"] = _commands_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Bend links."""
    return bend(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show formulas of docstrings as code; the site has no typesetter."""
    return re.sub(r":math:(?=<code>)", "", html)
