"""Published weights by name: rows that hold together, files that are found, and what is said."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.pretrained import write_pretrained
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.variants import GRN_CLASS, GRN_TEXT, TOKENIZERS
from grn_lightning.pipelines import registry, target_of
from grn_lightning.pipelines.published import (
    load_network,
    load_published,
    sampling_of,
    umt5_config,
)
from grn_lightning.pipelines.registry import (
    WEIGHTS,
    PublishedWeights,
    fetch,
    fetch_text_encoder,
    find_local,
    published,
)
from grn_lightning.pipelines.resolutions import frames_for, picture_size
from grn_lightning.samplers import RefineConfig
from tests.official_files import random_state, write_official_file
from tests.tiny_runs import TINY_CLASS, TINY_TEXT, TINY_TOKENIZER

# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_name_things_that_exist(name: str) -> None:
    row = WEIGHTS[name]
    tables: dict[str, Any] = {"tokenizer": TOKENIZERS, "class": GRN_CLASS, "text": GRN_TEXT}
    assert row.variant in (*tables[row.kind], "auto")
    assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
    assert row.repository is None or row.file is not None
    assert all(isinstance(config, RefineConfig) for config in sampling_of(name).values())
    if row.kind == "tokenizer":
        assert (row.tokenizer, row.attention, row.sampling) == (None, None, {})
        return
    tokenizer = WEIGHTS[row.tokenizer or ""]
    assert tokenizer.kind == "tokenizer"
    if row.variant != "auto":
        target_of(tables[row.kind][row.variant], TOKENIZERS[tokenizer.variant])
    if row.kind == "class":
        assert set(row.sampling) == {"class"}
        return
    assert row.attention in ("prefix", "full")
    assert row.text_encoder
    assert set(row.sampling) == set(row.styles)
    # Tags came with the attention that sees the picture.
    assert all(bool(style.tag) == (row.attention == "full") for style in row.styles.values())
    assert row.size is not None
    preset, aspect, seconds = row.size
    assert min(picture_size(preset, aspect)) >= 256
    assert (frames_for(seconds) == 1) == ("image" in row.styles)


def test_settings_are_the_published_ones() -> None:
    classes = sampling_of("c2i-b")["class"]
    assert (classes.num_steps, classes.guidance_scale, classes.temperature) == (50, 2.35, 1.31)
    assert (classes.guidance_schedule, classes.guidance_interval) == ("interval", (0.44, 1.0))
    first, later = sampling_of("t2i-2b")["image"], sampling_of("t2i-2b-full")["image"]
    assert (first.time_cap, later.time_cap) == (0.999, 0.95)
    for config in (first, later):
        assert (config.num_steps, config.schedule, config.realised_time) == (50, "cosine", True)
        assert (config.guidance_scale, config.temperature) == (3.0, 1.1)
    assert sampling_of("t2v-2b")["video"].guidance_scale == 4.0
    assert sampling_of("t2v-8b-full")["first_frame"].guidance_scale == 3.0


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean 't2v-2b'\? Known are 'tokenizer-16d', "):
        published("t2v-2B")
    with pytest.raises(ValueError, match="called 'xyz'; known are"):
        published("xyz")


# --- finding and fetching -------------------------------------------------------------------------


def test_files_are_found_under_their_names_with_any_suffix(tmp_path: Path) -> None:
    assert find_local("c2i-b", tmp_path) is None
    (tmp_path / "GRN_ind_B_ep599.pth").write_bytes(b"")
    (tmp_path / "HBQ_image_video_tokenizer_64dim_M4_20260626.pt").write_bytes(b"")
    assert find_local("c2i-b", tmp_path) == tmp_path / "GRN_ind_B_ep599.pth"
    found = fetch("tokenizer-64d-20260626", tmp_path)
    assert found.suffix == ".pt"
    for suffix in (".json", ".safetensors"):  # an export wins
        (tmp_path / f"c2i-b{suffix}").write_bytes(b"")
    assert fetch("c2i-b", tmp_path) == tmp_path / "c2i-b"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("c2i-b", r"fetch 'GRN_ind_B_ep599.pth' .* by hand and put it to '.*ind_B_ep599.pth'"),
        ("t2v-8b-full", r"name is not known here.* convert it: grn convert FILE --out .*8b-full"),
    ],
)
def test_what_has_no_known_place_is_to_be_fetched_by_hand(
    name: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        fetch(name, tmp_path)


class Hub:
    """Stands in for huggingface_hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error
        fake = SimpleNamespace(hf_hub_download=self._file, snapshot_download=self._folder)
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)

    def _file(self, repository: str, file: str, *, local_dir: Path) -> str:
        self.asked.append((repository, file, local_dir))
        if self.error is not None:
            raise self.error
        (local_dir / file).write_bytes(b"")
        return str(local_dir / file)

    def _folder(self, repository: str, *, allow_patterns: str, local_dir: Path) -> str:
        (local_dir / "umt5-xxl").mkdir()
        self.asked.append((repository, allow_patterns, local_dir))
        return str(local_dir)


def test_what_has_a_place_is_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    for _ in range(2):
        assert fetch("t2v-2b", tmp_path) == tmp_path / "GRN_T2V_2B.pth"
        assert fetch_text_encoder("t2v-2b", tmp_path) == tmp_path / "umt5-xxl"
    repository = "bytedance-research/GRN"
    assert hub.asked == [
        (repository, "GRN_T2V_2B.pth", tmp_path),
        (repository, "umt5-xxl/*", tmp_path),
    ]
    with pytest.raises(ValueError, match="'c2i-b' has no text encoder"):
        fetch_text_encoder("c2i-b", tmp_path)


