"""UMT5TextEncoder: the text encoder of the published text-conditional generators.

The network is the UMT5 encoder of `transformers` (extra `umt5`). Here are the published names of
its 242 tensors, the cleaning of captions, and what makes 5.7 billion parameters bearable beside a
generator:

* The weights are no part of the module. `.to(device)` does not move them, no checkpoint stores
  them, no strategy wraps them. They are mapped from the file when a caption is met for the first
  time, run where the configuration says (the CPU unless told otherwise), and may be dropped after.
* Features are kept, by the tokens of their caption, in memory and, if wanted, in files. A run whose
  captions are all known never opens the weights to compute.
* The module's state is a fingerprint of the weights: a checkpoint refuses another encoder.
"""

import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from grn_lightning.models.feature_cache import FeatureCache, Tokens
from grn_lightning.models.grn_text import TextCondition
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig
from grn_lightning.nn.mlp import full_precision

MAX_TOKENS = 512
"""Published length; the positions that the generator has for text."""
MAX_DISTANCE = 128
"""Tokens further apart than this share the last bucket of the relative position bias."""
NUM_PROBES = 16
"""Elements of each tensor that enter the fingerprint."""
MAX_ROWS = 12

_LAYER_NAMES = {
    "norm1.weight": "0.layer_norm.weight",
    **{f"attn.{x}.weight": f"0.SelfAttention.{x}.weight" for x in "qkvo"},
    "pos_embedding.embedding.weight": "0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "1.layer_norm.weight",
    "ffn.gate.0.weight": "1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "1.DenseReluDense.wo.weight",
}


def umt5_names(num_layers: int) -> dict[str, str]:
    """Return the published name of every tensor with the name that `transformers` has for it."""
    names = {
        "token_embedding.weight": "embed_tokens.weight",
        "norm.weight": "final_layer_norm.weight",
    }
    for i in range(num_layers):
        for official, ours in _LAYER_NAMES.items():
            names[f"blocks.{i}.{official}"] = f"block.{i}.layer.{ours}"
    return names


def clean_caption(caption: str) -> str:
    r"""Mend broken Unicode and HTML entities, and let single spaces separate the words.

    Example:
        >>> clean_caption("  cats &amp;amp; dogs\n at&nbsp;play ")
        'cats & dogs at play'
    """
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


# ------------------------------------------------------------------------------------- the weights


def read_umt5(path: str | Path) -> dict[str, Tensor]:
    """Map the tensors of an encoder file into memory, under their published names.

    Args:
        path: A file with the published names (`.pth`, `.safetensors`), or with those of
            `transformers`. Nothing is read before it is used.

    Raises:
        ValueError: If the file is missing, cannot be mapped, or is not a whole encoder.
    """
    tensors = _map_file(Path(path))
    tensors = {name.removeprefix("encoder."): x for name, x in tensors.items()}
    if "shared.weight" in tensors:
        tensors["embed_tokens.weight"] = tensors.pop("shared.weight")
    num_layers = len([name for name in tensors if name.endswith(".SelfAttention.q.weight")])
    if num_layers:
        official = {ours: name for name, ours in umt5_names(num_layers).items()}
        tensors = {official.get(name, name): x for name, x in tensors.items()}
    expected = umt5_names(len([name for name in tensors if name.endswith(".attn.q.weight")]))
    rows = [f"missing     {name}" for name in expected if name not in tensors]
    rows += [f"unexpected  {name}" for name in tensors if name not in expected]
    if rows or len(expected) == 2:
        _refuse(path, rows or ["no blocks"])
    return {name: tensors[name] for name in expected}


def _map_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"`text_encoder.checkpoint` must be the file of the UMT5 encoder, such as "
            f"models_t5_umt5-xxl-enc-bf16.pth; '{path}' does not exist. Fetch it once by hand."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file: torch and safetensors each fail in their way
        raise ValueError(
            f"'{path}' cannot be mapped as weights ({type(error).__name__}): it is damaged, "
            "unfinished, or holds more than tensors."
        ) from error
    return {name: x for name, x in tensors.items() if isinstance(x, Tensor)}


