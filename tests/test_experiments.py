"""Every experiment parses by the command line's own parser, and its parts fit one another."""

import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from grn_lightning.cli import main
from grn_lightning.lit import coarse_to_fine, code_stage, generator
from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.packed import PackedShardData
from grn_lightning.lit.rehearsal import StandInEncoder
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.clusters import Clusters, ClustersInfo
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.text_encoder import (
    UMT5,
    TextEncoder,
    TextEncoderConfig,
    build_text_encoder,
)
from grn_lightning.models.tokenizers import AnyTokenizerConfig, build_tokenizer

ROOT = Path(__file__).parents[1]
BASE = ROOT / "experiments" / "_base" / "cpu.yaml"
DIGITS = ROOT / "experiments" / "tokenizer" / "digits.yaml"
RUNS = [p for p in sorted((ROOT / "experiments").rglob("*.yaml")) if p.parent.name != "_base"]
GENERATORS = [path for path in RUNS if "LitGenerator" in path.read_text(encoding="utf-8")]
STAGES = [path for path in RUNS if path.parent.name == "ctf"]
TOKENIZERS = [path for path in RUNS if path.parent.name == "tokenizer"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT / "experiments").as_posix()


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


class CommandLine:
    """Runs `grn` inside this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> Outcome:
        self.monkeypatch.setattr("sys.argv", ["grn", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code, *self.capsys.readouterr())

    def resolve(self, *args: object) -> dict[str, Any]:
        """Return what `grn fit` would run."""
        outcome = self("fit", *args, "--print_config")
        assert outcome.code == 0, outcome.err
        return yaml.safe_load(outcome.out)


@pytest.fixture
def grn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def _instantiate(part: dict[str, Any]) -> Any:
    module, _, name = part["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**part["init_args"])


def _run_name(path: Path) -> str:
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    logger = experiment["trainer"]["logger"]["init_args"]
    return f"{logger['save_dir']}/{logger['name']}"


def _tokenizer_of(run: str) -> AnyTokenizerConfig:
    """Return what the experiment that makes the run trains."""
    (path,) = (path for path in RUNS if _run_name(path) == run)
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    return LitTokenizer(**experiment["model"]["init_args"]).tokenizer_config


@pytest.fixture
def _weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give generators a tokenizer of the right kind that nobody has trained."""
    monkeypatch.setattr(
        code_stage, "load_tokenizer", lambda path: build_tokenizer(_tokenizer_of(path))
    )
    monkeypatch.setattr(code_stage, "weights_hash", lambda module: "none")
    monkeypatch.setattr(generator, "build_text_encoder", _encoder)
    monkeypatch.setattr(coarse_to_fine, "read_clusters", lambda path, **_: _FewClusters(path))


def _encoder(config: TextEncoderConfig) -> TextEncoder:
    """Build the encoder, but for the one that nobody can build without its weights."""
    if config.architecture == UMT5:
        return StandInEncoder(GRNTextConfig.text_channels, 512)
    return build_text_encoder(config)


class _FewClusters(Clusters):
    """Clusters that nobody has made, as many as the name of their file says."""

    def __init__(self, path: str) -> None:
        tokenizer, count = re.fullmatch(r"runs/clusters/(.*)-k(\d+)\.safetensors", path).groups()
        codes = _tokenizer_of(f"runs/tokenizer-{tokenizer}").alphabet_size
        with torch.device("cpu"):
            super().__init__(
                info=ClustersInfo(kind="codewords", tokenizer_hash="none"),
                centroids=torch.zeros(int(count), 1),
                sizes=torch.zeros(int(count)),
                cluster_of=torch.arange(codes) % int(count),
            )

    def split(self) -> Any:
        with torch.device("cpu"):
            return super().split()


# --- every experiment -----------------------------------------------------------------------------


@pytest.mark.usefixtures("_weightless")
@pytest.mark.parametrize("path", RUNS, ids=_name)
def test_an_experiment_parses_and_its_networks_can_be_built(grn: CommandLine, path: Path) -> None:
    experiment = grn.resolve("-c", BASE, "-c", path)
    experiment["model"]["init_args"]["init_from"] = None  # the earlier stage need not have run

    model = _instantiate(experiment["model"])
    with torch.device("meta"):
        model.configure_model()
    assert list(model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())

    data = _instantiate(experiment["data"])
    if isinstance(data, PackedShardData):  # whose samples per step depend on what is in the shards
        assert data.token_budget > 0
    else:
        assert data.samples_per_step(1) > 0


@pytest.mark.parametrize("path", GENERATORS, ids=_name)
def test_the_data_of_a_generator_are_what_it_asks_for(path: Path) -> None:
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    model, data = _instantiate(experiment["model"]), _instantiate(experiment["data"])
    assert isinstance(model, LitGenerator)
    assert isinstance(data, ShardData)

    tokenizer = _tokenizer_of(model.tokenizer_path)
    for source in data.sources:
        grid = tokenizer.latent_shape(source.num_frames, *data.image_size)[1:]
        if isinstance(model.generator_config, GRNClassConfig):
            assert grid[1:] == model.generator_config.grid_size
    if isinstance(model.generator_config, GRNClassConfig):
        assert data.with_classes
        assert data.num_classes == model.generator_config.num_classes
    else:
        assert data.with_captions


@pytest.mark.parametrize(("size", "gpus"), [("b", 8), ("l", 8), ("h", 16), ("g", 32)])
def test_class_recipes_follow_the_published_rules(size: str, gpus: int) -> None:
    path = ROOT / "experiments" / "c2i" / f"{size}_256.yaml"
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    (source,) = experiment["data"]["init_args"]["sources"]
    optim, epoch = experiment["model"]["init_args"]["optim"], 1_281_167
    batch = gpus * source["batch_size"]
    assert optim["lr"] == 5e-5 * batch / 256
    assert optim["warmup_samples"] == 5 * epoch
    assert experiment["trainer"]["max_steps"] * batch == pytest.approx(600 * epoch, rel=0.001)


