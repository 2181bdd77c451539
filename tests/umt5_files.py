"""A random UMT5 encoder in the published layout, and a tokenizer trained on five lines."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY, WIDTH, HEADS, FEED_FORWARD, LAYERS = 64, 24, 3, 40, 2
TEXT = [
    "the digit seven moves left",
    "the digit two moves up",
    "a picture of a cat & a dog",
    "the quick brown fox jumps over the lazy dog",
    "hello world, again and again",
]


def random_weights() -> dict[str, Tensor]:
    """An encoder in the published layout, large enough that every part matters."""
    torch.manual_seed(3)
    shapes = {"token_embedding.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        block = f"blocks.{i}."
        shapes |= {f"{block}norm{n}.weight": (WIDTH,) for n in (1, 2)}
        shapes |= {f"{block}attn.{x}.weight": (2 * WIDTH, WIDTH) for x in "qkv"}
        shapes[f"{block}attn.o.weight"] = (WIDTH, 2 * WIDTH)
        shapes |= {f"{block}ffn.{x}.weight": (FEED_FORWARD, WIDTH) for x in ("gate.0", "fc1")}
        shapes[f"{block}ffn.fc2.weight"] = (WIDTH, FEED_FORWARD)
        shapes[f"{block}pos_embedding.embedding.weight"] = (32, HEADS)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def write_umt5(folder: Path) -> None:
    """Write `encoder.pth` and the tokenizer's folder `umt5-tiny`."""
    import sentencepiece  # of the extra `umt5`

    torch.save(random_weights(), folder / "encoder.pth")
    tokenizer = folder / "umt5-tiny"
    tokenizer.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 10),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tokenizer / "spiece.model").write_bytes(model.getvalue())
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    settings = {"tokenizer_class": "T5Tokenizer", **names}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
