"""`grn evaluate`: the numbers are right, carry their protocol, and can be repeated."""

import json
import math
import re
import shlex
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.functional import hbq_decode, hbq_encode, pack_codes
from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from grn_lightning.media.images import to_float, to_uint8
from grn_lightning.media.video import decode_video
from grn_lightning.metrics import DIRECTIONS, DigitJudge
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.evaluate import EvaluationReport, evaluate
from grn_lightning.scripts.records import Figure, figures_from_json, read_evaluations
from tests.scripts.conftest import Runs
from tests.shard_files import image_sample, write_split
from tests.tiny_runs import TINY_TOKENIZER, call_grn

QUICK = RefineConfig(num_steps=2, guidance_scale=2.0)


def held_out(digits: Path) -> Iterator[tuple[Tensor, str, int]]:
    """Clips `(3, f, h, w)` in [-1, 1], captions and classes, straight from the tar."""
    shards = ShardSet.open(digits / "clips", "val")
    for number in range(len(shards)):
        fields = shards.read(number, ("mp4", "txt", "cls")).fields
        clip = to_float(decode_video(fields["mp4"], fps=None, num_frames=None))
        yield clip.transpose(0, 1), fields["txt"].decode(), int(fields["cls"])


def values(report: EvaluationReport) -> dict[str, float]:
    return {figure.tag: figure.value for figure in (*report.figures, *report.by_rounds)}


def psnr(first: Tensor, second: Tensor) -> float:
    """Mean over frames, spelt out."""
    decibels = []
    for frame in range(first.shape[1]):
        error = (first[:, frame].clamp(-1, 1) - second[:, frame]).double().square().mean()
        decibels.append(10 * math.log10(4 / float(error)))
    return sum(decibels) / len(decibels)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """The formula by singular values: with S = A'A, tr (S_1 S_2)^(1/2) is the sum of A_1 A_2'."""
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(means + (a**2).sum() + (b**2).sum() - 2 * root)


def test_reconstruction_is_what_a_slow_loop_measures(runs: Runs, digits: Path) -> None:
    result = values(evaluate(runs.tokenizer, digits / "clips", batch_size=4))
    tokenizer = load_tokenizer(runs.tokenizer)
    expected: dict[str, list[float]] = {}
    for clip, _, _ in held_out(digits):
        z = tokenizer.encode(clip[None])
        latents = {"unquantized": z}
        for m in range(1, 7):
            latents[f"M={m}"] = hbq_decode(hbq_encode(z, num_rounds=m), num_rounds=m)
        for name, z_hat in latents.items():
            score = psnr(tokenizer.decode(z_hat)[0], clip)
            expected.setdefault(f"PSNR[{name},6,val]", []).append(score)
    for tag, scores in expected.items():
        assert result[tag] == pytest.approx(sum(scores) / len(scores), abs=1e-4), tag
    similarities = [
        structural_similarity_index_measure(
            tokenizer(clip[None]).reconstruction[0].transpose(0, 1).clamp(-1, 1),
            clip.transpose(0, 1),
            data_range=2.0,
        )
        for clip, _, _ in held_out(digits)
    ]
    assert result["SSIM[6,val]"] == pytest.approx(float(sum(similarities)) / 6, abs=1e-5)
    assert result["PSNR[6,val]"] == result["PSNR[M=2,6,val]"]  # it was trained with two rounds


def test_the_bit_rate_is_that_of_the_packed_codes(runs: Runs, digits: Path) -> None:
    result = values(evaluate(runs.tokenizer, digits / "clips"))
    clip = next(held_out(digits))[0]
    codes = load_tokenizer(runs.tokenizer).tokenize(clip[None])
    num_bits = 8 * len(pack_codes(codes, num_rounds=2))
    assert result["bits/pixel[M=2,d=4,5x16x16]"] == num_bits / (5 * 16 * 16)


def test_samples_are_judged_like_clips_drawn_one_by_one(runs: Runs, digits: Path) -> None:
    result = values(evaluate(runs.text, digits / "clips", refine=QUICK, seed=3, batch_size=4))
    module, judge = load_generator(runs.text), DigitJudge.load(digits / "judge.safetensors")
    rights: dict[str, list[list[bool]]] = {"samples": [], "reconstructions": [], "real": []}
    features: dict[str, list[Tensor]] = {name: [] for name in rights}
    for number, (clip, caption, label) in enumerate(held_out(digits)):
        drawn = module.draw_clips(
            {"captions": [caption]},
            torch.tensor([number]),
            size=(5, 16, 16),
            config=QUICK,
            seed=3,
        )
        rebuilt = module.detokenize(module.tokenize(clip[None]))
        shown = {"samples": drawn, "reconstructions": rebuilt, "real": clip[None]}
        for name, clips in shown.items():
            digit = int(judge.classify(clips)) == label
            direction = int(judge.direction(clips)) == DIRECTIONS.index(caption.split()[-1])
            rights[name].append([digit, direction, digit and direction])
            features[name].append(judge(clips).double())
    for name, rows in rights.items():
        shares = np.mean(rows, axis=0)
        for what, share in zip(("digit", "direction", "caption"), shares, strict=True):
            assert result[f"{what} accuracy[digits-cnn,{name},6,val]"] == pytest.approx(share)
    sets = {name: torch.cat(rows).numpy() for name, rows in features.items()}
    for tag, name in (("FID", "samples"), ("rFID", "reconstructions")):
        expected = frechet(sets[name], sets["real"])
        assert result[f"{tag}[digits-cnn,6,val]"] == pytest.approx(expected, rel=1e-3), tag


