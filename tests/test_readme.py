"""What the documents say is there: commands with their options, paths, links."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from grn_lightning.cli import TOOLS, TRAINER_COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    ROOT / "experiments" / "README.md",
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
STAMP = ("VENV=ENV", "-o", "ENV/.installed")  # as if the environment stood


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _commands(program: str) -> list[str]:
    """Lines of blocks, and spans of sentences, that call a program; the templates left out.

    The pages of docs/ have tests of their own, which run what they show.
    """
    found = []
    for document in DOCUMENTS:
        if document.parent.name == "docs":
            continue
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
        names = {f"{program} {tool}" for tool in (*TOOLS, *TRAINER_COMMANDS)}
        spans = [span for span in _spans(text) if span not in names]  # more than a name
        found += [line for line in lines + spans if line.startswith(program + " ")]
    return [line for line in dict.fromkeys(found) if "COMMAND" not in line and "NAME" not in line]


def _spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", text))]


def _behind_make(command: str) -> list[str]:
    """Return the `grn` commands that a make command would run."""
    ours = {name for name in os.environ if name.startswith("MAKE")} | {"ARGS"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    plan = subprocess.run(
        ["make", "--no-print-directory", "-n", *STAMP, *shlex.split(command)[1:]],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert plan.returncode == 0, plan.stderr
    lines = plan.stdout.splitlines()
    return [line.removeprefix("ENV/bin/") for line in lines if line.startswith("ENV/bin/grn ")]


def _all_grn_commands() -> list[str]:
    commands = _commands("grn")
    if shutil.which("make"):
        commands += [line for command in _commands("make") for line in _behind_make(command)]
    return list(dict.fromkeys(" ".join(command.split()) for command in commands))


def _is_plain_fit(command: str) -> bool:
    """Whether it only names files, which `test_experiments.py` parses."""
    return command.startswith(("grn fit", "grn check -c")) and "--" not in command


# --- commands -------------------------------------------------------------------------------------


def test_the_first_commands_are_demo_and_test() -> None:
    first = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert first.split() == ["make", "demo", "make", "test"]


def test_every_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = _commands("make")
    assert len(commands) > 10
    for command in commands:
        named = {word for word in shlex.split(command)[1:] if "=" not in word}
        assert named <= targets, command


def test_every_command_that_is_named_exists() -> None:
    known = {*TOOLS, *TRAINER_COMMANDS, "COMMAND"} | {tool.split()[0] for tool in TOOLS}
    named = {
        span.split()[1]
        for document in DOCUMENTS
        for span in _spans(document.read_text(encoding="utf-8"))
        if span.startswith("grn ")
    }
    assert len(named) > 10
    assert named <= known


@pytest.mark.parametrize(
    "command", [command for command in _all_grn_commands() if not _is_plain_fit(command)]
)
def test_every_grn_command_parses(
    command: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *options = shlex.split(command)
    if options and f"{name} {options[0]}" in TOOLS:
        name = f"{name} {options.pop(0)}"
    if name in TRAINER_COMMANDS:
        monkeypatch.setattr("sys.argv", ["grn", name, *options, "--print_config"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
    else:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        main()
        assert called == [name.replace(" ", "_")]


def test_success_is_success_for_the_shell(
    called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an installed command returns goes to `sys.exit`: any sentence would be a failure.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, entry = project["scripts"]["grn"].partition(":")
    monkeypatch.setattr("sys.argv", ["grn", "digits", "somewhere"])
    assert getattr(import_module(module), entry)() in (None, 0)
    assert called == ["digits"]


def test_every_experiment_that_is_named_exists() -> None:
    for document in DOCUMENTS:
        for path in re.findall(r"\bexperiments/[\w/]+\.yaml", document.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), f"{_name(document)}: {path}"


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (document.parent / link.partition("#")[0]).exists(), link


def _tree() -> list[Path]:
    """Return the paths of the README's tree; indentation is nesting."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (tree,) = (block for block in blocks if re.search("^grn_lightning/$", block, re.MULTILINE))
    paths, folders = [], {0: ROOT}
    for line in tree.splitlines():
        name = line.split()[0]
        depth = len(line) - len(line.lstrip())
        path = folders[depth] / name
        assert path.is_dir() == name.endswith("/"), f"{name} is not what the tree says"
        folders[depth + 2] = path
        paths.append(path)
    return paths


def test_the_tree_is_true() -> None:
    paths = _tree()
    assert all(path.exists() for path in paths)
    rooms = {path.parent for path in (ROOT / "grn_lightning").glob("*/__init__.py")}
    assert rooms <= set(paths)