@pytest.mark.usefixtures("_weightless")
@pytest.mark.parametrize("path", STAGES, ids=_name)
def test_the_data_of_a_stage_are_what_it_asks_for_and_its_first_loss_is_announced(
    path: Path,
) -> None:
    text = path.read_text(encoding="utf-8")
    experiment = yaml.safe_load(text)
    model, data = _instantiate(experiment["model"]), _instantiate(experiment["data"])
    assert isinstance(model, LitRaster | LitFine)
    tokenizer = _tokenizer_of(model.tokenizer_path)
    assert tokenizer.latent_shape(1, *data.image_size)[2:] == model.grid_size
    assert data.with_classes
    assert data.num_classes == model.num_classes
    with torch.device("meta"):
        model.configure_model()
    config = model.network.config
    if isinstance(model, LitRaster):
        bits = config.output_channels * math.log2(config.output_size)
        told = (f"starts at {bits:g}.", f"First loss {bits * math.log(2):.2f} nats")
        assert any(one in text for one in told)


def test_both_stages_of_a_pair_have_one_split() -> None:
    splits: dict[str, set[str]] = {}
    for path in STAGES:
        found = yaml.safe_load(path.read_text())["model"]["init_args"]
        if "split" in found:
            pair = re.sub("_(coarse|fine)(_causal)?|^(coarse|fine)_(b|l|xl)", "", path.stem)
            splits.setdefault(pair, set()).add(f"{found['tokenizer']} {found['split']}")
    assert splits.keys() == {"_256", "digits_vq", "digits_hbq1", "digits_hbq2"}
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("path", TOKENIZERS, ids=_name)
def test_trainers_of_tokenizers_have_no_flags_that_the_stage_refuses(
    grn: CommandLine, path: Path
) -> None:
    trainer = grn.resolve("-c", BASE, "-c", path)["trainer"]
    assert trainer["gradient_clip_val"] is None
    assert trainer["accumulate_grad_batches"] == 1


def test_experiments_write_into_folders_of_their_own() -> None:
    names = [_run_name(path) for path in RUNS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", RUNS, ids=_name)
def test_the_command_in_a_header_exists(path: Path) -> None:
    _, _, command = path.read_text(encoding="utf-8").splitlines()[2].partition("# Command: ")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = re.match(r"make ([\w-]+)", command)
    if target is None:
        assert f"-c {path.relative_to(ROOT).as_posix()}" in command
    else:
        assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE)


# --- who wins, and what is refused ----------------------------------------------------------------


def test_the_command_line_beats_the_file(grn: CommandLine) -> None:
    options = ("--trainer.max_steps=7", "--model.init_args.optim.lr=0.5")
    experiment = grn.resolve("-c", BASE, "-c", DIGITS, *options)
    assert experiment["trainer"]["max_steps"] == 7
    optim = experiment["model"]["init_args"]["optim"]
    written = yaml.safe_load(DIGITS.read_text())["model"]["init_args"]["optim"]
    assert optim["lr"] == 0.5
    assert {key: optim[key] for key in written} == {**written, "lr": 0.5}


def test_the_later_file_beats_the_earlier_one(grn: CommandLine, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("trainer: {max_steps: 3, log_every_n_steps: 4}\n")
    written = yaml.safe_load(DIGITS.read_text())["trainer"]["max_steps"]
    assert grn.resolve("-c", other, "-c", DIGITS)["trainer"]["max_steps"] == written
    late = grn.resolve("-c", DIGITS, "-c", other)["trainer"]
    assert (late["max_steps"], late["log_every_n_steps"]) == (3, 4)
    assert late["logger"]["init_args"]["name"] == "tokenizer-digits"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--model.init_args.optim.lrr", "1"], "lrr"),
        (["--model.init_args.loss.l3=1"], "l3"),
        (["--data.init_args.image_sizes=32"], "image_sizes"),
        (["--trainer.maximum_steps=3"], "trainer.maximum_steps"),
        (["--modle.init_args.seed=1"], "modle.init_args.seed"),
    ],
)
def test_an_unknown_option_stops_the_run_in_one_line(
    grn: CommandLine, options: list[str], key: str
) -> None:
    outcome = grn("fit", "-c", BASE, "-c", DIGITS, *options)
    assert outcome.code == 2
    assert outcome.err.startswith("grn: ")
    assert outcome.err.count("\n") == 1
    assert key in outcome.err


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("trainer: {max_step: 3}", "max_step"),
        ("model: {init_args: {optim: {learning_rate: 1}}}", "learning_rate"),
        ("data: {init_args: {sources: [{path: a, batch_size: 1, batchsize: 2}]}}", "batchsize"),
    ],
)
def test_an_unknown_key_of_a_file_stops_the_run_in_one_line(
    grn: CommandLine, tmp_path: Path, written: str, key: str
) -> None:
    file = tmp_path / "misspelt.yaml"
    file.write_text(written)
    outcome = grn("fit", "-c", BASE, "-c", DIGITS, "-c", file)
    assert outcome.code == 2
    assert outcome.err.startswith("grn: ")
    assert outcome.err.count("\n") == 1
    assert re.search(rf"\b{key}\b", outcome.err)


def test_a_missing_file_is_named(grn: CommandLine) -> None:
    outcome = grn("fit", "-c", "experiments/nowhere.yaml")
    assert outcome.code == 2
    assert "experiments/nowhere.yaml" in outcome.err
