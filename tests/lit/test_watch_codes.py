"""What `WatchCodes` draws is what was counted, and collapsed codes do not pass in silence."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grn_lightning.lit.callbacks.codes import entropy_picture
from grn_lightning.media.heat_maps import heat_map
from grn_lightning.metrics import CodeStatistics
from tests.tiny_runs import callback, fit, generator_config, logger, tokenizer_config

# Few codes are counted in two validations of a tiny set: 6 clips of 3 x 2 x 2 positions.
LIMITS = {"max_dead_bits": 1.0, "min_usage": 0.0, "min_entropy": 0.0, "min_round_entropy": 0.0}


def run(folder: Path, digits: Path, *, quantizer: str, alarms: dict) -> None:
    config = tokenizer_config(
        folder, digits, callbacks=[callback("WatchCodes", alarms=alarms)], trainer={"max_steps": 1}
    )
    config["model"]["init_args"]["tokenizer"] |= {"quantizer": {"name": quantizer}}
    config["trainer"] |= {
        "val_check_interval": 1,
        "logger": logger("TensorBoardLogger", folder),
    }
    fit(folder, config)


def events(folder: Path) -> EventAccumulator:
    sizes = {"images": 0, "scalars": 0, "tensors": 0}
    return EventAccumulator(str(folder / "log"), size_guidance=sizes).Reload()


def text_of(folder: Path) -> str:
    (event,) = events(folder).Tensors("codes/alarms/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_healthy_codes_are_drawn_and_pass(digits: Path, tmp_path: Path) -> None:
    run(tmp_path, digits, quantizer="hbq", alarms=LIMITS | {"max_dead_channels": 1.0})
    found = events(tmp_path)
    assert "codes/entropy" in found.Tags()["images"]
    assert [event.value for event in found.Scalars("codes/num_alarms")] == [0]
    assert text_of(tmp_path) == "none"


def test_collapsed_codes_warn_with_a_sentence_and_stand_in_tensorboard(
    digits: Path, tmp_path: Path
) -> None:
    # The signs of an untrained encoder hardly depend on what it sees.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, digits, quantizer="lfq", alarms=LIMITS)
    (found,) = [str(one.message) for one in caught if "codes at" in str(one.message)]
    assert re.match(r"codes at step 1: \d of 8 code channels .* take a single value: ", found)
    assert events(tmp_path).Scalars("codes/num_alarms")[0].value == 1
    assert text_of(tmp_path).startswith("- ")
    assert "take a single value" in text_of(tmp_path)


def test_continuous_latents_have_nothing_to_watch(digits: Path, tmp_path: Path) -> None:
    run(tmp_path, digits, quantizer="none", alarms={})
    assert "codes/entropy" not in events(tmp_path).Tags()["images"]
    assert not [tag for tag in events(tmp_path).Tags()["scalars"] if tag.startswith("codes/")]


def test_a_generator_run_is_refused(digits: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    config = generator_config(
        tmp_path, digits, tokenizer_run, kind="class", callbacks=[callback("WatchCodes")]
    )
    with pytest.raises((ValueError, SystemExit)):
        fit(tmp_path, config)


# ------------------------------------------------------------------ the picture


def test_the_colours_follow_the_entropies() -> None:
    values = torch.zeros(4, 40)
    values[:, 20:] = 1
    picture = heat_map(
        values.repeat(2, 2), title="t", rows=[str(n) for n in range(8)], x_label="x", limits=(0, 1)
    )
    row = [picture.getpixel((x, picture.height // 2)) for x in range(picture.width)]
    purple, yellow = (68, 1, 84), (253, 231, 36)  # ends of viridis

    def share(colour: tuple) -> float:
        close = [max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 8 for pixel in row]
        return sum(close) / len(row)

    assert share(purple) == pytest.approx(share(yellow), abs=0.02)
    assert share(purple) > 0.3


@pytest.mark.parametrize("num_rounds", [0, 1, 4])
def test_any_codes_can_be_drawn(num_rounds: int) -> None:
    sizes = {"num_rounds": num_rounds} if num_rounds else {"alphabet_size": 256}
    metric = CodeStatistics(num_channels=1, **sizes)
    metric.update(torch.randint(0, 2, (2, 1, 5)))
    picture = entropy_picture(metric.compute())
    assert picture.height > 0


def test_a_matrix_without_its_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a label per row, got \(2, 3\) and 1 labels"):
        heat_map(torch.zeros(2, 3), title="", rows=["a"], x_label="", limits=(0, 1))
