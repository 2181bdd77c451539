"""One entry point: LightningCLI's `fit validate test predict`, and the tools in `scripts/`.

Every tool is a typed function; its signature is its command line and its docstring its help.
"""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from traceback import walk_tb
from typing import Any, get_args, get_origin

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

from grn_lightning.complaints import explain, require_settings

TRAINER_COMMANDS = {
    "fit": "train: grn fit -c experiments/tokenizer/digits.yaml",
    "validate": "validate a checkpoint: grn validate -c RUN.yaml --ckpt_path LAST.ckpt",
    "test": "test a checkpoint",
    "predict": "predict with a checkpoint",
}

# Each is a function of the same name in the module of that name in grn_lightning.scripts; two words
# are joined by an underscore there.
TOOLS = {
    "digits": "write the embedded data set of moving handwritten digits",
    "shards": "pack a folder of images or videos into WebDataset shards",
    "encode": "encode shards with a tokenizer, to train generators from codes",
    "cluster": "make the coarse labels of coarse-to-fine prediction, and see what they keep",
    "plan": "tell memory, time and disk of a training: grn plan FILE... --device A100",
    "check": "check a run, or a training before it begins: grn check -c FILE",
    "reconstruct": "put pictures and videos of any size through a tokenizer and back",
    "sample": "draw images or videos from a trained generator",
    "weights": "list the published weights by name, and which of them lie here",
    "calibrate": "fit adaptive steps of a trained generator to a wanted mean",
    "edit": "inpaint, outpaint, extend, vary or swap prompts of given or drawn pictures and clips",
    "replay": "make a picture or clip again from what it says about itself",
    "evaluate": "judge a trained tokenizer or generator on held-out data",
    "evaluate samples": "draw any number of samples, on any number of processes, and judge the set",
    "evaluate stats": "sum up real pictures or clips as a reference for distances",
    "evaluate geneval": "draw what GenEval scores, in the folders that it reads",
    "evaluate vbench": "draw what VBench scores, in the folder that it reads",
    "export": "write a trained network as one safetensors file and one JSON",
    "convert": "turn published weights into an export, and back",
    "bench quantizers": "train HBQ and its alternatives at equal bits, and compare them",
    "bench generators": "train plain, coarse-to-fine and refining generators, and compare them",
    "bench fine": "decode the same coarse maps by stage 2 and without it, and compare",
    "report": "write a self-contained HTML report of trained runs",
}

# Commands that keep what they have finished and pass over it the next time.
RESUMABLE = {
    "predict",
    "shards",
    "encode",
    "evaluate samples",
    "evaluate geneval",
    "evaluate vbench",
    "bench quantizers",
    "bench generators",
}


def help_text() -> str:
    """List all sub-commands."""
    lines = ["usage: grn COMMAND [options]", "", "training (LightningCLI):"]
    lines += [f"  {name:<10} {text}" for name, text in TRAINER_COMMANDS.items()]
    lines += ["", "tools:"]
    lines += [f"  {name:<10} {text}" for name, text in TOOLS.items()]
    lines += ["", "`grn COMMAND --help` tells the options of a command."]
    return "\n".join(lines)


def _run_trainer(*, run: bool = True) -> Any:
    """Hand over to LightningCLI; imported here, so that tools and help start quickly.

    Args:
        run: Whether to run the sub-command of `sys.argv`; else the training is only built.
    """
    import lightning as L
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from grn_lightning.lit.callbacks import Preflight
    from grn_lightning.lit.checkpoints import whole_checkpoint
    from grn_lightning.lit.command import ResumableCLI
    from grn_lightning.lit.saving import save_files_whole
    from grn_lightning.lit.settings import RULES, require_trainer
    from grn_lightning.lit.strategies import named_strategy

    class GRNCLI(ResumableCLI):
        def instantiate_trainer(self, **settings: Any) -> L.Trainer:
            """Take the strategies of `lit/strategies.py` by their names."""
            name = self._get(self.config_init, "trainer.strategy")
            kind = self._get(self.config_init, "trainer.accelerator")
            strategy = named_strategy(name, accelerator=kind)
            require_trainer({key: self._get(self.config_init, f"trainer.{key}") for key in RULES})
            trainer = super().instantiate_trainer(strategy=strategy, **settings)
            save_files_whole(trainer)  # and read what several processes have written
            return trainer

        def add_arguments_to_parser(self, parser: Any) -> None:
            """Let every training check itself; `--preflight.enabled=false` turns it off."""
            super().add_arguments_to_parser(parser)
            parser.add_lightning_class_args(Preflight, "preflight")

        def _parse_ckpt_path(self) -> None:
            """Look for the file; Lightning would let its settings beat the command line."""
            if not self.config.get("subcommand"):
                return
            options = self.config[self.config["subcommand"]]
            if options.get("ckpt_path") not in (None, "best", "last", "hpc"):
                options["ckpt_path"] = str(whole_checkpoint(options["ckpt_path"]))

    # Absolute interpolations (${data.init_args.x}) are resolved after all files and overrides.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser_kwargs = {
        "parser_mode": "omegaconf+",
        "exit_on_error": False,
        "allow_abbrev": False,  # else `--trainer.max_step` would be `max_steps`, unasked
    }
    try:
        return GRNCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs=parser_kwargs,
            run=run,
        )
    except MisconfigurationException as error:  # what Lightning calls a ValueError of settings
        raise ValueError(str(error)) from error


