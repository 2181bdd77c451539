"""Clusters on disk: what is written is read, and belongs to one tokenizer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grn_lightning.models.clusters import (
    Clusters,
    ClustersInfo,
    fit_codewords,
    fit_latents,
    read_clusters,
    write_clusters,
)
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

VQ = VQTokenizerConfig(
    codebook_size=40, codebook_dim=3, width=32, width_multipliers=(1,), feature_width=4
)
HBQ = TokenizerConfig(
    latent_channels=2,
    num_rounds=3,
    encoder_width=8,
    decoder_width=8,
    width_multipliers=(1,),
    num_res_blocks=1,
    temporal_downsample=(),
)


def nearest(vectors, centroids):
    return [min(range(len(centroids)), key=lambda k: (v - centroids[k]).norm()) for v in vectors]


def test_every_codeword_is_in_the_cluster_of_its_nearest_centroid():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQ)
    clusters = fit_codewords(tokenizer, num_clusters=5)
    words = tokenizer.quantize.codewords()
    assert clusters.cluster_of.tolist() == nearest(words, clusters.centroids)
    spread = (words - clusters.centroids[clusters.cluster_of]).square().sum().item()
    assert clusters.info.inertia == pytest.approx(spread, rel=1e-5)
    assert clusters.sizes.sum() == 40
    assert clusters.info.tokenizer_hash == weights_hash(tokenizer)
    again = fit_codewords(tokenizer, num_clusters=5)
    assert torch.equal(again.cluster_of, clusters.cluster_of)
    means = torch.stack([words[clusters.cluster_of == k].mean(0) for k in range(5)])
    torch.testing.assert_close(clusters.centroids, means, rtol=1e-4, atol=1e-5)


def test_as_many_clusters_as_codewords_are_the_codewords():
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQ)
    clusters = fit_codewords(tokenizer, num_clusters=40, num_restarts=1)
    assert sorted(clusters.cluster_of.tolist()) == list(range(40))
    assert clusters.info.inertia == pytest.approx(0.0, abs=1e-9)


def test_latents_are_clustered_as_often_as_they_occur():
    tokenizer = HBQTokenizer(HBQ)
    codes = torch.tensor([[0, 0], [0, 0], [0, 1], [7, 7]])[:, :, None, None, None]
    clusters = fit_latents(tokenizer, codes, num_clusters=2)
    assert sorted(clusters.sizes.tolist()) == [1, 3]
    crowd = clusters.centroids[clusters.sizes.argmax()]
    torch.testing.assert_close(crowd, torch.tensor([-7 / 8, (-7 / 8 * 2 - 5 / 8) / 3]))
    labels = clusters.split().coarse(codes.squeeze(2))[:, 0, 0, 0]
    assert (labels == clusters.sizes.argmax()).tolist() == [True, True, True, False]


def test_more_clusters_than_vectors_are_refused():
    with pytest.raises(ValueError, match="between 1 and 40, .* got 41"):
        fit_codewords(VQTokenizer(VQ), num_clusters=41)


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
