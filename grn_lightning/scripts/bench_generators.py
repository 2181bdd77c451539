"""`grn bench generators`: plain, coarse-to-fine and refining generators at equal budgets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.hashes import weights_hash
from grn_lightning.scripts.bench_parts import RESULT_FILE, require_bench
from grn_lightning.scripts.generator_arms import Bench, run_arm
from grn_lightning.scripts.generator_judge import PictureJudge
from grn_lightning.scripts.generator_records import (
    ARMS,
    Arm,
    ArmPlan,
    ArmResult,
    GeneratorBenchConfig,
    TokenizerName,
    complete,
    plan_facts,
    read_result,
    shared_facts,
)
from grn_lightning.scripts.generator_table import Row, draw, markdown, protocol, rows_of
from grn_lightning.scripts.records import environment, now
from grn_lightning.scripts.runs import choose_device

_FORMAT = 1
_NAMES = [*ARMS]
_RECIPES = {"hbq": "digits.yaml", "vq": "digits_vq.yaml"}


@dataclass(frozen=True)
class GeneratorBench:
    """The comparison so far."""

    rows: tuple[Row, ...]
    """An arm each, all finished seeds."""
    folder: Path
    """Where `bench.json`, `bench.md` and `bench.png` lie."""

    def __str__(self) -> str:
        """Return the table and how it came about."""
        lines = [markdown(self.rows), *protocol(self.rows)]
        return "\n".join([*lines, f"table, numbers and drawing lie in '{self.folder}'"])


def _finished(output: Path) -> list[ArmResult]:
    """Read all records of a bench, also of arms that were not asked for this time."""
    results = []
    for file in sorted(output.glob(f"*/seed*/{RESULT_FILE}")):
        name, seed = file.parent.relative_to(output).parts
        result = read_result(output, Arm(name, int(seed.removeprefix("seed"))))
        assert result is not None
        results.append(result)
    return results


def _is_plan(recorded: dict[str, Any], plan: ArmPlan) -> bool:
    try:
        return plan_facts(ArmPlan(**recorded)) == plan_facts(plan)
    except TypeError:  # settings of a newer version
        return False


def _check_comparable(results: Sequence[ArmResult], bench: Bench) -> None:
    """Refuse to mix arms of other data, settings, networks or tokenizers.

    Raises:
        ValueError: If a record differs; the message says in what.
    """
    ours = shared_facts(bench.config, bench.data)
    usual = shared_facts(GeneratorBenchConfig(), bench.data)
    hashes = {
        name: weights_hash(load_tokenizer(run))
        for name, run in bench.tokenizers.items()
        if run.exists()
    }
    for result in results:
        theirs = complete(result.shared, usual)
        other = [key for key in ours if theirs.get(key) != ours[key]]
        found = {key: (theirs.get(key), ours[key]) for key in other}
        if result.arm in ARMS | bench.config.plans:
            is_same = _is_plan(result.plan, bench.config.plan(result.arm))
            other += [] if is_same else [f"networks of {result.arm!r}"]
        name = result.plan["tokenizer"]
        if hashes.get(name, result.tokenizer_hash) != result.tokenizer_hash:
            other.append(f"tokenizer {name!r}")
        if other:
            raise ValueError(
                f"'{bench.output}' holds arms with other settings: {', '.join(other)} "
                f"{found or ''}. Give another output folder, or the settings of that one."
            )


def _check_tokenizers(bench: Bench, names: set[TokenizerName]) -> None:
    """Refuse arms whose tokenizer is not trained.

    Raises:
        ValueError: Telling how to train it.
    """
    for name in sorted(names):
        if not bench.tokenizers[name].exists():
            arms = ", ".join(arm for arm, plan in ARMS.items() if plan.tokenizer == name)
            raise ValueError(
                f"there is no tokenizer at '{bench.tokenizers[name]}', which the arms {arms} need; "
                f"train it: grn fit -c experiments/_base/cpu.yaml -c experiments/tokenizer/"
                f"{_RECIPES[name]}, or give `--{name} RUN`, or leave those arms out by `--arms`."
            )


def _write(rows: Sequence[Row], bench: Bench) -> None:
    """Write table, numbers and drawing of what is finished."""
    facts = {
        "format": _FORMAT,
        "date": now(),
        "environment": environment(choose_device(bench.config.device)),
        "protocol": protocol(rows),
        "results": [asdict(result) for row in rows for result in row.results],
    }
    write_json(bench.output / "bench.json", facts)
    text = "\n".join([markdown(rows), "", *(f"- {line}" for line in protocol(rows))])
    (bench.output / "bench.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, bench.output / "bench.png")


def bench_generators(
    output: Path,
    *,
    data: Path = Path("data/digits/images"),
    hbq: Path = Path("runs/tokenizer-digits"),
    vq: Path = Path("runs/tokenizer-digits-vq"),
    arms: list[str] = _NAMES,
    seeds: list[int] = [0, 1, 2],  # noqa: B006  (read only; a list is what a YAML file holds)
    config: GeneratorBenchConfig = GeneratorBenchConfig(),  # noqa: B008  (frozen)
) -> GeneratorBench:
    """Train a plain causal network, coarse-to-fine prediction and GRN on equal budgets; compare.

    Every arm learns the codes of a frozen tokenizer from as many samples, in batches of one size,
    by one optimizer, with about as many parameters; coarse-to-fine prediction divides its samples
    among its two networks. All arms draw pictures of all classes, at the guidance scale that each
    of them chooses from one list, and are judged by the judge of the embedded set. Where a
    likelihood is defined, the held-out bits of a picture's codes are told as well. Arms and seeds
    that are finished in the output folder are kept, so that a bench can be done in pieces and goes
    on after an interruption; table (`bench.md`), numbers (`bench.json`) and drawing (`bench.png`)
    show all of them, `pictures.png` in the folder of an arm what it draws.

    Args:
        output: Folder of the bench; a new one, or one of the same settings.
        data: Folder of shards of pictures with classes, splits "train" and "val".
        hbq: Run, checkpoint or export of an HBQ tokenizer.
        vq: Run, checkpoint or export of a tokenizer with a codebook.
        arms: Names of arms: those of the default, or ones described in `plans`.
        seeds: One training per arm and seed.
        config: What all arms share.

    Raises:
        ValueError: If an arm is unknown, a tokenizer is not trained, or the folder holds arms with
            other settings.
    """
    choose_device(config.device)
    require_bench(output)
    ShardSet.open(data, "train")
    bench = Bench(config, data, output, {"hbq": hbq, "vq": vq})
    asked = [Arm(name, seed) for seed in seeds for name in arms]
    plans = {arm.name: config.plan(arm.name) for arm in asked}
    results = _finished(output)
    missing = [arm for arm in asked if read_result(output, arm) is None]
    _check_tokenizers(bench, {plans[arm.name].tokenizer for arm in missing})
    _check_comparable(results, bench)
    judge = PictureJudge(config, data) if missing else None
    for name in sorted({plans[arm.name].tokenizer for arm in missing}):
        ours = [plans[arm.name] for arm in missing if plans[arm.name].tokenizer == name]
        bench.prepare(name, with_clusters=any(plan.is_clustered for plan in ours))
    with tqdm(total=len(missing) * config.max_steps, unit="step") as bar:
        for arm in missing:
            bar.set_description(str(arm))
            assert judge is not None
            run_arm(bench, arm, judge, bar)
            _write(rows_of(_finished(output)), bench)
    rows = rows_of(_finished(output))
    if not rows:
        raise ValueError("there is nothing to compare: give at least one arm and one seed.")
    _write(rows, bench)
    return GeneratorBench(tuple(rows), output)