def _options_of(name: str) -> list[str]:
    """Return the names of a tool's options."""
    parameters = signature(_tool(name)).parameters
    config = parameters.get("config")
    fields = signature(config.annotation).parameters if config is not None else {}
    return [*(key for key in parameters if key != "config"), *fields, "config"]


def _tool(name: str) -> Callable[..., Any]:
    name = name.replace(" ", "_")
    return getattr(import_module(f"grn_lightning.scripts.{name}"), name)


def _add_positionals(parser: ArgumentParser, tool: Callable[..., Any]) -> set[str]:
    """Let a parameter before the star that has a default be left out, but not become an option.

    One that is a list and has no default takes one word or more.
    """
    help_of = {one.arg_name: one.description for one in parse_docstring(tool.__doc__ or "").params}
    names = set()
    for name, parameter in signature(tool).parameters.items():
        has_default = parameter.default is not Parameter.empty
        if not has_default and get_origin(parameter.annotation) is list:
            [kind] = get_args(parameter.annotation)
            parser.add_argument(name, nargs="+", type=kind, help=help_of.get(name))
            names.add(name)
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and has_default:
            options = {"type": parameter.annotation, "default": parameter.default}
            parser.add_argument(name, nargs="?", help=help_of.get(name), **options)
            names.add(name)
    return names


def _run_tool(name: str, args: Sequence[str]) -> Any:
    """Parse a tool's options from its signature, call it, and show what it returns.

    The fields of a dataclass that a tool takes as `config` become options of their own.
    """
    tool = _tool(name)
    parser = ArgumentParser(
        prog=f"grn {name}", description=TOOLS[name], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with options")
    known = _add_positionals(parser, tool)
    parser.add_function_arguments(tool, as_positional=True, skip={"config", *known})
    parameter = signature(tool).parameters.get("config")
    fields: list[str] = []
    if parameter is not None:
        fields = parser.add_class_arguments(parameter.annotation)
    options = dict(vars(parser.instantiate_classes(parser.parse_args(list(args)))))
    options.pop("config", None)
    flat = {field: options.pop(field) for field in fields}
    if parameter is not None:
        options["config"] = parameter.annotation(**flat)
    return _show(tool(**options))


def _show(result: Any) -> Any:
    """Write what a tool returns; what it says is wrong fails the command."""
    if result is not None:
        sys.stdout.write(f"{result}\n")
    if code := getattr(result, "exit_code", 0):
        raise SystemExit(code)
    return result


def _is_training(args: Sequence[str]) -> bool:
    """Whether options are those of a training: files of settings."""
    return any(arg == "-c" or arg.split("=")[0] == "--config" for arg in args)


def _check_training(args: Sequence[str]) -> Any:
    """Build the training that `grn fit` would run with these options, and check it."""
    from grn_lightning.lit.strategies import refuse_unfit
    from grn_lightning.scripts.check import check_training

    sys.argv = [sys.argv[0], *args]  # LightningCLI warns where it is given both
    built = _run_trainer(run=False)
    refuse_unfit(built.trainer.strategy, built.model)
    return _show(check_training(built.model, built.datamodule))


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
    num_words = 2 if " ".join(args[:2]) in TOOLS else 1
    name = " ".join(args[:num_words])
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        require_settings(args)
        if name in TRAINER_COMMANDS:
            return _run_trainer()
        if name == "check" and _is_training(args):
            return _check_training(args[1:])
        if name in TOOLS:
            return _run_tool(name, args[num_words:])
        longer = [tool for tool in TOOLS if tool.startswith(f"{name} ")]
        near = longer or get_close_matches(name, [*TRAINER_COMMANDS, *TOOLS], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`grn --help` lists the commands."
        raise ValueError(f"there is no command '{name}'; {hint}")
    except (ArgumentError, OmegaConfBaseException, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _is_addressed_to_a_person(error):
            raise
        if isinstance(error, OSError) and not _is_about_a_file(error):
            raise
        is_tool = name in TOOLS and not (name == "check" and _is_training(args))
        options = _options_of(name) if is_tool else ()
        sys.stderr.write(f"grn: {explain(error, options=options)}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        raise _interrupted(name) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's graceful shutdown
            raise _interrupted(name) from error
        if message := getattr(error, "message", ""):  # a signal, see StopOnSignal
            sys.stderr.write(f"\ngrn: {message}\n")
        raise


def _interrupted(name: str) -> SystemExit:
    """Say how an interrupted command goes on; 130 is what shells expect after Ctrl-C."""
    if name == "fit":
        advice = (
            "checkpoints are whole: the same command with `--resume auto` goes on from the last."
        )
    elif name in RESUMABLE:
        advice = "the same command goes on where it stopped."
    else:
        advice = "files that were written are whole; give the command again, with a new `--out`."
    sys.stderr.write(f"\ngrn: interrupted; {advice}\n")
    return SystemExit(130)


def _is_about_a_file(error: OSError) -> bool:
    """Whether the error says which file is missing, in the way, or closed to the user."""
    return isinstance(error, FileNotFoundError) or error.filename is not None


def _is_addressed_to_a_person(error: ValueError) -> bool:
    """Whether the error comes from code that writes sentences; others keep their traceback."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    room = frame.f_globals.get("__name__", "").split(".")[0]
    return room in ("grn_lightning", "jsonargparse", "lightning", "omegaconf")
