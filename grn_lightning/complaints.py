"""Reduce the parser's errors to one sentence: which key, what is allowed, what was given.

jsonargparse answers a wrong value with a tree: every class on the way to it, every type that would
have been allowed, and the whole configuration. The leaf that a person needs stands in the middle.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_CONTEXT = re.compile(r"""(?:Parser key "([^"]+)"|Problem with given class_path '([^']+)'):\s*""")
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>$"
    r"|Subclass types expect|a class path \(str\)|a dict "
)
_UNKNOWN = re.compile(
    r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'"
    r"|unrecognized arguments: --([\w.+-]+)"
)
_TOP_LEVEL = (
    "config",
    "model",
    "data",
    "trainer",
    "preflight",
    "seed_everything",
    "resume",
    "ckpt_path",
    "weights_only",
)
_LONGEST_NAME = 255  # of a file, in characters
_FEW = 16  # so many allowed keys are listed
_TABLE = re.compile(r"[^\n]+(\n  \S[^\n]*)+")  # a sentence of ours, and rows below it


class Complaint(NamedTuple):
    """A leaf of the parser's tree."""

    path: tuple[str, ...]
    """Keys from the outermost to the one complained about."""
    owner: str
    """Import path of the class that the innermost key belongs to; empty for the command."""
    text: str
    """What is wrong."""


def complaints(text: str) -> list[Complaint]:
    """Return the leaves of an error's tree, which its indentation spells out."""
    found, stack = [], list[tuple[int, str, str]]()
    for line in text.splitlines():
        body = line.lstrip(" -" if line.lstrip().startswith("- ") else " ")
        indent = len(line) - len(body)
        while stack and stack[-1][0] >= indent:
            stack.pop()
        while context := _CONTEXT.match(body):
            stack.append((indent, context[1] or "", context[2] or ""))
            body = body[context.end() :]
        if body and not _NOISE.match(body):
            path = tuple(key for _, key, _ in stack if key)
            owner = next((owner for _, _, owner in reversed(stack) if owner), "")
            found.append(Complaint(path, owner, body))
    return found


