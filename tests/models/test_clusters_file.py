"""Clusters on disk: what is written is read, and belongs to one tokenizer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grn_lightning.models.clusters_file import (
    Clusters,
    ClustersInfo,
    read_clusters,
    write_clusters,
)


def codewords():
    return Clusters(
        info=ClustersInfo(kind="codewords", tokenizer_hash="abc", seed=3, inertia=1.5),
        centroids=torch.randn(2, 4),
        sizes=torch.tensor([3, 2]),
        cluster_of=torch.tensor([0, 1, 0, 0, 1]),
    )


def latents():
    return Clusters(
        info=ClustersInfo(kind="latents", tokenizer_hash="abc", num_rounds=4),
        centroids=torch.randn(3, 2),
        sizes=torch.tensor([9, 8, 7]),
    )


@pytest.mark.parametrize("make", [codewords, latents])
def test_what_was_written_is_read(tmp_path, make):
    clusters, path = make(), tmp_path / "deep" / "clusters.safetensors"
    write_clusters(path, clusters)
    read = read_clusters(path, tokenizer_hash="abc")
    assert read.info == clusters.info
    for name in ("centroids", "sizes", "cluster_of"):
        before, after = getattr(clusters, name), getattr(read, name)
        assert (before is None and after is None) or torch.equal(before, after)
    assert read.split().coarse_sizes == clusters.split().coarse_sizes


def test_other_tools_find_the_members_of_every_cluster(tmp_path):
    write_clusters(tmp_path / "c", codewords())
    with safe_open(tmp_path / "c", "pt") as file:
        assert file.get_tensor("members").tolist() == [[0, 2, 3], [1, 4, -1]]
        assert file.get_tensor("size").tolist() == [3, 2]


def test_clusters_of_another_tokenizer_are_refused(tmp_path):
    write_clusters(tmp_path / "c", codewords())
    with pytest.raises(ValueError, match="belong to tokenizer abc, but the one at hand is xyz"):
        read_clusters(tmp_path / "c", tokenizer_hash="xyz")


def test_what_is_no_file_of_clusters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no clusters at"):
        read_clusters(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="is no file of clusters"):
            read_clusters(tmp_path / name)
    newer = json.dumps({"format_version": 2})
    save_file({"a": torch.zeros(1)}, tmp_path / "newer", metadata={"grn": newer})
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1"):
        read_clusters(tmp_path / "newer")
