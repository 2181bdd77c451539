"""Packed documents: each gets the logits, and gives the gradients, that it has alone."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from grn_lightning.models.packed import PackedMaps, PackedText, pack_text
from grn_lightning.nn import packed_attention
from grn_lightning.nn.packed_attention import choose_backend

PREFIX = GRNTextConfig(
    num_elements=6,
    alphabet_size=4,
    text_channels=10,
    depth=2,
    width=96,
    num_heads=3,
    num_kv_heads=1,
    mlp_width=40,
    blocks_per_chunk=1,
)
BOTH = pytest.mark.parametrize("attention", ["prefix", "full"])


class Document(NamedTuple):
    """One sample: codes to be predicted, a first frame or none, its time and its caption."""

    codes: Tensor  # (c, f, h, w)
    first_frame: Tensor | None
    t: Tensor
    text: Tensor  # (l, channels)
    mask: Tensor  # (l,)


def make_document(grid: tuple[int, int, int], length: int, *, is_continued: bool = False):
    frames, h, w = grid
    mask = torch.ones(length, dtype=torch.bool)
    mask[1:-1:3] = False  # a caption may have holes
    return Document(
        torch.randint(4, (6, frames, h, w)),
        torch.randint(4, (6, 1, h, w)) if is_continued else None,
        torch.rand(()),
        torch.randn(length, 10),
        mask,
    )


def make_documents() -> list[Document]:
    """Pictures and clips of several aspects, two of them going on from a picture."""
    return [
        make_document((1, 4, 4), 5),
        make_document((3, 2, 5), 2, is_continued=True),
        make_document((2, 3, 2), 9),
        make_document((1, 1, 1), 1),
        make_document((2, 2, 2), 4, is_continued=True),
    ]


def build(attention: str) -> GRNText:
    """Build a model in which every part matters."""
    model = GRNText(dataclasses.replace(PREFIX, attention=attention)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model


def alone(model: GRNText, document: Document) -> Tensor:
    """Logits `(n, c, k)` of one document in a batch of its own."""
    first = document.first_frame
    logits = model(
        document.codes[None],
        document.t[None],
        TextCondition(document.text[None], document.mask[None]),
        first_frame=None if first is None else first[None],
    )
    return logits[0].flatten(1, 3).transpose(0, 1)


def pack(documents: Sequence[Document]) -> tuple[PackedMaps, Tensor, PackedText]:
    maps = [
        d.codes if d.first_frame is None else torch.cat([d.first_frame, d.codes], 1)
        for d in documents
    ]
    embeds = torch.nn.utils.rnn.pad_sequence([d.text for d in documents], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([d.mask for d in documents], batch_first=True)
    return (
        PackedMaps(
            torch.cat([one.flatten(1).T for one in maps]),
            tuple(tuple(one.shape[1:]) for one in maps),
            tuple(d.first_frame is not None for d in documents),
        ),
        torch.stack([d.t for d in documents]),
        pack_text(embeds, mask),
    )


def gradients(model: GRNText, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weigh(logits: Tensor) -> Tensor:
    """A loss in which every logit has a weight of its own, by its place in the document."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


@BOTH
@pytest.mark.parametrize("backend", ["auto", "documents", "dense"])
def test_packed_documents_have_the_logits_and_gradients_they_have_alone(attention, backend):
    model, documents = build(attention), make_documents()
    model.packed_backend = backend
    single = [alone(model, document) for document in documents]
    packed = model(*pack(documents)).split([len(one) for one in single])
    for mine, expected in zip(packed, single, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    expected = gradients(model, torch.stack([weigh(one) for one in single]).sum())
    found = gradients(model, torch.stack([weigh(one) for one in packed]).sum())
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale)


@BOTH
def test_the_gradient_of_one_document_is_its_own(attention):
    model, documents = build(attention), make_documents()
    for number, document in enumerate(documents):
        expected = gradients(model, weigh(alone(model, document)))
        sizes = [len(alone(model, one)) for one in documents]
        mine = model(*pack(documents)).split(sizes)[number]
        for name, gradient in gradients(model, weigh(mine)).items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale)


@BOTH
def test_flex_attention_is_the_dense_mask(attention):
    model, packed = build(attention).requires_grad_(False), pack(make_documents())
    model.packed_backend = "dense"
    dense = model(*packed)
    model.packed_backend = "flex"
    with torch.no_grad():
        torch.testing.assert_close(model(*packed), dense, rtol=1e-5, atol=1e-5)


@BOTH
def test_the_order_of_documents_does_not_matter(attention):
    model, documents = build(attention).requires_grad_(False), make_documents()[:4]
    single = [alone(model, document) for document in documents]
    for order in itertools.islice(itertools.permutations(range(4)), 0, None, 5):
        logits = model(*pack([documents[i] for i in order]))
        expected = torch.cat([single[i] for i in order])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_first_frames_get_no_logits():
    model, documents = build("prefix").requires_grad_(False), make_documents()
    assert len(model(*pack(documents))) == sum(d.codes[0].numel() for d in documents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, 5, dtype=torch.long)}, r"codes must be \(n, 6\)"),
        ({"codes": torch.zeros(3, 6, dtype=torch.long)}, "codes of all positions of the grids, 81"),
        ({"has_first_frame": (False,)}, r"a caption per document, got \(5, 1, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    maps, t, text = pack(make_documents())
    with pytest.raises(ValueError, match=message):
        build("full")(maps._replace(**change), t, text)


def test_text_of_another_width_is_refused():
    maps, t, text = pack(make_documents())
    with pytest.raises(ValueError, match=r"text features must be \(l, 10\)"):
        build("full")(maps, t, text._replace(embeds=torch.zeros(len(text.embeds), 3)))


@pytest.mark.parametrize(
    ("head_width", "device_type", "expected"),
    [(16, "cuda", "flex"), (15, "cuda", "documents"), (128, "cpu", "documents")],
)
def test_auto_takes_what_has_a_kernel(head_width, device_type, expected):
    found = choose_backend("auto", head_width=head_width, device_type=device_type)
    assert found == expected


def test_the_width_of_heads_is_that_of_the_model(monkeypatch):
    asked = []

    def spy(backend, *, head_width, device_type):
        asked.append(head_width)
        return "documents"

    monkeypatch.setattr(packed_attention, "choose_backend", spy)
    model = build("prefix")
    model(*pack(make_documents()))
    assert asked == [model.config.head_dim] == [32]


def test_heads_too_narrow_for_flex_are_refused_on_cuda():
    with pytest.raises(ValueError, match="at least 16 channels on CUDA, got 6; take 'documents'"):
        choose_backend("flex", head_width=6, device_type="cuda")


def test_unknown_and_unfit_backends_are_refused():
    model, packed = build("prefix"), pack(make_documents())
    model.packed_backend = "fast"
    with pytest.raises(ValueError, match="one of auto, flex, documents, dense, got 'fast'"):
        model(*packed)
    model.packed_backend = "flex"
    with pytest.raises(ValueError, match="gradients on CUDA only, got cpu; take 'documents'"):
        model(*packed)