def _refuse(path: str | Path, rows: list[str]) -> None:
    more = [f"... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
    raise ValueError(
        f"'{path}' is not the file of a UMT5 encoder; {len(rows)} of its tensors differ.\n  "
        + "\n  ".join(rows[:MAX_ROWS] + more)
    )


def fingerprint(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return 16 bytes that tell one set of weights from another without reading all of it.

    A SHA-256 over names, shapes, types and 16 evenly spaced elements of each tensor. Training
    changes all elements; a change of a few by hand may go unnoticed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        probes = tensor.detach().flatten()[:: max(1, tensor.numel() // NUM_PROBES)]
        digest.update(probes.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()[:16]), dtype=torch.uint8)


def umt5_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes of an encoder, by the argument names of `transformers.UMT5Config`."""
    vocab_size, width = tensors["token_embedding.weight"].shape
    num_buckets, num_heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
    return {
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": tensors["blocks.0.attn.q.weight"].shape[0] // num_heads,
        "d_ff": tensors["blocks.0.ffn.fc1.weight"].shape[0],
        "num_layers": len([name for name in tensors if name.endswith(".attn.q.weight")]),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
    }


def build_umt5(sizes: Mapping[str, int]) -> nn.Module:
    """Build the encoder of `transformers` on the meta device; its weights are to be assigned.

    Args:
        sizes: From `umt5_sizes`.
    """
    transformers = _require_transformers()
    config = transformers.UMT5Config(
        **sizes,
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",  # the tanh approximation
        layer_norm_epsilon=1e-6,
    )
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(config).encoder.requires_grad_(False).eval()


def assign_umt5(tower: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Give the encoder the tensors of a file, without a copy.

    Raises:
        ValueError: If a tensor has another shape than the sizes ask for.
    """
    own = tower.state_dict()
    names = umt5_names(umt5_sizes(tensors)["num_layers"])
    rows = [
        f"other shape {name} {tuple(tensors[name].shape)}, expected {tuple(own[ours].shape)}"
        for name, ours in names.items()
        if tensors[name].shape != own[ours].shape
    ]
    if rows:
        _refuse(path, rows)
    tower.load_state_dict({ours: tensors[name] for name, ours in names.items()}, assign=True)
    tower.requires_grad_(False)


def _require_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "the text encoder 'umt5' needs the package transformers; install it with "
            "pip install 'grn-lightning[umt5]'."
        ) from error
    return transformers


def _load_tokenizer(folder: Path) -> Any:
    transformers = _require_transformers()
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            "`text_encoder.tokenizer` must be the folder of the UMT5 tokenizer "
            f"(tokenizer_config.json, tokenizer.json or spiece.model), got '{folder}'."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in '{folder}' has no padding or no end token.")
    return tokenizer


# ------------------------------------------------------------------------------------- the encoder


class UMT5TextEncoder(TextEncoder):
    """Captions to token features with mask, by an encoder that lives outside of the module.

    Args:
        config: With `architecture: umt5`.

    Raises:
        ValueError: If the extra, the weights or the tokenizer are missing, or do not fit.
    """

    fingerprint: Tensor

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        assert config.checkpoint is not None
        assert config.tokenizer is not None
        self._tokenizer = _load_tokenizer(Path(config.tokenizer))
        tensors = read_umt5(config.checkpoint)
        self._sizes = umt5_sizes(tensors)
        if len(self._tokenizer) > self._sizes["vocab_size"]:
            raise ValueError(
                f"the tokenizer in '{config.tokenizer}' has {len(self._tokenizer)} tokens, but "
                f"'{config.checkpoint}' knows {self._sizes['vocab_size']}; they do not belong "
                "together."
            )
        self.register_buffer("fingerprint", fingerprint(tensors))
        name = self.fingerprint.numpy().tobytes().hex()
        self.cache = FeatureCache(name, config.feature_cache)
        self._loaded: list[nn.Module] = []  # in a list, so that it is no submodule

    @property
    def text_channels(self) -> int:
        """Width of the features."""
        return self._sizes["d_model"]

    @property
    def context_length(self) -> int:
        """Number of tokens `l` of every caption, padding included."""
        return self.config.context_length or MAX_TOKENS

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._loaded)

    @property
    def tower(self) -> nn.Module:
        """The network, loaded if it is not."""
        if not self._loaded:
            tensors = read_umt5(self.config.checkpoint)  # type: ignore[arg-type]
            with torch.inference_mode(False):
                tower = build_umt5(self._sizes)
                assign_umt5(tower, tensors, str(self.config.checkpoint))
                self._loaded.append(tower.to(self.config.device))
        return self._loaded[0]

    def release(self) -> None:
        """Drop the weights; they are mapped again when a new caption comes."""
        self._loaded.clear()

    def tokenize(self, captions: list[str]) -> Tensor:
        """Turn captions, cleaned, into tokens `(b, l)`; long ones are cut and keep their end."""
        cleaned = [clean_caption(caption) for caption in captions]
        length, padding = self.context_length, self._tokenizer.pad_token_id
        rows = self._tokenizer(cleaned, truncation=True, max_length=length)["input_ids"]
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> TextCondition:
        """Look up the features of tokens, computing those that are new.

        Args:
            tokens: `(b, l)` from `tokenize`.

        Returns:
            Features `(b, l, text_channels)`, float32 on the device of `tokens`, zero behind the
            end token, and a mask that is True up to and including it.
        """
        index = torch.arange(tokens.shape[1], device=tokens.device)
        end = (index * (tokens != self._tokenizer.pad_token_id)).amax(dim=1)
        mask = index <= end[:, None]
        rows = zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)
        captions = [tuple(row[:length]) for row, length in rows]
        known = self._look_up(captions)
        embeds = torch.zeros(*tokens.shape, self.text_channels, device=tokens.device)
        for row, caption in enumerate(captions):
            embeds[row, : len(caption)] = known[caption].to(embeds)
        return TextCondition(embeds, mask)

    def _look_up(self, captions: list[Tokens]) -> dict[Tokens, Tensor]:
        found = {caption: self.cache.get(caption) for caption in captions}
        known = {caption: x for caption, x in found.items() if x is not None}
        missing = [caption for caption in found if caption not in known]
        if missing:
            for caption, features in zip(missing, self._encode(missing), strict=True):
                self.cache.put(caption, features)
                known[caption] = features
            if not self.config.keep_loaded:
                self.release()
        return known

    @torch.no_grad()
    def _encode(self, captions: list[Tokens]) -> list[Tensor]:
        """Run the network on captions, padded to the longest among them."""
        longest = max(map(len, captions))
        padding = self._tokenizer.pad_token_id
        device = torch.device(self.config.device)
        tokens = [list(caption) + [padding] * (longest - len(caption)) for caption in captions]
        lengths = torch.tensor([len(caption) for caption in captions])
        mask = (torch.arange(longest) < lengths[:, None]).long().to(device)
        with full_precision(device):  # in the type of the weights, as published
            ids = torch.tensor(tokens, device=device)
            hidden = self.tower(input_ids=ids, attention_mask=mask).last_hidden_state
        return [x[: len(caption)].cpu() for x, caption in zip(hidden, captions, strict=True)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuse the state of an encoder with other weights."""
        stored = state_dict.get(f"{prefix}fingerprint")
        if stored is not None and not torch.equal(stored.cpu(), self.fingerprint.cpu()):
            raise ValueError(
                "the text features were made by the UMT5 encoder "
                f"{stored.cpu().numpy().tobytes().hex()}, but '{self.config.checkpoint}' is "
                f"{self.cache.encoder}; give the former as `text_encoder.checkpoint`."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
