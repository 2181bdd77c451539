"""`grn evaluate samples`: the same number twice, after an interruption, and from any processes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.callbacks import DigitFeatures
from grn_lightning.lit.generator import load_generator
from grn_lightning.media.images import decode_image, to_float
from grn_lightning.metrics import (
    CONVENTIONS,
    ClipFeatures,
    DigitJudge,
    Features,
    FeatureSums,
    ReferenceStatistics,
    extractors,
)
from grn_lightning.metrics.features import protocol_of, to_bytes, to_frames
from grn_lightning.samplers import AdaptiveSteps, RefineConfig
from grn_lightning.scripts.asking import balanced_classes
from grn_lightning.scripts.draw_plan import DrawOptions
from grn_lightning.scripts.evaluate_samples import SetReport, evaluate_samples
from grn_lightning.scripts.records import read_evaluations
from grn_lightning.scripts.report_runs import tell
from grn_lightning.scripts.runs import open_run
from grn_lightning.scripts.sample_features import FeatureJob
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn, kill, start_grn

RULE = AdaptiveSteps(slope=3000.0, offset=-2940.0, decision_step=1, min_steps=3)
QUICK = DrawOptions(refine=RefineConfig(num_steps=3, guidance_scale=2.0), batch_size=4, seed=5)
PATIENCE = 180  # seconds that processes may take to start on a busy machine
ADAPTIVE = replace(QUICK, refine=RefineConfig(num_steps=6, guidance_scale=2.0, adaptive=RULE))


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the held-out pictures, by the judge."""
    features = DigitJudge.load(digits / "judge.safetensors")
    shards = ShardSet.open(digits / "images", "val")
    pictures = [decode_image(shards.read(n, ("png",)).fields["png"]) for n in range(len(shards))]
    sums = FeatureSums(features.num_features)
    sums.update(features(to_float(torch.stack(pictures)).unsqueeze(2)))
    path = tmp_path_factory.mktemp("reference") / "digits.safetensors"
    ReferenceStatistics(
        moments=sums.compute(), protocol=protocol_of(features, num_samples=6), source="digits-val"
    ).save(path)
    return path


@pytest.fixture
def judged(digits: Path, reference: Path, tmp_path: Path) -> Callable[..., SetReport]:
    """Judge twenty samples, two of each class, in parts of six."""

    def call(run: Path, name: str = "out", **options: Any) -> SetReport:
        usual = {"features": "digits-cnn", "judge": digits / "judge.safetensors", "config": QUICK}
        usual |= {"reference": reference, "num_samples": 20, "part_size": 6}
        report = evaluate_samples(run, out=tmp_path / name, **usual | options)
        assert report is not None
        return report

    return call


def values(report: SetReport) -> dict[str, float]:
    """Tag and number of all that time does not change."""
    found = {one.tag: one.value for one in report.measurements}
    return found | {f.tag: f.value for f in report.figures if f.unit != "s"}


def test_the_number_is_that_of_all_samples_at_once(
    runs: Runs, digits: Path, reference: Path, judged: Callable[..., SetReport]
) -> None:
    """An oracle: all pictures drawn in one batch, the textbook formula with a root of scipy."""
    from scipy.linalg import sqrtm

    result = values(judged(runs.classes))
    module = load_generator(runs.classes)
    labels = torch.arange(10).repeat_interleave(2)
    clips = module.draw_clips(
        {"class_labels": labels},
        torch.arange(20),
        size=(1, 16, 16),
        config=QUICK.refine,
        seed=5,
    )
    features = DigitFeatures(str(digits / "judge.safetensors"))
    drawn = features(clips).double().numpy()
    moments = ReferenceStatistics.read(reference).moments
    gap = drawn.mean(0) - moments.mean.numpy()
    sigma, real = np.cov(drawn, rowvar=False), moments.covariance.numpy()
    ridge = 1e-9 * np.eye(len(real))  # scipy's root is not made for singular products
    root = sqrtm((sigma + ridge) @ (real + ridge)).real
    expected = gap @ gap + np.trace(sigma + real - 2 * root)
    assert result["FID[digits-cnn,20]"] == pytest.approx(expected, rel=1e-3)
    right = (features.judge.classify(clips) == labels).float().mean()
    assert result["digit accuracy[digits-cnn,20]"] == pytest.approx(float(right))


