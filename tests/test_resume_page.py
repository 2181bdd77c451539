"""What docs/resume.md says is so: its commands run, its sentences are the program's."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from grn_lightning.datasets.digits import DigitsConfig, build_digits
from grn_lightning.lit import examine, resume
from grn_lightning.lit.callbacks import KeyHash, stop
from tests.tiny_runs import call_grn

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
FITS = [
    shlex.split(line.removeprefix("srun "))[1:]
    for language, text in BLOCKS
    for line in text.splitlines()
    if not language and line.removeprefix("srun ").startswith("grn fit")
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the experiments and few of the digits."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    few = DigitsConfig(num_train_clips=8, num_val_clips=2, num_train_images=8, num_val_images=2)
    for _ in build_digits(tmp_path / "data" / "digits", few):
        pass
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.scale
@pytest.mark.parametrize("args", FITS[1:], ids=lambda args: args[4])
def test_its_commands_are_taken(args, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        call_grn(*args, "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["resume"] == "auto"
    if "--trainer.devices=2" in args:  # the same batch, and nothing else changed
        before = yaml.safe_load((ROOT / args[4]).read_text())
        [one] = before["data"]["init_args"]["sources"]
        [half] = config["data"]["init_args"]["sources"]
        assert {**one, "batch_size": one["batch_size"] // 2} == {key: half[key] for key in one}


@pytest.mark.scale
def test_its_first_command_begins_and_goes_on(checkout, caplog):
    caplog.set_level("INFO", "lightning.pytorch.grn_lightning")
    clips = "path: data/digits/clips, media: video, num_frames: 1, random_window: true"
    saving = "class_path: grn_lightning.lit.callbacks.Checkpoint"
    smaller = (
        "--model.tokenizer.encoder_width=16",
        "--model.tokenizer.decoder_width=16",
        f"--data.init_args.sources=[{{{clips}, batch_size: 4}}]",
        f"--trainer.callbacks=[{{{saving}, init_args: {{save_last: true}}}}]",
    )
    told = []
    for steps in (1, 2):
        caplog.clear()
        call_grn(*FITS[0], *smaller, f"--trainer.max_steps={steps}")
        told.append([r.getMessage() for r in caplog.records if r.name.endswith("grn_lightning")])
    assert any("so the run begins" in text for text in told[0])
    assert any("goes on from" in text and "step 1 after 4 samples" in text for text in told[1])
    [run] = Path("runs").iterdir()
    assert [version.name for version in run.iterdir()] == ["version_0"]
    assert (run / "version_0" / "config-1.yaml").is_file()
    [block] = [text for language, text in BLOCKS if language == "python"]
    file = next((run / "version_0" / "checkpoints").glob("*.ckpt"))
    state: dict[str, Any] = {}
    code = block.replace("runs/NAME/version_0/checkpoints/last.ckpt", str(file))
    exec(code.replace("torch.load(", "found = torch.load("), state)
    [shown] = re.findall(r"# (\{.*\})", block)
    assert state["found"].keys() == yaml.safe_load(shown).keys()
    assert state["found"]["num_samples"] == 8


def test_its_sentences_are_those_of_the_program():
    sources = "".join(Path(module.__file__).read_text() for module in (examine, resume))  # type: ignore[arg-type]
    rows = re.findall(r"^\| (is [\w ]+|holds [\w ]+|points [\w ]+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for reason in rows:
        assert reason in sources, reason
    assert stop._farewell(15, 1234, Path("runs/NAME/version_0/checkpoints/last.ckpt")) in PAGE
    counter = KeyHash()
    counter.num_samples, counter.value = 48, 0x288BF608646FC86D
    assert f"has trained on {counter}." in PAGE


@pytest.mark.scale
def test_its_settings_are_taken(tmp_path):
    for language, text in BLOCKS:
        if language == "yaml":
            (tmp_path / "more.yaml").write_text(text)
            files = ("_base/cpu.yaml", "tokenizer/digits_frames.yaml")
            given = [arg for file in files for arg in ("-c", ROOT / "experiments" / file)]
            with pytest.raises(SystemExit) as stop:
                call_grn("fit", *given, "-c", tmp_path / "more.yaml", "--print_config")
            assert stop.value.code == 0


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for target in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / target).is_file(), target