def explain(error: Exception, *, options: Sequence[str] = ()) -> str:
    """Return the sentence that names the culprit and what to do.

    Args:
        error: What a parser, or code of ours, has raised.
        options: Options of the command, for a hint; those of the training commands by default.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"'{error.filename}': {error.strerror[0].lower()}{error.strerror[1:]}."
    if type(error) is ValueError and _TABLE.fullmatch(str(error)):
        return str(error)
    found = complaints(str(error))
    if not any(complaint.path or complaint.owner for complaint in found) and len(found) > 1:
        return _interpolation(str(error)) or " ".join(str(error).split())
    unknown = [(complaint, key) for complaint in found if (key := _unknown_key(complaint.text))]
    if unknown:
        # Of a union every class complains; who misspelt a key of one class meant that class.
        known = {name for complaint, _ in unknown for name in _allowed(complaint, options)}
        misspelt = [pair for pair in unknown if pair[1].split(".")[0] not in known]
        return _tell_unknown(*(misspelt or unknown)[0], options)
    found.sort(key=lambda complaint: complaint.text.startswith("Not a valid subclass"))
    return _tell(found[0]) if found else " ".join(str(error).split())


def require_settings(args: Sequence[str]) -> None:
    """Refuse files behind `-c` that hold no settings; parsers name neither file nor reason.

    Raises:
        ValueError: Naming the first such file.
    """
    for place, word in enumerate(args):
        name, _, given = word.partition("=")
        if name not in ("-c", "--config") or not (given or args[place + 1 : place + 2]):
            continue
        file = Path(given or args[place + 1])
        if len(file.name) > _LONGEST_NAME or not file.is_file():
            continue  # the parser says so, or takes it for the settings themselves
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"'{file}' is no text in UTF-8; save it as such.") from error
        except yaml.MarkedYAMLError as error:
            where = error.problem_mark or error.context_mark
            line = "" if where is None else f", line {where.line + 1}"
            why = str(error.problem).replace("'\\t'", "a tab")
            raise ValueError(f"'{file}'{line}: {why}; it must be YAML.") from error
        except yaml.YAMLError as error:  # characters that YAML does not know, as of UTF-16
            raise ValueError(
                f"'{file}' is no text in UTF-8 that is YAML; save it as such."
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"'{file}' must hold settings, one `name: value` a line.")


def _unknown_key(text: str) -> str | None:
    match = _UNKNOWN.search(text)
    return next(key for key in match.groups() if key) if match else None


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _allowed(complaint: Complaint, options: Sequence[str]) -> list[str]:
    """Names that would have been right in place of the unknown one."""
    key = _unknown_key(complaint.text) or ""
    owner = complaint.owner
    if not owner and key.startswith("trainer."):
        owner = "lightning.Trainer"
    if not owner:
        return list(options or _TOP_LEVEL)
    return [name for name in signature(_load(owner)).parameters if name != "self"]


def _hint(name: str, allowed: Iterable[str]) -> str:
    known = list(allowed)
    if name in known:
        return f"'{name}' is given without a name: its value alone."
    if near := get_close_matches(name, known, n=1):
        return f"did you mean '{near[0]}'?"
    if len(known) <= _FEW:
        return f"known are {', '.join(known)}."
    return "`grn COMMAND --help` lists the known ones."


def _tell_unknown(complaint: Complaint, key: str, options: Sequence[str]) -> str:
    if complaint.owner in ("lightning.LightningModule", "lightning.LightningDataModule"):
        return (
            f"'{'.'.join((*complaint.path, key))}' comes before its class is known; put options "
            "of the model and the data behind `-c FILE`."
        )
    wrong = key.removeprefix("trainer.").split("=")[0]
    # Of a dotted key the first part that does not exist is the wrong one.
    wrong, *inner = wrong.split(".")
    path, allowed = ".".join((*complaint.path, key)), _allowed(complaint, options)
    if inner and wrong in allowed:
        return f"unknown key '{path}'; `{wrong}` has no '{'.'.join(inner)}', see `--help`."
    return f"unknown key '{path}'; {_hint(wrong, allowed)}"


def _tell(complaint: Complaint) -> str:
    """Put a complaint about a value into our words, where we have any."""
    key, text = ".".join(complaint.path), complaint.text
    if match := re.match(r"Expected an? (.+?)\. Got value: (.*)", text):
        return f"`{key}` must be {_type_name(match[1])}, got {match[2]!r}."
    if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        classes = [name for name in dir(import_module(match[1])) if not name.startswith("_")]
        near = get_close_matches(match[2], classes, n=1)
        hint = f"; did you mean '{match[1]}.{near[0]}'?" if near else "."
        return f"`{key}`: there is no '{match[1]}.{match[2]}'{hint}"
    if match := re.match(r"the following arguments are required: (.*)", text):
        names = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        where = f" in `{key}`" if key else ""
        advice = ", in a file behind `-c`" if names != match[1] else ""
        return f"{names} must be given{where}{advice}."
    if match := re.match(r"Not a valid subclass of (\w+)", text):
        return f"`{key}` must be a {match[1]}: `class_path`, `init_args`, and nothing beside them."
    if match := re.match(r"File does not exist: '?([^']+)'?", text):
        return f"`{key}`: there is no file '{match[1]}'."
    is_ours = not complaint.owner and not complaint.path
    return text if is_ours else f"`{key}`: {text}"


def _type_name(name: str) -> str:
    name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name)
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", name)


def _interpolation(text: str) -> str | None:
    """Explain a `${...}` that leads nowhere."""
    match = re.match(r"(.*?)\s+full_key: (\S+)", text, flags=re.DOTALL)
    if match is None:
        return None
    key = re.sub(r"^(fit|validate|test|predict)\.", "", match[2])
    if lost := re.match(r"Interpolation key '\.*([\w.]+)' not found", match[1]):
        return f"`{key}` refers to '${{{lost[1]}}}', which there is not."
    return f"`{key}`: {' '.join(match[1].split())}."