def test_a_class_generator_answers_to_classes(runs: Runs, digits: Path) -> None:
    report = evaluate(runs.classes, digits / "images", refine=QUICK, num_samples=4)
    result = values(report)
    assert {"FID[digits-cnn,4,val]", "digit accuracy[digits-cnn,real,4,val]"} <= result.keys()
    assert not [tag for tag in result if "direction" in tag]  # a picture does not move
    [record] = read_evaluations(runs.classes)
    labels = [
        f"class {int(ShardSet.open(digits / 'images', 'val').read(n, ('cls',)).fields['cls'])}"
        for n in range(4)
    ]
    assert [p["caption"] for p in record["pictures"] if p["kind"] == "sample"] == labels


@pytest.mark.parametrize("kind", ["tokenizer", "text"])
def test_the_command_of_a_record_gives_the_same_numbers(
    runs: Runs, digits: Path, kind: str
) -> None:
    folder = getattr(runs, kind)
    options: dict[str, Any] = {} if kind == "tokenizer" else {"refine": QUICK, "seed": 1}
    evaluate(folder, digits / "clips", num_samples=5, batch_size=2, **options)
    before = {file: file.read_bytes() for file in (folder / "evaluation" / "001").iterdir()}
    [record] = read_evaluations(folder)
    call_grn(*shlex.split(record["command"])[1:])

    first, second = read_evaluations(folder)
    assert first == record
    for name in (
        "checkpoint_sha256",
        "data_sha256",
        "size",
        "refine",
        "judge",
        "psnr_by_rounds",
        "codes",
    ):
        assert second[name] == first[name]
    for a, b in zip(first["figures"], second["figures"], strict=True):
        assert a["tag"] == b["tag"]
        assert a["value"] == b["value"] or a["name"] == "seconds/sample"
    after = {file: file.read_bytes() for file in (folder / "evaluation" / "001").iterdir()}
    assert after == before  # pictures of an earlier evaluation stay
    again = [folder / picture["file"] for picture in second["pictures"]]
    assert [file.read_bytes() for file in again] == [
        (folder / picture["file"]).read_bytes() for picture in first["pictures"]
    ]


def test_a_batch_size_changes_no_number(runs: Runs, digits: Path) -> None:
    many, few = (
        values(evaluate(runs.text, digits / "clips", refine=QUICK, batch_size=size))
        for size in (6, 4)
    )
    for tag in many:
        if not tag.startswith("seconds"):
            assert few[tag] == pytest.approx(many[tag], rel=1e-4), tag


def test_every_number_comes_with_its_protocol(runs: Runs, digits: Path) -> None:
    tokenizer = evaluate(runs.tokenizer, digits / "clips")
    generator = evaluate(runs.text, digits / "clips", refine=QUICK)
    for report in (tokenizer, generator):
        lines = [line for line in str(report).splitlines()[1:-1] if "left out" not in line]
        lines = [line for line in lines if "samples span" not in line]
        table = next((n for n, line in enumerate(lines) if "bits/pixel  " in line), len(lines))
        for line in lines[table : table + 1]:
            assert re.fullmatch(r" +rounds +bits/pixel +PSNR\[6,val\] +SSIM\[6,val\]", line)
        for line in lines[:table]:
            assert re.match(r"  \S.*\[.*(6,val|5x16x16|scale 2|batch 16)\] ", line), line
    costs = {f.name: f for f in generator.figures}
    assert costs["forwards/sample"].value == 2 * QUICK.num_steps  # both branches of every step
    assert costs["seconds/sample"].value > 0


