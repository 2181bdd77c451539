"""The published weights by name: where they are, what they are, how they want to be asked.

Nothing here is guessed. A repository, a file name or a checksum that is not known to us is None,
and whoever asks for it is told so; weights that lie in the folder are found all the same. Sources:
code, README and tools of Generative Refinement Networks (arXiv 2604.13030).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from grn_lightning.models.pretrained import is_export
from grn_lightning.pipelines.prompts import PREFIX_STYLES, TAGGED_STYLES, PromptStyle, Task

DEFAULT_FOLDER = Path("weights")
"""Where published weights are looked for and downloaded to."""

GRN_REPOSITORY = "bytedance-research/GRN"
"""On the Hugging Face hub, as named in the published pipeline."""

_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")

EXTRA = "pip install 'grn-lightning[hub]'"


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One published network."""

    kind: Literal["tokenizer", "class", "text"]
    """What it is: a tokenizer, or a generator from classes or from text."""
    variant: str
    """Row of `models.variants`, or "auto" to read the sizes off the tensors."""
    file: str | None
    """Name of the file, without a suffix where that is not known. None: not known at all."""
    repository: str | None = None
    """Repository on the Hugging Face hub. None: not known here."""
    sha256: str | None = None
    """Checksum of the file. None: not known here, and not checked."""
    tokenizer: str | None = None
    """Name of the weights that made the codes of a generator."""
    attention: Literal["prefix", "full"] | None = None
    """Attention of a text-conditional generator; tensors do not tell it."""
    use_mid_attention: bool | None = None
    """Whether the middle attention of a tokenizer acts. None: not known; the names of tensors do
    not tell, the PSNR of a few pictures does."""
    text_encoder: str | None = None
    """Folder of the text encoder, in the same repository."""
    styles: Mapping[Task, PromptStyle] = field(default_factory=dict)
    """What belongs around prompts, by task; other tasks the weights do not draw."""
    sampling: Mapping[str, str] = field(default_factory=dict)
    """Names of presets of sampling, by task or "class"."""
    size: tuple[str, str, float] | None = None
    """Resolution preset, aspect and seconds where nothing is asked for."""
    note: str = ""
    """What a user should know."""


_UNKNOWN_FILE = "The name of the file carries a step number that is not known here."

WEIGHTS: dict[str, PublishedWeights] = {
    "tokenizer-16d": PublishedWeights(
        kind="tokenizer",
        variant="image-16d",
        file="HBQ_image_tokenizer_16dim_M4.ckpt",
        use_mid_attention=True,
        note="Images. Its repository is not stated where its name is.",
    ),
    "tokenizer-64d": PublishedWeights(
        kind="tokenizer",
        variant="joint-64d",
        file="HBQ_tokenizer_64dim_M4.ckpt",
        repository=GRN_REPOSITORY,
        use_mid_attention=True,
        note="Images and video, first release.",
    ),
    "tokenizer-64d-20260618": PublishedWeights(
        kind="tokenizer",
        variant="joint-64d",
        file="HBQ_image_video_tokenizer_64dim_M4_20260618",
        note="Images and video. The middle attention may have to be bypassed: compare PSNR.",
    ),
    "tokenizer-64d-20260626": PublishedWeights(
        kind="tokenizer",
        variant="joint-64d",
        file="HBQ_image_video_tokenizer_64dim_M4_20260626",
        note="Images and video. The middle attention may have to be bypassed: compare PSNR.",
    ),
    "c2i-b": PublishedWeights(
        kind="class",
        variant="B-index",
        file="GRN_ind_B_ep599.pth",
        tokenizer="tokenizer-16d",
        sampling={"class": "c2i-b"},
        note="ImageNet classes, 256 x 256. Its repository is not stated where its name is.",
    ),
    "t2i-2b": PublishedWeights(
        kind="text",
        variant="2b",
        file="GRN_T2I_2B.pth",
        tokenizer="tokenizer-64d",
        attention="prefix",
        styles={"image": PREFIX_STYLES["image"]},
        sampling={"image": "t2i-first"},
        size=("1M", "1:1", 0),
        note="First release: the text does not see the picture, no task tags.",
        repository=GRN_REPOSITORY,
        text_encoder="umt5-xxl",
    ),
    "t2v-2b": PublishedWeights(
        kind="text",
        variant="2b",
        file="GRN_T2V_2B.pth",
        tokenizer="tokenizer-64d",
        attention="prefix",
        styles={"video": PREFIX_STYLES["video"]},
        sampling={"video": "t2v-first"},
        size=("0.41M", "16:9", 2),
        note="First release: the text does not see the clip, no task tags.",
        repository=GRN_REPOSITORY,
        text_encoder="umt5-xxl",
    ),
    "t2i-2b-full": PublishedWeights(
        kind="text",
        variant="2b",
        file=None,
        tokenizer="tokenizer-64d-20260626",
        attention="full",
        styles={"image": TAGGED_STYLES["image"]},
        sampling={"image": "t2i"},
        size=("1M", "1:1", 0),
        note=f"Full attention, task tags. {_UNKNOWN_FILE}",
        text_encoder="umt5-xxl",
    ),
    "t2v-2b-full": PublishedWeights(
        kind="text",
        variant="2b",
        file=None,
        tokenizer="tokenizer-64d-20260626",
        attention="full",
        styles={task: TAGGED_STYLES[task] for task in ("video", "first_frame")},
        sampling={"video": "t2v", "first_frame": "i2v"},
        size=("0.41M", "16:9", 2),
        note=f"Full attention, task tags; starts from pictures too. {_UNKNOWN_FILE}",
        text_encoder="umt5-xxl",
    ),
    "t2v-8b-full": PublishedWeights(
        kind="text",
        variant="auto",  # two definitions were published; the tensors tell which it is
        file=None,
        tokenizer="tokenizer-64d-20260626",
        attention="full",
        styles={task: TAGGED_STYLES[task] for task in ("video", "first_frame")},
        sampling={"video": "t2v", "first_frame": "i2v"},
        size=("0.41M", "16:9", 2),
        note=f"Full attention, task tags; starts from pictures too. {_UNKNOWN_FILE}",
        text_encoder="umt5-xxl",
    ),
}
"""All weights that this package knows by name."""


