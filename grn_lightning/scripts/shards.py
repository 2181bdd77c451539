"""`grn shards`: make WebDataset shards of your own pictures or videos."""

from pathlib import Path

from grn_lightning.datasets.build import ShardReport, ShardsConfig, build_shards

__all__ = ["ShardReport", "ShardsConfig", "shards"]

_DEFAULTS = ShardsConfig()


def shards(source: Path, target: Path, *, config: ShardsConfig = _DEFAULTS) -> ShardReport:
    """Make WebDataset shards of pictures or videos.

    Every file is decoded once, to see that it can be; those that cannot be are listed by name in
    <split>.skipped.jsonl and left alone. Bytes are copied as they are unless `resize` is given.
    An interrupted run goes on where it was when the same command is given again.

    Args:
        source: A folder, searched with its subfolders, or a table of files (.csv, .tsv, .jsonl).
        target: Folder of the shards `<split>-000000.tar`, ... and of `<split>.manifest.json`.
        config: How the files become shards.

    Returns:
        What was written; `str` tells it to a person.

    Raises:
        ValueError: If the sources or the target do not fit together.
    """
    return build_shards(source, target, config=config)
