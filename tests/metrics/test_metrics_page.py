"""What docs/metrics.md says is so: its Python runs, its tables name what there is."""

import re
from pathlib import Path

import torch

from grn_lightning.metrics import CONVENTIONS, METRICS, GenerationConfig, GenerationMetrics
from grn_lightning.metrics.extractors import FEATURES
from grn_lightning.metrics.features import to_bytes
from grn_lightning.metrics.inception import INCEPTION_FILE, InceptionFeatures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


class InceptionLike(InceptionFeatures):
    """Says what an Inception would be, without layers."""

    def __init__(self) -> None:
        super(InceptionFeatures, self).__init__()
        self.name, self.rounding, self.resize, self.network = "adm", "truncate", "tensorflow", ""


def row(start: str, section: str = "Three names") -> list[str]:
    text = PAGE.split(f"## {section}\n")[1]
    line = re.findall(rf"^\| {re.escape(start)} .*$", text, re.MULTILINE)[0]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/metrics.md", "exec"), {})


def test_every_number_is_explained() -> None:
    first = PAGE.split("## What is measured")[1].split("\n\n")[1]
    named = re.findall(r"[\w ]+", " ".join(line.split("|")[1] for line in first.splitlines()[2:]))
    words = {word for text in named for word in (text.strip(), *text.split())}
    assert set(METRICS.values()) <= words | {"CLIP score"}
    assert "CLIP score" in first


def test_the_table_of_names_is_that_of_the_code() -> None:
    names = [cell.strip("`") for cell in row("| `torch_fidelity`")[1:] if cell]
    assert names == list(CONVENTIONS)
    for convention, rounding, resize, score in zip(
        CONVENTIONS.values(),
        row("floats become bytes")[1:],
        row("to 299 x 299")[1:],
        row("Inception score")[1:],
        strict=True,
    ):
        assert rounding == f"`{convention.rounding}`"
        assert resize.startswith(f"`{convention.resize}`")
        size = convention.score_part_size
        shuffled = "shuffled" if convention.score_order == "shuffled" else "ordered"
        expected = f"{convention.score_parts} {shuffled} parts"
        assert score == (expected if size is None else f"{shuffled} parts of {size}")
    assert INCEPTION_FILE in PAGE


def test_the_rounding_of_others_is_what_the_page_says() -> None:
    """The two formulas of the page; a level is met exactly by neither of these values."""
    x = torch.linspace(-1.01, 1.01, 4001, dtype=torch.float64)[1::2] + 1e-5
    dit = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
    adm = (127.5 * (x + 1)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_bytes(x, "round"), dit)
    assert torch.equal(to_bytes(x, "truncate"), adm)
    for formula, how in (("127.5 x + 128", "round"), ("127.5 (x + 1)", "truncate")):
        assert f"`uint8({formula})`" in PAGE, how
    assert "DiT, LlamaGen" in row("used by")[2]
    assert "`round`" in row("DiT, LlamaGen", "A number to stand beside a published one")[2]


def test_every_extractor_is_named() -> None:
    for name in FEATURES:
        assert f"`{name.split(':')[0]}" in PAGE, name


def test_the_sizes_are_right() -> None:
    def megabytes(*metrics: str) -> float:
        config = GenerationConfig(num_samples=50_000, metrics=metrics, kept_features=10_000)
        sums = GenerationMetrics(InceptionLike(), config).sums().values()
        return sum(x.numel() * x.element_size() for x in sums) / 1e6

    expected = {
        "FID": round(megabytes("fid")),
        "sFID": round(megabytes("sfid")),
        "IS": round(megabytes("is"), 1),
        "KID, precision, recall": round(megabytes("kid", "precision", "recall")),
    }
    for name, size in expected.items():
        assert float(row(f"{name} |", "What it costs")[-1].split()[0]) == size, name