def test_distances_keep_their_protocol_and_caveats(runs: Runs, digits: Path) -> None:
    report = evaluate(runs.text, digits / "clips", refine=QUICK)
    told, caveat = str(report).splitlines(), "30 samples span at most 29 of 64 features"
    for metric in ("FID", "rFID"):
        [place] = [n for n, line in enumerate(told) if line.startswith(f"  {metric}[digits-cnn,")]
        assert told[place + 1].startswith(f"    {caveat}")  # six clips of five frames
    [record] = read_evaluations(runs.text)
    stored = {row["name"]: row["measured"] for row in record["figures"]}
    for metric in ("FID", "rFID"):
        assert stored[metric]["caveats"][0].startswith(caveat)
        protocol = stored[metric]["protocol"]
        assert protocol["network"].startswith("digits-cnn-")
        assert (protocol["num_samples"], protocol["reference"]) == (6, "the same of split val")
    assert figures_from_json(record["figures"]) == list(report.figures)
    assert record["weights"] == load_generator(runs.text).pipeline.hashes


def test_the_table_over_rounds_holds_bits_beside_every_score(runs: Runs, digits: Path) -> None:
    report = evaluate(runs.tokenizer, digits / "clips")
    *coded, bare = report.rounds
    assert [row["rounds"] for row in coded] == [*range(1, 9)]
    for row in coded:  # d = 4 channels at 3 x 2 x 2 positions
        assert row["bits_per_pixel"] == row["rounds"] * 4 * 12 / (5 * 16 * 16)
        assert row["scores"]["PSNR"] == values(report)[f"PSNR[M={row['rounds']},6,val]"]
    assert coded[1]["scores"]["SSIM"] == values(report)["SSIM[6,val]"]
    assert (bare["rounds"], bare["bits_per_pixel"]) == (0, math.inf)
    assert bare["scores"]["PSNR"] == values(report)["PSNR[unquantized,6,val]"]
    [record] = read_evaluations(runs.tokenizer)
    assert record["rounds"][-1] == bare | {"bits_per_pixel": None}
    assert (runs.tokenizer / "evaluation" / "001" / "rounds.png").is_file()


