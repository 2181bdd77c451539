"""What docs/launch.md says to type: words are understood, files exist, numbers agree."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grn_lightning.cli import main
from grn_lightning.datasets.shards import ShardSet

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    """Every command of the page that trains, word by word."""
    text = PAGE.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(torchrun|srun) .*\bfit\b", line)]


def _option(words: list[str], name: str) -> str:
    """The value of an option that is written with a space or an equals sign."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return after
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"no {name} in {words}")


def test_there_is_a_command_for_each_way():
    assert [words[0] for words in _commands()].count("torchrun") == 3
    assert [words[0] for words in _commands()].count("srun") == 1


@pytest.mark.parametrize("words", _commands(), ids=lambda words: " ".join(words)[-60:])
def test_its_trainings_are_understood(words, monkeypatch, capsys):
    options = words[words.index("fit") + 1 :]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["grn", "fit", *options, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    trainer = yaml.safe_load(captured.out)["trainer"]
    if words[0] == "torchrun":
        assert trainer["num_nodes"] == int(_option(words, "--nnodes"))
        assert int(trainer["devices"]) == int(_option(words, "--nproc_per_node"))
        assert words[words.index("fit") - 2 : words.index("fit")] == ["-m", "grn_lightning"]


def test_its_batch_file_is_a_script_whose_numbers_agree(tmp_path):
    (script,) = re.findall(r"```sbatch\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(file)], check=True)
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    (words,) = [words for words in _commands() if words[0] == "srun"]
    assert asked["nodes"] == _option(words, "--trainer.num_nodes")
    assert asked["ntasks-per-node"] == _option(words, "--trainer.devices")
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert asked["signal"].startswith("SIGUSR1@")


@pytest.mark.scale
def test_its_torchrun_knows_the_words():
    text = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout.replace("_", "-")  # fmt: skip
    for words in _commands():
        if words[0] == "torchrun":
            known = words[1 : words.index("-m")]
            for word in known:
                assert not word.startswith("--") or word.replace("_", "-") in text, word
            assert "--max-restarts" in text


def test_addresses_of_stores_are_refused_with_the_advice_of_the_page():
    with pytest.raises(ValueError, match="shards must be local files, got 's3://bucket/set'.*sync"):
        ShardSet.open("s3://bucket/set", "train")


def test_its_sizes_are_those_of_the_tokenizer():
    bits = 16 * 4 * 16 * 16  # channels, rounds, rows, columns
    assert bits / 8 == 2 * 1024
    assert 1_281_167 * bits / 8 / 2**30 == pytest.approx(2.5, abs=0.06)