def test_twice_and_interrupted_it_is_the_same_number(
    runs: Runs, judged: Callable[..., SetReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ADAPTIVE
    first, again = (judged(runs.classes, name, config=config) for name in ("a", "b"))
    assert values(first) == values(again)  # to the last bit
    parts = [file.read_bytes() for file in sorted((first.folder / "parts").iterdir())]
    assert len(parts) == 4

    start = FeatureJob.start

    def dies(self: FeatureJob, device: torch.device) -> Any:
        do = start(self, device)

        def once(number: int, progress: Any) -> None:
            if (self.folder / "parts" / "00001.safetensors").is_file():
                raise KeyboardInterrupt
            do(number, progress)

        return once

    monkeypatch.setattr(FeatureJob, "start", dies)
    with pytest.raises(KeyboardInterrupt):
        judged(runs.classes, "c", config=config)
    monkeypatch.setattr(FeatureJob, "start", start)
    kept = {f: f.stat().st_mtime_ns for f in (first.folder.parent / "c" / "parts").iterdir()}
    assert len(kept) == 2
    resumed = judged(runs.classes, "c", config=config)
    assert values(resumed) == values(first)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())

    # Nothing is left to draw: the third time it only reads.
    monkeypatch.setattr(FeatureJob, "start", None)
    assert values(judged(runs.classes, "c", config=config)) == values(first)


def test_another_seed_or_another_part_size(runs: Runs, judged: Callable[..., SetReport]) -> None:
    config = replace(QUICK, refine=replace(QUICK.refine, rows_per_call=8))
    one = values(judged(runs.classes, "a", config=config))
    tag = "FID[digits-cnn,20]"
    other = judged(runs.classes, "b", config=replace(config, batch_size=3), part_size=20)
    assert values(other)[tag] == pytest.approx(one[tag], rel=1e-9)  # the same samples
    seed = judged(runs.classes, "c", config=replace(config, seed=6))
    assert values(seed)[tag] != pytest.approx(one[tag], rel=1e-3)


def test_every_class_is_drawn_equally_often(runs: Runs, judged: Callable[..., SetReport]) -> None:
    asked = balanced_classes(10, 30)
    assert asked.values == tuple(sorted([*range(10)] * 3))
    report = judged(runs.classes, "kept", num_samples=10, keep_samples=True)
    names = sorted(file.name for file in (report.folder / "samples").iterdir())
    assert names == [f"{n:05d}.png" for n in range(10)]
    drawn = load_generator(runs.classes).draw_clips(
        {"class_labels": torch.tensor([7])},
        torch.tensor([7]),
        size=(1, 16, 16),
        config=QUICK.refine,
        seed=5,
    )
    kept = decode_image((report.folder / "samples" / "00007.png").read_bytes())
    assert to_float(kept).sub(drawn[0, :, 0]).abs().max() <= 1 / 127.5
    with pytest.raises(ValueError, match="multiple of the 10 classes.*got 25; take 20 or 30"):
        judged(runs.classes, "odd", num_samples=25)


def test_captions_come_from_shards_or_from_a_file(
    runs: Runs, digits: Path, judged: Callable[..., SetReport], tmp_path: Path
) -> None:
    """A clip is judged for digit, which the classes of the shards tell, and direction."""
    options = {"conditions": digits / "clips", "reference": None, "num_samples": None}
    shown = values(judged(runs.text, "a", **options))
    assert {
        "digit accuracy[digits-cnn,6]",
        "direction accuracy[digits-cnn,6]",
        "caption accuracy[digits-cnn,6]",
    } <= shown.keys()
    shards = ShardSet.open(digits / "clips", "val")
    captions = [shards.read(n, ("txt",)).fields["txt"].decode() for n in range(6)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*captions, "", ""]))
    told = values(judged(runs.text, "b", **options | {"conditions": prompts}))
    tag = "direction accuracy[digits-cnn,6]"
    assert told[tag] == shown[tag]
    assert not [name for name in told if name.startswith("digit accuracy")]  # no class is known

    twice = judged(runs.text, "c", **options | {"num_samples": 12})
    [plan] = (json.loads((twice.folder / "plan.json").read_text()),)
    assert plan["conditions"]["count"] == 12
    with pytest.raises(ValueError, match="at most 6, which .* has, or a multiple of it, got 8"):
        judged(runs.text, "d", **options | {"num_samples": 8})
    with pytest.raises(ValueError, match="draws from text: give `--conditions`"):
        judged(runs.text, "e", reference=None)
    with pytest.raises(ValueError, match="draws classes, and .* holds prompts"):
        judged(runs.classes, "f", conditions=prompts)


