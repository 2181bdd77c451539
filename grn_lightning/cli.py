"""One entry point: LightningCLI's `fit validate test predict`, and the tools in `scripts/`.

Every tool is a typed function; its signature is its command line and its docstring its help.
"""

import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

TRAINER_COMMANDS = {
    "fit": "train: grn fit -c experiments/tokenizer/digits.yaml",
    "validate": "validate a checkpoint: grn validate -c RUN.yaml --ckpt_path LAST.ckpt",
    "test": "test a checkpoint",
    "predict": "predict with a checkpoint",
}

# Each is a function of the same name in the module of that name in grn_lightning.scripts.
TOOLS = {
    "digits": "write the embedded data set of moving handwritten digits",
    "shards": "pack a folder of images or videos into WebDataset shards",
    "sample": "draw images or videos from a trained generator",
    "evaluate": "judge a trained tokenizer or generator on held-out data",
    "report": "write a self-contained HTML report of trained runs",
}


def help_text() -> str:
    """List all sub-commands."""
    lines = ["usage: grn COMMAND [options]", "", "training (LightningCLI):"]
    lines += [f"  {name:<10} {text}" for name, text in TRAINER_COMMANDS.items()]
    lines += ["", "tools:"]
    lines += [f"  {name:<10} {text}" for name, text in TOOLS.items()]
    lines += ["", "`grn COMMAND --help` tells the options of a command."]
    return "\n".join(lines)


def _run_trainer() -> Any:
    """Hand over to LightningCLI; imported here, so that tools and help start quickly."""
    import lightning as L
    from lightning.pytorch.cli import LightningCLI

    class GRNCLI(LightningCLI):
        def _parse_ckpt_path(self) -> None:
            """Do nothing: Lightning would let a checkpoint's settings beat the command line."""

    # Absolute interpolations (${data.init_args.x}) are resolved after all files and overrides.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return GRNCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
    )


def _run_tool(name: str, args: Sequence[str]) -> Any:
    """Parse a tool's options from its signature, call it, and show what it returns.

    The fields of a dataclass that a tool takes as `config` become options of their own.
    """
    tool: Callable[..., Any] = getattr(import_module(f"grn_lightning.scripts.{name}"), name)
    parser = ArgumentParser(prog=f"grn {name}", description=TOOLS[name], exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with options")
    parser.add_function_arguments(tool, as_positional=True, skip={"config"})
    parameter = signature(tool).parameters.get("config")
    fields: list[str] = []
    if parameter is not None:
        fields = parser.add_class_arguments(parameter.annotation)
    options = dict(vars(parser.instantiate_classes(parser.parse_args(list(args)))))
    options.pop("config", None)
    flat = {field: options.pop(field) for field in fields}
    if parameter is not None:
        options["config"] = parameter.annotation(**flat)
    result = tool(**options)
    if result is not None:
        sys.stdout.write(f"{result}\n")
    return result


def explain(error: Exception) -> str:
    """Reduce a parser's error to the sentence that names the culprit, with a hint."""
    text = " ".join(str(error).split())
    unknown = re.search(r"(?:Option|option|Key|key) '([\w.]+)' is not accepted", text) or re.search(
        r"does not accept option '([\w.]+)'", text
    )
    if unknown is None:
        return text
    key = unknown[1]
    words = sorted(set(re.findall(r"[a-z_]{3,}", text)) - {key.rsplit(".", 1)[-1]})
    near = get_close_matches(key.rsplit(".", 1)[-1], words, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "`grn COMMAND --help` lists the keys."
    return f"unknown key '{key}'; {hint}"


def main() -> Any:
    """Run the sub-command that `sys.argv` names.

    Returns:
        What the sub-command returns.

    Raises:
        SystemExit: With code 2 and one sentence on standard error, if the input is at fault.
    """
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text() + "\n")
        return None
    name = args[0]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        if name in TRAINER_COMMANDS:
            return _run_trainer()
        if name in TOOLS:
            return _run_tool(name, args[1:])
        near = get_close_matches(name, [*TRAINER_COMMANDS, *TOOLS], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`grn --help` lists the commands."
        raise ValueError(f"there is no command '{name}'; {hint}")
    except (ArgumentError, OmegaConfBaseException, ValueError) as error:
        sys.stderr.write(f"grn: {explain(error)}\n")
        raise SystemExit(2) from error
