"""How well do edits of held-out clips change what they should, and keep the rest?

    python benchmarks/edits_digits.py runs/t2v-digits data/digits/clips

Prompt swap by thresholds (the digit five further on, same direction), inpainting of the lower half
in both modes, and clips from their first frame; read by the judge of the embedded set. Seed 0.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from grn_lightning.datasets.digits import DIGIT_NAMES
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.generator import load_generator
from grn_lightning.metrics import DigitJudge
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.editing import DrawJob, InpaintConfig, frames, inpaint, swap
from grn_lightning.samplers import EditConfig, RefineConfig

THRESHOLDS = [(0.02, 0.0), (0.02, 0.3), (0.02, 0.5), (0.1, 0.0)]


def centres(clips: Tensor) -> Tensor:
    """Centre of the ink of every frame, `(b, f, 2)` pixels."""
    ink = ((clips.mean(1) + 1) / 2 - 0.2).clamp(min=0)
    total = ink.sum((2, 3)).clamp(min=1e-6)
    places = torch.arange(ink.shape[-1], dtype=torch.float32)
    rows, columns = (ink.sum(axis) @ places / total for axis in (3, 2))
    return torch.stack([rows, columns], -1)


def held_out(data: Path, count: int) -> tuple[Tensor, list[str]]:
    source = ShardSource(path=str(data), media="video", num_frames=9, batch_size=count)
    module = ShardData([source], image_size=32, with_captions=True)
    module.setup("validate")
    batch = next(iter(module.val_dataloader()))
    return batch["clips"], list(batch["captions"])


def report_swaps(
    pipeline: GeneratorPipeline, judge: DigitJudge, clips: Tensor, captions: list[str]
) -> None:
    digits = [DIGIT_NAMES.index(caption.split()[2]) for caption in captions]
    wanted = [(digit + 5) % 10 for digit in digits]
    asked = [
        caption.replace(DIGIT_NAMES[digit], DIGIT_NAMES[other])
        for caption, digit, other in zip(captions, digits, wanted, strict=True)
    ]
    source, target = (pipeline.condition({"captions": texts}) for texts in (captions, asked))
    job = DrawJob(
        sample_index=torch.arange(len(clips)), config=RefineConfig(num_steps=16, guidance_scale=3.0)
    )
    size = tuple(clips.shape[2:])
    plain = pipeline.draw(target, job.sample_index, size=size, config=job.config)
    arms = {"the new prompt alone": plain.clips}
    for position, element in THRESHOLDS:
        rules = EditConfig(position_threshold=position, element_threshold=element)
        edited = swap(
            pipeline, source=source, target=target, size=size, job=job, clips=clips, config=rules
        )
        arms[f"thresholds {position}, {element}"] = edited.clips
    real = pipeline.detokenize(pipeline.tokenize(clips))
    print("swap: right digit, direction kept, centre off by")
    for name, drawn in arms.items():
        right = (judge.classify(drawn) == torch.tensor(wanted)).float().mean()
        kept = (judge.direction(drawn) == judge.direction(clips)).float().mean()
        off = (centres(drawn) - centres(real)).norm(dim=-1).mean()
        print(f"  {name:<24} {right:7.1%} {kept:7.1%} {off:5.1f} pixels")


def report_inpainting(pipeline: GeneratorPipeline, clips: Tensor, captions: list[str]) -> None:
    condition = pipeline.condition({"captions": captions})
    job = DrawJob(
        sample_index=torch.arange(len(clips)), config=RefineConfig(num_steps=16, guidance_scale=2.0)
    )
    mask = torch.zeros(1, 1, *clips.shape[-2:], dtype=torch.bool)
    mask[:, :, mask.shape[2] // 2 :] = True
    print("inpainting of the lower half: mean squared error to the real clip, pixels in [-1, 1]")
    for mode in ("clean", "renoised"):
        edges = InpaintConfig(mode=mode, blend=None)
        drawn = inpaint(pipeline, clips, mask, condition=condition, job=job, config=edges).clips
        print(f"  {mode:<24} {(drawn - clips).square().mean():.3f}")
    alone = pipeline.detokenize(pipeline.tokenize(clips))
    print(f"  {'the tokenizer alone':<24} {(alone - clips).square().mean():.3f}")


def report_first_frames(
    pipeline: GeneratorPipeline, judge: DigitJudge, clips: Tensor, captions: list[str]
) -> None:
    condition = pipeline.condition({"captions": captions})
    digits = torch.tensor([DIGIT_NAMES.index(caption.split()[2]) for caption in captions])
    print("from the first frame: right digit, right direction")
    for scale in (1.0, 2.0, 3.0):
        job = DrawJob(
            sample_index=torch.arange(len(clips)),
            config=RefineConfig(num_steps=16, guidance_scale=scale),
        )
        drawn = frames(
            pipeline,
            first=clips[:, :, :1],
            last=None,
            num_frames=clips.shape[2],
            condition=condition,
            job=job,
        ).clips
        right = (judge.classify(drawn) == digits).float().mean()
        kept = (judge.direction(drawn) == judge.direction(clips)).float().mean()
        print(f"  guidance {scale:g} {right:7.1%} {kept:7.1%}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--num_samples", type=int, default=24)
    options = parser.parse_args()
    pipeline = load_generator(options.run).pipeline
    judge = DigitJudge.load(options.data.parent / "judge.safetensors")
    clips, captions = held_out(options.data, options.num_samples)
    report_swaps(pipeline, judge, clips, captions)
    report_inpainting(pipeline, clips, captions)
    report_first_frames(pipeline, judge, clips, captions)


if __name__ == "__main__":
    main()