def test_a_number_never_comes_without_its_protocol(
    runs: Runs, judged: Callable[..., SetReport], reference: Path
) -> None:
    report = judged(runs.classes)
    told = str(report).splitlines()
    assert re.fullmatch(r"FID\[digits-cnn,20\]=[0-9.e+-]+", told[1])
    assert "20 samples span at most 19 of 64 features" in told[2]
    label = ReferenceStatistics.read(reference).label
    assert told[-2] == (
        "  left out: sFID of digits-cnn: digits-cnn has no spatial features; KID, precision, "
        f"recall of digits-cnn: {label} keeps no features (`grn evaluate stats --keep`)"
    )
    for line in told[3:-2]:
        assert re.fullmatch(r"\w[^\[]*\[.*(20|steps|scale 2|batch 4).*\]=.*", line), line

    record = json.loads(report.file.read_text())
    stored = read_evaluations(runs.classes)[-1]
    assert stored["measurements"] == record["measurements"]
    assert record["left_out"] == list(report.left_out)
    one, score = record["measurements"]
    assert (one["metric"], score["tag"]) == ("fid", "IS[digits-cnn,20]")
    [listed] = record["references"]
    assert one["tag"] == "FID[digits-cnn,20]"
    assert one["protocol"]["reference"] == listed["label"]
    assert listed["label"].startswith("digits-val-")
    assert one["protocol"]["network"].startswith("digits-cnn-")
    assert {"generator", "tokenizer"} == record["weights"].keys()
    assert record["code"]["version"]
    assert len(record["code"].get("commit", "0" * 40)) == 40
    assert {"torch", "lightning", "torchmetrics", "python"} <= record["environment"].keys()
    assert (record["seed"], record["refine"]["num_steps"]) == (5, 3)
    assert sum(record["costs"]["steps"].values()) == 20

    again = call_grn(*shlex.split(record["command"])[1:], "--out", report.folder.parent / "again")
    assert values(again) == values(report)
    assert tell(open_run(runs.classes)).evaluations[0]["measurements"] == record["measurements"]


class Grey(nn.Module):
    """Stands for an Inception that is fed by a protocol: means of levels, and two classes."""

    num_features, num_classes, resize = 2, 2, "tensorflow"

    def __init__(self, weights: Path | None, *, protocol: str, rounding: str | None = None) -> None:
        super().__init__()
        self.name, self.rounding = protocol, rounding or CONVENTIONS[protocol].rounding

    def forward(self, clips: Tensor) -> Tensor:
        return self.extract(clips).pooled

    def extract(self, clips: Tensor) -> Features:
        levels = to_bytes(to_frames(clips), self.rounding).double()
        pooled = torch.stack([levels.mean((1, 2, 3)), levels.std((1, 2, 3))], 1)
        return Features(pooled.float(), logits=pooled.float() / 20)


