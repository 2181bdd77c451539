"""`grn cluster`: what it writes, and what it tells of cells."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.clusters import fit_codewords, read_clusters
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.scripts.cluster import _codeword_arms, cluster
from grn_lightning.scripts.stand_ins import random_places


def run(digits, tokenizer, out, **options):
    return cluster(
        tokenizer,
        digits / "images",
        out=out,
        **{"num_clusters": 2, "image_size": 16, "num_restarts": 1, **options},
    )


def test_clusters_of_latents_keep_more_than_random_groups(digits, trained, tmp_path):
    report = run(digits, trained.tokenizer, tmp_path / "c.safetensors")
    tokenizer = load_tokenizer(trained.tokenizer)
    clusters = read_clusters(report.file, tokenizer_hash=weights_hash(tokenizer))
    assert clusters.sizes.sum() == 24 * 4  # images, positions
    assert report.sizes == (clusters.sizes.min(), clusters.sizes.median(), clusters.sizes.max())
    psnr = report.psnr
    assert [*psnr][-2:] == ["random bits behind the first 0", "random bits behind the first 1"]
    assert psnr["the code itself"] >= psnr["random bits behind the first 1"]
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["psnr"] == psnr
    with Image.open(report.sheet) as sheet:
        assert sheet.width > 7 * 16
    for name, value in psnr.items():
        assert f"{name:<34} {value:6.2f} dB" in str(report)


def test_members_are_drawn_evenly_from_the_cluster_at_each_position():
    cluster_of = torch.tensor([0, 1, 1, 2, 1, 0])
    coarse = torch.randint(3, (300, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    drawn = random_places(coarse, cluster_of, torch.arange(300), seed=1)
    assert torch.equal(cluster_of[drawn], coarse)
    counts = drawn[coarse == 1].bincount(minlength=6)[[1, 2, 4]]
    assert counts.min() > 0.27 * counts.sum()


@torch.no_grad()
def test_codewords_are_replaced_within_their_clusters():
    torch.manual_seed(0)
    config = VQTokenizerConfig(
        codebook_size=40, codebook_dim=3, width=32, width_multipliers=(1,), feature_width=4
    )
    model = VQTokenizer(config).eval()
    clusters = fit_codewords(model, num_clusters=8, num_restarts=1)
    codes = torch.randint(40, (20, 1, 1, 3, 3), generator=torch.Generator().manual_seed(0))
    index = torch.arange(20)
    arms = {name: arm(codes, index) for name, arm in _codeword_arms(model, clusters, seed=0)}
    found = {name: model.quantize(z) for name, z in arms.items()}
    assert torch.equal(found["the code itself"], codes)
    for name in ("member nearest to the centroid", "random member"):
        assert torch.equal(clusters.cluster_of[found[name]], clusters.cluster_of[codes])
    assert (found["member nearest to the centroid"].unique().numel()) <= 8
    errors = {name: (z - arms["the code itself"]).square().mean() for name, z in arms.items()}
    names = ["centroid", "random member", "random member of a random group"]
    ordered = [errors[name] for name in names]
    assert ordered == sorted(ordered)


def test_an_existing_file_and_too_many_clusters_are_refused(digits, trained, tmp_path):
    (tmp_path / "c.safetensors").touch()
    for out in (tmp_path / "c.safetensors", tmp_path / "c.txt"):
        with pytest.raises(ValueError, match="must be a new file that ends in .safetensors"):
            run(digits, trained.tokenizer, out)
    with pytest.raises(ValueError, match="num_clusters must be between 1 and"):
        run(digits, trained.tokenizer, tmp_path / "new.safetensors", num_clusters=1000)


def test_a_mistake_leaves_no_file_in_the_way_of_the_next_try(digits, trained, tmp_path):
    data = tmp_path / "digits" / "images"
    shutil.copytree(digits / "images", data)
    for file in data.glob("val*"):
        file.unlink()
    out = tmp_path / "out" / "c.safetensors"
    for options in ({"digits": data.parent}, {"digits": digits, "image_size": 17}):
        with pytest.raises(ValueError, match="val|17"):
            run(tokenizer=trained.tokenizer, out=out, **options)
    assert not out.parent.exists()
    before = os.umask(0o022)
    run(digits, trained.tokenizer, out)
    os.umask(before)
    assert oct(out.stat().st_mode)[-3:] == "644"