def test_what_is_left_out_says_what_it_needs(
    runs: Runs, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    told = str(evaluate(runs.tokenizer, digits / "clips"))
    for reason in (
        r"LPIPS: .*--vgg FILE",
        r"FID\[torch_fidelity\]: give `--inception",
        "FVD: .*--video_features",
    ):
        assert re.search(reason, told)
    with pytest.raises(ValueError, match="no protocol 'tf'; known are torch_fidelity, adm, clean"):
        evaluate(runs.tokenizer, digits / "clips", protocol="tf")
    with pytest.raises(ValueError, match="no file 'nowhere'"):
        evaluate(runs.tokenizer, digits / "clips", vgg=Path("nowhere"))


class _MeanColour(torch.nn.Module):
    """Stands for a video network: three numbers of the first and of the last frame."""

    def forward(self, clips: Tensor) -> Tensor:
        return torch.cat([clips[:, :, 0].mean((2, 3)), clips[:, :, -1].std((2, 3))], dim=1)


def test_fvd_is_the_distance_of_the_features_of_a_file(
    runs: Runs, digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "colour.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(_MeanColour(), torch.randn(2, 3, 5, 224, 224)).save(file)
    result = values(evaluate(runs.tokenizer, digits / "clips", video_features=file))
    [tag] = [tag for tag in result if "FVD" in tag]
    assert re.fullmatch(r"rFVD\[colour-[0-9a-f]{8},6,round,val\]", tag)

    tokenizer, features = load_tokenizer(runs.tokenizer), dict[str, list[Tensor]]()
    for clip, _, _ in held_out(digits):
        rebuilt = tokenizer(clip[None]).reconstruction.detach()
        for name, one in (("real", clip[None]), ("rebuilt", rebuilt)):
            frames = to_uint8(one[0].transpose(0, 1)).float() / 127.5 - 1
            large = torch.nn.functional.interpolate(frames, (224, 224), mode="bilinear")
            features.setdefault(name, []).append(_MeanColour()(large.transpose(0, 1)[None]))
    sets = {name: torch.cat(rows).double().numpy() for name, rows in features.items()}
    assert result[tag] == pytest.approx(frechet(sets["rebuilt"], sets["real"]), rel=1e-3, abs=1e-7)
    [record] = read_evaluations(runs.tokenizer)
    known = record["files"]["video_features"]
    assert known == {"file": str(file), "sha256": sha256(file.read_bytes()).hexdigest()}

    file.write_bytes(b"not a network")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        evaluate(runs.tokenizer, digits / "clips", video_features=file)


@pytest.mark.parametrize("name", ["none", "fsq"])
def test_other_quantizers_are_judged_too(name: str, digits: Path, tmp_path: Path) -> None:
    config = {**TINY_TOKENIZER, "quantizer": {"name": name}}
    torch.manual_seed(0)
    module = LitTokenizer(TokenizerConfig(**config))
    module.configure_model()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content, tmp_path / "other.ckpt")
    report = evaluate(
        tmp_path / "other.ckpt", digits / "clips", num_frames=5, image_size=16, num_samples=2
    )
    rounds = [row["rounds"] for row in report.rounds]
    assert rounds == ([*range(1, 9), 0] if name == "none" else [2, 0])
    rates = [value for tag, value in values(report).items() if tag.startswith("bits/pixel")]
    if name == "none":
        assert rates == []
    else:
        assert rates == [module.tokenizer_config.bits_per_position * 12 / (5 * 16 * 16)]
        assert report.rounds[0]["bits_per_pixel"] == rates[0]


def test_pictures_show_the_first_samples(runs: Runs, digits: Path) -> None:
    evaluate(runs.text, digits / "clips", refine=QUICK)
    evaluate(runs.tokenizer, digits / "clips")
    [samples], [triples] = read_evaluations(runs.text), read_evaluations(runs.tokenizer)
    captions = [caption for _, caption, _ in held_out(digits)]
    shown = [picture for picture in samples["pictures"] if picture["kind"] == "sample"]
    assert [picture["caption"] for picture in shown] == captions
    assert all(re.fullmatch(r"\d, (left|right|up|down|resting)", p["reading"]) for p in shown)

    first = next(p for p in triples["pictures"] if p["kind"] == "sample")
    with Image.open(runs.tokenizer / first["file"]) as film:
        assert (film.n_frames, film.size) == (5, (3 * 16 + 4, 16))
        pixels = torch.from_numpy(np.array(film.convert("RGB"))).permute(2, 0, 1)
    clip = next(held_out(digits))[0]
    rebuilt = load_tokenizer(runs.tokenizer)(clip[None]).reconstruction[0, :, 0].detach()
    assert to_float(pixels[..., :16]).equal(clip[:, 0])  # the original, without loss
    shown = pixels[..., 16 + 2 : 2 * 16 + 2].int()
    assert (shown - to_uint8(rebuilt).int()).abs().max() <= 1  # it was made in another batch
    assert {p["kind"] for p in triples["pictures"]} == {"sample", "sheet", "strip"}


def test_a_record_knows_data_by_content(runs: Runs, digits: Path) -> None:
    for count, batch_size in ((4, 4), (4, 3), (5, 5)):
        evaluate(runs.tokenizer, digits / "clips", num_samples=count, batch_size=batch_size)
    hashes = [record["data_sha256"] for record in read_evaluations(runs.tokenizer)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_judge_beside_the_data_is_taken(runs: Runs, digits: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "clips"
    lonely.symlink_to(digits / "clips")
    tags = values(evaluate(runs.tokenizer, lonely)).keys()
    assert not [tag for tag in tags if "digits-cnn" in tag]
    judge = digits / "judge.safetensors"
    tags = values(evaluate(runs.tokenizer, lonely, judge=judge)).keys()
    assert [tag for tag in tags if "digits-cnn" in tag]


def test_what_does_not_fit_is_refused(runs: Runs, digits: Path, tmp_path: Path) -> None:
    write_split(tmp_path, "val", [image_sample(n, fields=("png", "cls")) for n in range(4)])
    with pytest.raises(ValueError, match="at most 6, which split 'val'.*got 7"):
        evaluate(runs.tokenizer, digits / "clips", num_samples=7)
    with pytest.raises(ValueError, match=r"needs captions \(txt\)"):
        evaluate(runs.text, tmp_path, num_frames=1, refine=QUICK)
    with pytest.raises(ValueError, match="`num_samples` at least 2"):
        evaluate(runs.tokenizer, digits / "clips", num_samples=1)
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, other)
    with pytest.raises(ValueError, match=r"neither of a tokenizer nor.*\['width'\]"):
        evaluate(other, digits / "clips")


def test_options_without_effect_are_pointed_out(runs: Runs, digits: Path) -> None:
    with pytest.warns(UserWarning, match="`refine` and `tokenizer` are ignored"):
        evaluate(runs.tokenizer, digits / "clips", num_samples=2, refine=QUICK)


def test_a_list_that_is_none_is_not_overwritten(runs: Runs, digits: Path) -> None:
    file = runs.tokenizer / "evaluation.json"
    file.write_text(json.dumps({"format": 99, "evaluations": []}))
    with pytest.raises(ValueError, match="format 99.*move it away"):
        evaluate(runs.tokenizer, digits / "clips", num_samples=2)
    assert "99" in file.read_text()
    assert not (runs.tokenizer / "evaluation").exists()  # it was found out before the work


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123, "%", "12.3 %"),
        (1.0, "%", "100.0 %"),
        (26.5149, "dB", "26.51 dB"),
        (314.159, "", "314.2"),
        (0.04567, "s", "0.046 s"),
        (math.nan, "dB", "not defined"),
    ],
)
def test_figures_read_like_figures(value: float, unit: str, text: str) -> None:
    figure = Figure("FID", ("digits-cnn", "200", "val"), value, unit)
    assert (figure.tag, figure.text) == ("FID[digits-cnn,200,val]", text)