def test_samples_are_rounded_as_the_publication_does(
    runs: Runs, judged: Callable[..., SetReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiT and LlamaGen take the evaluator of ADM, but do not truncate."""
    monkeypatch.setattr(extractors, "InceptionFeatures", Grey)
    options = {"features": ["adm", "digits-cnn"], "reference": None}
    usual, rounded = (
        judged(runs.classes, str(rounding), rounding=rounding, **options)
        for rounding in (None, "round")
    )
    assert usual.measurements[0].tag == "IS[adm,20,truncate]"
    assert rounded.measurements[0].tag == "IS[adm,20,round]"
    assert usual.measurements[0].value != rounded.measurements[0].value
    assert usual.measurements[1] == rounded.measurements[1]  # of digits, which has no bytes
    plans = [json.loads((one.folder / "plan.json").read_text()) for one in (usual, rounded)]
    assert [plan["features"]["adm"]["rounding"] for plan in plans] == ["truncate", "round"]
    parts = [load_file(one.folder / "parts" / "00000.safetensors") for one in (usual, rounded)]
    gap = parts[1]["adm/pooled"][:, 0] - parts[0]["adm/pooled"][:, 0]
    assert gap.mean() == pytest.approx(0.5, abs=0.1)  # a level is half a level darker on average
    with pytest.raises(ValueError, match="`rounding` is of the Inception, torch_fidelity, adm"):
        judged(runs.classes, "c", rounding="round")


def test_captions_are_scored_by_a_network_that_reads_them(
    runs: Runs, digits: Path, judged: Callable[..., SetReport], clip_folder: Path
) -> None:
    """An oracle: the cosines of all clips, drawn at once, in open_clip's own terms."""
    options = {"features": f"clip:local-dir:{clip_folder}", "reference": None, "judge": None}
    asked = {"conditions": digits / "clips", "num_samples": None, "part_size": 4}
    config = replace(QUICK, batch_size=3)
    report = judged(runs.text, "a", config=config, **options, **asked)
    [score] = report.measurements
    assert score.tag == "CLIP score[clip-small,6,round]"
    assert score.protocol.reference == "captions"
    shards = ShardSet.open(digits / "clips", "val")
    captions = [shards.read(n, ("txt",)).fields["txt"].decode() for n in range(6)]
    module = load_generator(runs.text)
    size = json.loads(report.file.read_text())["size"]
    clips = module.draw_clips(
        {"captions": captions}, torch.arange(6), size=tuple(size), config=QUICK.refine, seed=5
    )
    both = ClipFeatures(f"local-dir:{clip_folder}")
    images = both(clips).unflatten(0, (6, -1)).double()
    cosines = torch.cosine_similarity(images, both.texts(captions).double()[:, None], dim=2)
    assert score.value == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-4)
    assert str(report).splitlines()[1] == str(score)
    assert report.left_out[0] == (
        "FID, KID, precision, recall of clip-small: there is no `--reference`"
    )


def test_a_set_without_a_number_is_told_before_it_is_drawn(
    runs: Runs, judged: Callable[..., SetReport], reference: Path, clip_folder: Path,
    digits: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = {"features": f"clip:local-dir:{clip_folder}", "reference": None, "judge": None}
    with pytest.warns(UserWarning, match="will have no number .*no `--reference`.*no captions"):
        report = judged(runs.classes, "a", **options)
    assert report.measurements == ()
    assert report.left_out[-1] == "CLIP score of clip-small: no captions are drawn"

    def draws(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureJob, "start", draws)
    with (
        pytest.warns(UserWarning, match="these samples will have no number"),
        pytest.raises(KeyboardInterrupt),
    ):
        judged(runs.classes, "b", **options)
    few = {"features": "digits-cnn", "feature_weights": digits / "judge.safetensors"}
    few |= {"num_samples": 2, "conditions": digits / "images", "judge": None, "reference": None}
    with (
        pytest.warns(UserWarning, match="IS of digits-cnn: its 10 parts need as many .* got 2"),
        pytest.raises(KeyboardInterrupt),
    ):
        judged(runs.classes, "c", **few)
    with pytest.raises(KeyboardInterrupt):  # and no warning, for the distance will be there
        judged(runs.classes, "d", **few | {"reference": reference})


def test_another_plan_in_the_same_folder_is_refused(
    runs: Runs, judged: Callable[..., SetReport], reference: Path, tmp_path: Path
) -> None:
    report = judged(runs.classes, num_samples=10)
    for changed, match in (
        ({"config": replace(QUICK, seed=6)}, "seed 5 and 6"),
        ({"num_samples": 20, "part_size": 5}, "conditions.count 10 and 20.*part_size 6 and 5"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise .*{match}.*another `--out`"):
            judged(runs.classes, **{"num_samples": 10} | changed)

    part = report.folder / "parts" / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(ValueError, match="part .* is damaged .*; move it away"):
        judged(runs.classes, num_samples=10)
    part.unlink()
    assert values(judged(runs.classes, num_samples=10)) == values(report)  # drawn again


def test_a_damaged_plan_is_told(runs: Runs, judged: Callable[..., SetReport]) -> None:
    plan = judged(runs.classes).folder / "plan.json"
    plan.write_text(plan.read_text()[:-9])
    with pytest.raises(ValueError, match=f"'{plan}' is damaged .* give another `--out`"):
        judged(runs.classes)


def test_conditions_that_are_not_there_are_told(
    runs: Runs, judged: Callable[..., SetReport], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="there is nothing at '.*gone'; `--conditions` must be a f"
    ):
        judged(runs.classes, conditions=tmp_path / "gone")
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got -10"):
        judged(runs.classes, num_samples=-10)


def test_what_does_not_belong_together_is_refused(
    runs: Runs, judged: Callable[..., SetReport], reference: Path, tmp_path: Path
) -> None:
    run = runs.classes
    with pytest.raises(ValueError, match="there are no features 'inception'; known are"):
        judged(run, features="inception")
    with pytest.raises(ValueError, match="features .digits-cnn. need the file of their weights"):
        judged(run, judge=None)
    with pytest.raises(ValueError, match="one for each of the 1 `features`, got 2"):
        judged(run, reference=[reference, reference])
    with pytest.raises(ValueError, match="no reference statistics at"):
        judged(run, reference=tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="weights_path must be the file"):
        judged(run, features="adm", feature_weights=tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="gone"):  # before its judges are looked for
        judged(tmp_path / "gone", features="adm", feature_weights=tmp_path / "no.pth")
    with pytest.raises(ValueError, match="`part_size` must be at least 1, got 0"):
        judged(run, part_size=0)
    with pytest.raises(ValueError, match="`devices` must be at least 1, got 0"):
        DrawOptions(devices=0)
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -1"):
        DrawOptions(seed=-1)
    with pytest.raises(ValueError, match="give `--num_samples`"):
        judged(run, num_samples=None)
    other = ReferenceStatistics.read(reference)
    strange = replace(other, protocol=replace(other.protocol, network="digits-cnn-00000000"))
    strange.save(tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="not made as the samples are judged"):
        judged(run, reference=tmp_path / "strange.safetensors")


def _command(run: Path, digits: Path, reference: Path, out: Path) -> list[Any]:
    words = ["evaluate", "samples", run, "--features", "digits-cnn", "--num_samples", 60]
    words += ["--judge", digits / "judge.safetensors", "--reference", reference, "--out", out]
    return [*words, "--part_size=6", "--batch_size=3", "--refine.num_steps=8", "--device=cpu"]


def _result(out: Path) -> Any:
    record = json.loads((out / "result.json").read_text())
    return record["measurements"], record["costs"]["steps"], record["plan"]


@pytest.mark.slow
@pytest.mark.scale
def test_processes_and_kills_change_no_number(
    runs: Runs, digits: Path, reference: Path, tmp_path: Path
) -> None:
    """One process; two; torchrun with two; one that is killed, taken up by two."""
    log = tmp_path / "log"

    def words(name: str) -> list[Any]:
        return _command(runs.classes, digits, reference, tmp_path / name)

    cut = start_grn(*words("cut"), log=log)
    parts = tmp_path / "cut" / "parts"
    deadline = time.monotonic() + PATIENCE
    while len(list(parts.glob("*.safetensors"))) < 2:
        assert time.monotonic() < deadline, log.read_text()
        assert cut.poll() is None, log.read_text()
        time.sleep(0.01)
    kill(cut)
    kept = {file: file.stat().st_mtime_ns for file in parts.glob("*.safetensors")}
    assert 2 <= len(kept) < 10
    assert start_grn(*words("cut"), "--devices=2", log=log).wait(PATIENCE) == 0, log.read_text()
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())

    call_grn(*words("one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    torchrun = subprocess.run(
        [*launch, "-m", "grn_lightning", *map(str, words("torchrun"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert torchrun.returncode == 0, torchrun.stderr
    assert torchrun.stdout.count("FID[digits-cnn,60]=") == 1  # the first process tells
    expected = _result(tmp_path / "one")
    for name in ("cut", "torchrun"):
        assert _result(tmp_path / name) == expected
        for file in sorted((tmp_path / "one" / "parts").iterdir()):
            same = tmp_path / name / "parts" / file.name
            assert ReadPart(same) == ReadPart(file)


class ReadPart:
    """A part without its times."""

    def __init__(self, file: Path) -> None:
        from safetensors.torch import load_file

        self.tensors = {k: v for k, v in load_file(file).items() if k != "seconds"}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, ReadPart)
        return self.tensors.keys() == other.tensors.keys() and all(
            self.tensors[name].equal(other.tensors[name]) for name in self.tensors
        )

    __hash__ = None  # type: ignore[assignment]


def _is_alive(group: int) -> bool:
    """Whether a process of a group is left after a moment."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("is_killed", [False, True], ids=["ctrl-c", "parent-killed"])
def test_all_processes_end_with_the_first(
    runs: Runs, digits: Path, reference: Path, tmp_path: Path, is_killed: bool
) -> None:
    log = tmp_path / "log"
    words = _command(runs.classes, digits, reference, tmp_path / "out")
    # A shell starts background jobs deaf to Ctrl-C, and they would pass that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start_grn(*words, "--devices=2", "--num_samples=6000", log=log)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "out").glob("parts/*.safetensors")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    if is_killed:  # it alone, as by a scheduler or for lack of memory
        process.kill()
        process.wait(60)
        assert not _is_alive(process.pid)
        return
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert "the same command goes on where it stopped" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not _is_alive(process.pid)