def published(name: str) -> PublishedWeights:
    """Look up weights by name.

    Raises:
        ValueError: If there are none of that name.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    near = get_close_matches(name, WEIGHTS, n=1)
    hint = f"did you mean '{near[0]}'? K" if near else "k"
    raise ValueError(f"no published weights are called '{name}'; {hint}nown are {known_names()}.")


def known_names() -> str:
    """Return the names of all weights, for a message."""
    return ", ".join(f"'{name}'" for name in WEIGHTS)


def find_local(name: str, folder: Path) -> Path | None:
    """Return the export or the published file that lies in a folder.

    Args:
        name: One of `WEIGHTS`.
        folder: Where it may lie: as export `NAME.json` with `NAME.safetensors`, or under its
            published name.
    """
    if is_export(folder / name):
        return folder / name
    file = published(name).file
    if file is None:
        return None
    candidates = (folder / f"{file}{suffix}" for suffix in ("", *_SUFFIXES))
    return next((path for path in candidates if path.is_file()), None)


def fetch(name: str, folder: Path = DEFAULT_FOLDER) -> Path:
    """Return where weights lie, downloading them if they are not there and their place is known.

    Args:
        name: One of `WEIGHTS`.
        folder: Where to look, and to download to.

    Raises:
        ValueError: If they are not there and cannot be downloaded; the message names the file to
            fetch by hand and where to put it.
    """
    if (found := find_local(name, folder)) is not None:
        return found
    row = published(name)
    by_hand = _by_hand(name, row, folder)
    if row.repository is None or row.file is None:  # a file of a known repository has its suffix
        raise ValueError(by_hand)
    return _download(row.repository, row.file, folder, by_hand)


def fetch_text_encoder(name: str, folder: Path = DEFAULT_FOLDER) -> Path:
    """Return the folder of the text encoder of text-conditional weights; see `fetch`.

    Raises:
        ValueError: If it is not there and cannot be downloaded.
    """
    row = published(name)
    if row.text_encoder is None:
        raise ValueError(f"'{name}' has no text encoder.")
    place = folder / row.text_encoder
    if place.is_dir():
        return place
    by_hand = (
        f"the text encoder of '{name}' is not in '{place}': fetch the folder '{row.text_encoder}' "
        f"of {row.repository or GRN_REPOSITORY} from the Hugging Face hub by hand and put it there"
    )
    return _download(row.repository or GRN_REPOSITORY, f"{row.text_encoder}/", folder, by_hand)


def _by_hand(name: str, row: PublishedWeights, folder: Path) -> str:
    """Say how a person gets the weights."""
    file = f"'{row.file}'" if row.file else "their file (its name is not known here)"
    place = f"of {row.repository}" if row.repository else "from where its authors offer it"
    put = (
        f"put it to '{folder / row.file}'"
        if row.file
        else f"convert it: grn convert FILE --out {folder / name}"
    )
    return f"'{name}' is not in '{folder}': fetch {file} {place} by hand and {put}"


def _download(repository: str, file: str, folder: Path, by_hand: str) -> Path:
    """Download a file, or a folder if its name ends in a slash."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise ValueError(f"{by_hand}; or let it be downloaded: {EXTRA}.") from error
    try:
        if file.endswith("/"):
            snapshot_download(repository, allow_patterns=f"{file}*", local_dir=folder)
            return folder / file.rstrip("/")
        return Path(hf_hub_download(repository, file, local_dir=folder))
    except Exception as error:  # of many packages below: no network, no such file, no room
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{by_hand}. The download failed: {reason}") from error
