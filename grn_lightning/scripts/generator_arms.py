"""One arm of `grn bench generators`: train its networks, judge what they draw, keep a record."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning as L
import torch
from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster, SplitConfig
from grn_lightning.lit.code_stage import CodeStage
from grn_lightning.lit.data import LoaderConfig, ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.media.images import to_uint8
from grn_lightning.media.sheets import contact_sheet
from grn_lightning.models.clusters import fit_codewords, read_clusters, write_clusters
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.vq_tokenizer import VQTokenizer
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.scripts.bench_parts import RESULT_FILE, BriefTraining, quiet
from grn_lightning.scripts.encode import encode
from grn_lightning.scripts.generator_judge import (
    AnyPipeline,
    Drawn,
    PictureJudge,
    clock,
    decode_seconds,
    draw,
    held_out_bits,
)
from grn_lightning.scripts.generator_records import (
    Arm,
    ArmPlan,
    ArmResult,
    GeneratorBenchConfig,
    Judged,
    TokenizerName,
    plan_facts,
    shared_facts,
)
from grn_lightning.scripts.runs import choose_device

_NUM_SHOWN = 40  # pictures of an arm's sheet


@dataclass(frozen=True)
class Bench:
    """Where everything is that arms have in common."""

    config: GeneratorBenchConfig
    """What all arms share."""
    data: Path
    """Folder of shards of pictures with classes."""
    output: Path
    """Folder of the bench."""
    tokenizers: dict[TokenizerName, Path]
    """Runs of the tokenizers."""

    @property
    def clusters_file(self) -> Path:
        """Where the clusters of the codebook lie."""
        return self.output / f"clusters-{self.config.num_clusters}.safetensors"

    def codes_folder(self, name: TokenizerName) -> Path:
        """Where the codes of a tokenizer lie."""
        return self.output / "codes" / name

    def prepare(self, name: TokenizerName, *, with_clusters: bool) -> None:
        """Encode the training pictures, and cluster the codebook, where that is not done.

        Raises:
            ValueError: If the folder holds codes or clusters of another tokenizer.
        """
        run, size = self.tokenizers[name], self.config.image_size
        folder = self.codes_folder(name)
        device = choose_device(self.config.device).type
        if not (folder / "train.manifest.json").is_file():  # written last
            with quiet():
                encode(
                    self.data,
                    tokenizer=run,
                    out=folder,
                    num_frames=1,
                    image_size=size,
                    batch_size=self.config.batch_size,
                    accelerator="gpu" if device == "cuda" else "cpu",
                )
        if not with_clusters:
            return
        tokenizer = load_tokenizer(run)
        if not isinstance(tokenizer, VQTokenizer):
            raise ValueError(f"'{run}' is no run of a tokenizer with a codebook; give `--vq RUN`.")
        if self.clusters_file.is_file():
            read_clusters(self.clusters_file, tokenizer_hash=weights_hash(tokenizer))
            return
        fitted = fit_codewords(
            tokenizer, num_clusters=self.config.num_clusters, seed=0, num_restarts=2
        )
        write_clusters(self.clusters_file, fitted)

    def split_of(self, plan: ArmPlan) -> SplitConfig | None:
        """Return what is coarse in an arm; None of the baseline and of the GRN."""
        if plan.is_clustered:
            return SplitConfig(clusters=str(self.clusters_file))
        if plan.fine is not None:
            return SplitConfig(coarse_rounds=plan.coarse_rounds)
        return None

    def stages(self, arm: Arm) -> list[CodeStage]:
        """Build the modules of an arm, with random weights of its seed."""
        config, plan = self.config, self.config.plan(arm.name)
        L.seed_everything(arm.seed, verbose=False)
        tokenizer = str(self.tokenizers[plan.tokenizer])
        if plan.generator is not None:
            corruption = replace(config.corruption, condition_dropout=config.condition_dropout)
            stages: list[CodeStage] = [
                LitGenerator(
                    plan.generator,
                    tokenizer,
                    corruption=corruption,
                    optim=config.optim,
                    seed=arm.seed,
                )
            ]
        else:
            stages = self._prediction_stages(arm, plan, tokenizer)
        for stage in stages:
            stage.configure_model()
        return stages

    def _prediction_stages(self, arm: Arm, plan: ArmPlan, tokenizer: str) -> list[CodeStage]:
        config, size = self.config, self.config.image_size
        _, _, *grid = load_tokenizer(tokenizer).config.latent_shape(1, size, size)
        split, grid_size = self.split_of(plan), (grid[0], grid[1])
        assert plan.raster is not None
        raster = LitRaster(
            plan.raster,
            tokenizer,
            grid_size=grid_size,
            split=split,
            num_classes=config.num_classes,
            condition_dropout=config.condition_dropout,
            optim=config.optim,
            seed=arm.seed,
        )
        if plan.fine is None or split is None:
            return [raster]
        fine = LitFine(
            plan.fine,
            tokenizer,
            grid_size=grid_size,
            split=split,
            num_classes=config.num_classes,
            condition_dropout=config.condition_dropout,
            optim=config.optim,
            seed=arm.seed,
        )
        return [raster, fine]


@dataclass(frozen=True)
class Trained:
    """Networks of an arm with averaged weights, and what their training took."""

    pipeline: AnyPipeline
    """Ready to draw."""
    num_samples: list[int]
    """Samples that each network saw."""
    num_parameters: list[int]
    """Trained parameters of each."""
    seconds: list[float]
    """Time of each."""


def train_arm(bench: Bench, arm: Arm, bar: tqdm) -> Trained:
    """Train the networks of an arm, one after the other, from random weights.

    Args:
        bench: Settings, data, tokenizers; the codes are encoded already.
        arm: What is trained.
        bar: Is moved by every update.
    """
    config, device = bench.config, choose_device(bench.config.device)
    plan = config.plan(arm.name)
    stages, seconds = bench.stages(arm), []
    for number, (stage, steps) in enumerate(
        zip(stages, config.steps_of(arm.name), strict=True), start=1
    ):
        folder = arm.folder(bench.output) / f"stage{number}"
        source = ShardSource(
            path=str(bench.codes_folder(plan.tokenizer)),
            media="image",
            split_val=None,
            batch_size=config.batch_size,
        )
        data = ShardData(
            [source],
            image_size=config.image_size,
            num_classes=config.num_classes,
            with_classes=True,
            seed=arm.seed,
            loader=LoaderConfig(cache_decoded=True),
        )
        training = BriefTraining(
            folder=folder,
            max_steps=steps,
            ema_decay=config.ema_decay,
            device=config.device,
            checkpoint=folder / "checkpoints" / "last.ckpt",
        )
        start = clock(device)
        training.fit(stage, data, bar)
        seconds.append(clock(device) - start)
        stage.eval().requires_grad_(False)
    return Trained(
        _joined(stages).to(device),
        [stage.samples_seen for stage in stages],
        [sum(p.numel() for p in stage.parameters()) for stage in stages],
        seconds,
    )


def _joined(stages: list[CodeStage]) -> AnyPipeline:
    first = stages[0]
    if isinstance(first, LitGenerator):
        return first.pipeline
    assert isinstance(first, LitRaster)
    if len(stages) == 1:
        return CoarseToFinePipeline(first.network, first.tokenizer)
    second = stages[1]
    assert isinstance(second, LitFine)
    return CoarseToFinePipeline(
        first.network,
        first.tokenizer,
        fine=second.network,
        split=second.split,
        fine_mask=second.fine_mask,
    )


def choose_scale(
    pipeline: AnyPipeline, config: GeneratorBenchConfig, judge: PictureJudge, *, seed: int
) -> list[Judged]:
    """Draw and judge pictures at every guidance scale; the best one comes first.

    Args:
        pipeline: The arm's networks.
        config: The scales.
        judge: By whose Frechet distance they are ranked.
        seed: Not the seed of the pictures that are reported.
    """
    tried = []
    for scale in config.guidance_scales:
        drawn = draw(pipeline, config, count=config.num_tried, scale=scale, seed=seed)
        tried.append(judge.judge(drawn.pictures, scale=scale))
    return sorted(tried, key=lambda judged: judged.fid)


def _write_sheet(drawn: Drawn, file: Path) -> None:
    count = min(_NUM_SHOWN, len(drawn.pictures.labels))
    pictures = to_uint8(drawn.pictures.clips[:count, :, 0].cpu())
    labels = [str(label) for label in drawn.pictures.labels[:count].tolist()]
    contact_sheet(pictures, labels, columns=min(10, count)).save(file)


def run_arm(bench: Bench, arm: Arm, judge: PictureJudge, bar: tqdm) -> ArmResult:
    """Train and judge an arm; its record says that it is done, checkpoints keep the weights."""
    config, plan, folder = bench.config, bench.config.plan(arm.name), arm.folder(bench.output)
    trained = train_arm(bench, arm, bar)
    pipeline = trained.pipeline
    bits: tuple[float, float] | None = None
    if isinstance(pipeline, CoarseToFinePipeline):
        bits = held_out_bits(pipeline, judge.held_out, config.batch_size)
    tried = choose_scale(pipeline, config, judge, seed=2 * arm.seed + 1)
    scale = tried[0].guidance_scale
    assert scale is not None
    drawn = draw(pipeline, config, count=config.num_drawn, scale=scale, seed=2 * arm.seed)
    has_head = plan.raster is not None and plan.raster.channel_depth > 0
    head_calls = drawn.codes[0][0].numel() if has_head else 0
    result = ArmResult(
        arm=arm.name,
        seed=arm.seed,
        num_samples=trained.num_samples,
        num_parameters=trained.num_parameters,
        train_seconds=trained.seconds,
        bits=None if bits is None else sum(bits),
        coarse_bits=None if bits is None or plan.fine is None else bits[0],
        code_bits=_code_bits(pipeline, config.image_size),
        judged=judge.judge(drawn.pictures, scale=scale),
        tried=sorted(tried, key=lambda judged: judged.guidance_scale or 0.0),
        reconstructed=judge.reconstructed(pipeline),
        real=judge.judge(judge.training),
        draw_seconds=drawn.seconds,
        decode_seconds=decode_seconds(pipeline, drawn.codes),
        num_forwards=drawn.num_forwards,
        num_head_calls=head_calls,
        tokenizer_hash=weights_hash(pipeline.tokenizer),
        plan=plan_facts(plan),
        shared=shared_facts(config, bench.data),
    )
    _write_sheet(drawn, folder / "pictures.png")
    write_json(folder / RESULT_FILE, asdict(result))
    return result


def _code_bits(pipeline: AnyPipeline, image_size: int) -> float:
    config = pipeline.tokenizer.config
    _, *grid = config.latent_shape(1, image_size, image_size)
    return float(config.code_sizes.num_bits * torch.tensor(grid).prod())
