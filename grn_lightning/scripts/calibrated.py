"""Where `grn calibrate` leaves what it has found, and how others find it.

Beside the checkpoints of a run lies `sampling.json`; an export holds the same under "sampling":
the fields of a `RefineConfig`, and "calibration", which tells how they came about.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grn_lightning.datasets.manifest import write_json
from grn_lightning.models.pretrained import export_files, is_export
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.config import config_from_plain
from grn_lightning.scripts.runs import TrainedRun

SAMPLING_FILE = "sampling.json"
_CALIBRATION = "calibration"


def calibrated(run: TrainedRun) -> RefineConfig | None:
    """Return the settings of sampling that a run was calibrated to, or None.

    Raises:
        ValueError: If they are none that this version knows.
    """
    file = run.folder / SAMPLING_FILE
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored.pop(_CALIBRATION, None)
    try:
        return config_from_plain(stored)
    except ValueError as error:
        raise ValueError(f"'{file}': {error} `grn calibrate` writes it anew.") from error


def store_sampling(
    checkpoint: Path, folder: Path, config: RefineConfig, calibration: dict[str, Any]
) -> Path:
    """Write settings of sampling beside a run, or into the JSON of an export.

    Args:
        checkpoint: A checkpoint, or an export.
        folder: Folder of the run, where it is a checkpoint.
        config: The settings.
        calibration: How they came about.

    Returns:
        The file that holds them.
    """
    sampling = asdict(config) | {_CALIBRATION: calibration}
    if not is_export(checkpoint):
        file = folder / SAMPLING_FILE
        write_json(file, sampling)
        return file
    file = export_files(checkpoint).info
    info = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, info | {"sampling": sampling})
    return file
