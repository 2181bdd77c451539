"""A CLIP of a few thousand weights in the files that open_clip reads."""

import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file

SMALL_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_clip(folder: Path) -> Path:
    """Write configuration and random weights to a new folder and return it."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP}))
    model = open_clip.CLIP(**SMALL_CLIP)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
