"""`grn digits`: write the embedded data set."""

from pathlib import Path

from tqdm import tqdm

from grn_lightning.datasets.digits import DigitsConfig, build_digits


def digits(target: Path, *, content: DigitsConfig = DigitsConfig()) -> str:
    """Write shards of moving handwritten digits: images, clips, classes and captions.

    A set that is already there is left as it is.

    Args:
        target: Folder of the set; `make data` takes `data/digits`.
        content: Sizes and counts.

    Returns:
        One line about what lies there.
    """
    total = (
        content.num_train_clips
        + content.num_val_clips
        + content.num_train_images
        + content.num_val_images
    )
    with tqdm(total=total, desc="digits", unit="sample") as bar:
        for count in build_digits(target, content):
            bar.update(count)
    return f"{total} samples of moving digits lie in '{target}'."