def test_offline_or_without_the_extra_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = re.escape(str(tmp_path / "GRN_T2V_2B.pth"))
    by_hand = f"fetch 'GRN_T2V_2B.pth' of bytedance-research/GRN by hand and put it to '{place}'"
    Hub(monkeypatch, OSError("no route to host\nmore"))
    with pytest.raises(ValueError, match=f"{by_hand}. The download failed: no route to host$"):
        fetch("t2v-2b", tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=rf"{by_hand}; or .*pip install 'grn-lightning\[hub\]'"):
        fetch("t2v-2b", tmp_path)
    with pytest.raises(ValueError, match="fetch the folder 'umt5-xxl' of bytedance-research/GRN"):
        fetch_text_encoder("t2v-2b", tmp_path)


# --- loading, with random weights in the published layouts ----------------------------------------

NETWORKS: dict[str, tuple[str, str, torch.nn.Module]] = {
    "tokenizer": ("tokenizer.ckpt", "ema", HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER))),
    "class": ("GRN_bit_tiny.pth", "model_ema1", GRNClass(GRNClassConfig(**TINY_CLASS))),
    "text": ("GRN_T2V_tiny.pth", "flat", GRNText(GRNTextConfig(**TINY_TEXT))),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny weights in the published layouts, with rows of their own."""
    sizes = {"variant": "auto", "use_mid_attention": True}
    rows = {
        "tokenizer-tiny": PublishedWeights(kind="tokenizer", file="tokenizer.ckpt", **sizes),  # type: ignore[arg-type]
        "c2i-tiny": dataclasses.replace(
            WEIGHTS["c2i-b"], variant="auto", file="GRN_bit_tiny.pth", tokenizer="tokenizer-tiny"
        ),
        "t2v-tiny": dataclasses.replace(
            WEIGHTS["t2v-2b-full"],
            variant="auto",
            file="GRN_T2V_tiny.pth",
            tokenizer="tokenizer-tiny",
        ),
    }
    monkeypatch.setattr(registry, "WEIGHTS", rows)
    for file, layout, module in NETWORKS.values():
        write_official_file(tmp_path / file, random_state(module), layout)
    (tmp_path / "umt5-xxl").mkdir()
    monkeypatch.setattr(
        "grn_lightning.pipelines.published.umt5_config",
        lambda place, folder: TextEncoderConfig(width=16, layers=1, context_length=24),
    )
    monkeypatch.setattr("grn_lightning.models.sizes._ROUNDS", 2)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer-tiny", "c2i-tiny", "t2v-tiny"])
def test_official_files_become_networks_bit_for_bit(name: str, folder: Path) -> None:
    kind = registry.WEIGHTS[name].kind
    loaded = load_network(name, folder)
    expected = random_state(NETWORKS[kind][2])
    state = loaded.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[key].equal(expected[key]) for key in expected)
    assert loaded.file == folder / NETWORKS[kind][0]
    if isinstance(loaded.network, GRNText):
        assert loaded.network.config.attention == "full"  # the row knows, the tensors do not


def test_a_published_generator_draws(folder: Path) -> None:
    pipeline = load_published("t2v-tiny", folder)
    assert pipeline.sampling == sampling_of("t2v-tiny")["video"]
    quick = dataclasses.replace(pipeline.sampling, num_steps=2)
    drawn = pipeline.draw_text(["a cat"], size=(5, 16, 16), config=quick)
    assert drawn.clips.shape == (1, 3, 5, 16, 16)
    with pytest.raises(ValueError, match="draw 'video', 'first_frame', but not 'image'"):
        pipeline.draw_text(["a cat"], size=(1, 16, 16), config=quick)
    classes = load_published("c2i-tiny", folder, tokenizer=pipeline.tokenizer)
    assert classes.sampling.guidance_scale == 2.35
    assert classes.tokenizer is pipeline.tokenizer
    with pytest.raises(ValueError, match="is a tokenizer, which draws nothing"):
        load_published("tokenizer-tiny", folder)


def test_an_export_under_another_s_name_is_refused(folder: Path) -> None:
    network = GRNClass(GRNClassConfig(**TINY_CLASS))
    info = {"kind": "generator", "config": {"generator": network.config}}
    write_pretrained(folder / "t2v-tiny", {"generator": network}, info)
    with pytest.raises(ValueError, match="should be a GRNText, but is a GRNClass"):
        load_network("t2v-tiny", folder)
    text = GRNText(GRNTextConfig(**TINY_TEXT))
    info = {"kind": "generator", "config": {"generator": text.config}}
    for file in folder.glob("t2v-tiny.*"):
        file.unlink()
    write_pretrained(folder / "t2v-tiny", {"generator": text}, info)
    with pytest.raises(ValueError, match="says attention='prefix', these weights have 'full'"):
        load_network("t2v-tiny", folder)


def test_the_text_encoder_is_described_by_its_folder(tmp_path: Path) -> None:
    place = tmp_path / "umt5-xxl"
    place.mkdir()
    config = umt5_config(place, tmp_path)
    assert config.architecture == "umt5"
    assert config.tokenizer == str(place)
    assert config.checkpoint == str(place / "models_t5_umt5-xxl-enc-bf16.pth")
    (place / "umt5-xxl").mkdir()
    assert umt5_config(place, tmp_path).tokenizer == str(place / "umt5-xxl")
