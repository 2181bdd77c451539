"""Pictures, films and histograms for TensorBoard, from any logger that has a SummaryWriter.

`SummaryWriter.add_video` writes nothing without an old moviepy; a GIF as an image summary needs
only PIL, and TensorBoard plays it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor

from grn_lightning.media.video import encode_gif


def _writers(trainer: L.Trainer) -> list[Any]:
    """Writers of all TensorBoard loggers; none on other ranks than the first."""
    if not trainer.is_global_zero:
        return []
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in experiments if isinstance(writer, SummaryWriter)]


def has_tensorboard(trainer: L.Trainer) -> bool:
    """Whether this process has somewhere to write pictures to."""
    return bool(_writers(trainer))


def log_picture(trainer: L.Trainer, tag: str, picture: Image.Image) -> None:
    """Write a picture at the current step."""
    for writer in _writers(trainer):
        writer.add_image(tag, pil_to_tensor(picture.convert("RGB")), trainer.global_step)


def log_film(trainer: L.Trainer, tag: str, frames: Sequence[Image.Image], *, fps: float) -> None:
    """Write frames of one size as a GIF at the current step."""
    for writer in _writers(trainer):
        width, height = frames[0].size
        clip = torch.stack([pil_to_tensor(frame.convert("RGB")) for frame in frames])
        gif = encode_gif(clip, fps=fps)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        writer._get_file_writer().add_summary(summary, trainer.global_step)


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Write a text (Markdown) at the current step."""
    for writer in _writers(trainer):
        writer.add_text(tag, text, trainer.global_step)


def log_histogram(trainer: L.Trainer, tag: str, values: Tensor, *, edges: Tensor) -> None:
    """Write how many values lie between each two edges, at the current step."""
    for writer in _writers(trainer):
        writer.add_histogram(tag, values.cpu().numpy(), trainer.global_step, bins=edges.numpy())


def log_layout(trainer: L.Trainer, charts: Mapping[str, Sequence[str]]) -> None:
    """Lay out charts of several scalars each; TensorBoard shows them under "Custom Scalars".

    Args:
        trainer: Whose loggers.
        charts: Regular expressions of tags, by the chart's title.
    """
    layout = {"grn": {title: ["Multiline", list(tags)] for title, tags in charts.items()}}
    for writer in _writers(trainer):
        writer.add_custom_scalars(layout)
