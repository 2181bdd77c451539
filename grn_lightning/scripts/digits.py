"""`grn digits`: write the embedded data set."""

from pathlib import Path

from tqdm import tqdm

from grn_lightning.datasets.digits import DigitsConfig, build_digits, load_scans
from grn_lightning.metrics.digits import DigitJudge


def digits(target: Path, *, config: DigitsConfig = DigitsConfig()) -> str:
    """Write shards of moving handwritten digits: images, clips, classes and captions.

    Beside it comes the judge, `judge.safetensors`, a small classifier fitted on the training scans.
    What is already there is left as it is.

    Args:
        target: Folder of the set; `make data` takes `data/digits`.
        config: Sizes and counts.

    Returns:
        One line about what lies there.
    """
    total = (
        config.num_train_clips
        + config.num_val_clips
        + config.num_train_images
        + config.num_val_images
    )
    with tqdm(total=total, desc="digits", unit="sample") as bar:
        for count in build_digits(target, config):
            bar.update(count)
    judge_file = target / "judge.safetensors"
    if not judge_file.is_file():
        scans = load_scans("train", seed=config.seed)
        judge = DigitJudge.fit(
            scans.images, scans.labels, seed=config.seed, digit_size=config.digit_size
        )
        judge.save(judge_file)
    return f"{total} samples of moving digits lie in '{target}'."
