"""Write the tables that say what there is: experiments, sizes, results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and is made of what it tells of:
the opening lines of the YAML files, the rows of `models/variants.py`, `experiments/results.toml`.
Run this file after changing one of them:

    python docs/_tables.py
"""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from grn_lightning.models import variants
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
FILES = (
    ROOT / "README.md",
    EXPERIMENTS / "README.md",
    ROOT / "docs" / "generator.md",
    ROOT / "docs" / "tokenizer.md",
)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)
TRAINED_BY_MAKE = ("tokenizer", "c2i", "t2i", "t2v")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = tuple(head)
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(["", *lines, "", ""])  # blank lines, or MkDocs takes it for HTML


def headers(path: Path) -> dict[str, str]:
    """Return the opening lines of an experiment, by their first words."""
    lines = path.read_text(encoding="utf-8").splitlines()[:5]
    parts = (line.removeprefix("# ").partition(": ") for line in lines)
    return {name: text for name, _, text in parts}


def experiments() -> str:
    """Return every experiment: what it trains, by which command, at what cost."""
    rows = []
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        name = path.relative_to(EXPERIMENTS).as_posix()
        if name.startswith("_base/"):
            continue
        told = headers(path)
        command = re.sub(r" \(.*\)$", "", told["Command"]).strip("`")
        what = told["What"].rstrip(".")
        rows.append([f"[{name}]({name})", what, f"`{command}`", told["Cost"].rstrip(".")])
    return table(("experiment", "trains", "command", "cost"), rows)


def _millions(network: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return f"{count:,.0f}" if count >= 10 else f"{count:.1f}"


def tokenizers() -> str:
    """Return the tokenizers by name, with their parameters in millions."""
    rows = []
    with torch.device("meta"):
        for name, c in variants.TOKENIZERS.items():
            side = f"{c.temporal_stride} x {c.spatial_stride} x {c.spatial_stride}"
            codes = f"{c.latent_channels} x {c.num_rounds} bits"
            rows.append([f"`{name}`", "HBQ", side, codes, _millions(HBQTokenizer(c))])
        for name, v in variants.VQ_TOKENIZERS.items():
            side = f"1 x {v.spatial_stride} x {v.spatial_stride}"
            codes = f"1 of {v.codebook_size:,}"
            rows.append([f"`{name}`", "codebook", side, codes, _millions(VQTokenizer(v))])
    return table(("name", "quantizer", "pixels per position", "a position", "million"), rows)


def generators() -> str:
    """Return the generators by name, with their parameters in millions."""
    rows = []
    with torch.device("meta"):
        for name, c in variants.GRN_CLASS.items():
            sizes = [str(c.depth), str(c.width), f"{c.num_elements} of {c.alphabet_size}"]
            rows.append([f"`{name}`", "`GRNClass`", *sizes, _millions(GRNClass(c))])
        for name, t in variants.GRN_TEXT.items():
            sizes = [str(t.depth), str(t.width), f"{t.num_elements} of {t.alphabet_size}"]
            rows.append([f"`{name}`", "`GRNText`", *sizes, _millions(GRNText(t))])
        for name, k in variants.LLAMAGEN.items():
            sizes = [str(k.depth), str(k.width), f"{k.output_channels} of {k.output_size:,}"]
            rows.append([f"`{name}`", "`CodeTransformer`", *sizes, _millions(CodeTransformer(k))])
    return table(("name", "network", "depth", "width", "elements per position", "million"), rows)


def _results() -> dict[str, list[dict]]:
    return tomllib.loads((EXPERIMENTS / "results.toml").read_text(encoding="utf-8"))


def results() -> str:
    """Return the numbers of the README."""
    rows = [
        [r["what"], r["number"], f"`{r['command']}`" if "command" in r else "as above"]
        for r in _results()["readme"]
    ]
    return table(("what", "number", "command"), rows)


def runs() -> str:
    """Return the runs that were seen, with their commits."""
    rows = [
        [
            ", then ".join(f"[{file}]({file})" for file in r["files"])
            + (f", {r['note']}" if "note" in r else ""),
            *(r[key] for key in ("commit", "hardware", "time", "result")),
        ]
        for r in _results()["run"]
    ]
    return table(("experiment", "commit", "hardware", "time", "result"), rows)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (experiments, tokenizers, generators, results, runs)
}


def written(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]](), text)


def main() -> None:
    """Write every table, and say which pages have changed."""
    for file in FILES:
        before = file.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            file.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{file.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
