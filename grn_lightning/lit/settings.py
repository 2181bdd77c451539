"""Values of the trainer that Lightning takes without a word, and that end in another error."""

from collections.abc import Callable, Mapping
from typing import Any


def _is_count(devices: Any) -> bool:
    """Whether a number of devices is one; lists and "auto" are Lightning's to read."""
    text = str(devices)
    return not text.lstrip("-").isdigit() or int(text) > 0 or int(text) == -1


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "accumulate_grad_batches": (lambda x: x >= 1, "at least 1"),
    "gradient_clip_val": (lambda x: x >= 0, "at least 0, or null for none"),
    "val_check_interval": (lambda x: not isinstance(x, int | float) or x > 0, "positive"),
    "devices": (_is_count, "positive, -1 or 'auto'"),
    "max_steps": (lambda x: x >= 1 or x == -1, "positive, or -1 for no end"),
}
"""What is allowed, by the name of the setting."""


def require_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse values that a training cannot have.

    Args:
        settings: Of `lightning.Trainer`, by name; null leaves a value to Lightning.

    Raises:
        ValueError: Naming all of them.
    """
    wrong = [
        f"`trainer.{name}` must be {text}, got {settings[name]!r}"
        for name, (is_right, text) in RULES.items()
        if settings.get(name) is not None and not is_right(settings[name])
    ]
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
