"""Edits with untrained networks: what is known stays known, what is not given is drawn."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.text_encoder import OpenClipTextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.editing import (
    DrawJob,
    Edited,
    InpaintConfig,
    extend,
    frames,
    inpaint,
    outpaint,
    swap,
    vary,
)
from grn_lightning.samplers import EditConfig, RefineConfig
from tests.tiny_runs import TINY_CLASS, TINY_ENCODER, TINY_TEXT, TINY_TOKENIZER

QUICK = RefineConfig(num_steps=3, guidance_scale=2.0)
INDEX = torch.tensor([5, 2])
ELEMENTS = {"bit": (8, 2), "index": (4, 4)}  # of 4 channels with 2 rounds


def build(kind: str, target: str) -> GeneratorPipeline:
    elements, alphabet = ELEMENTS[target]
    sizes = {"num_elements": elements, "alphabet_size": alphabet}
    network: GRNText | GRNClass
    encoder = None
    if kind == "text":
        network = GRNText(GRNTextConfig(**(TINY_TEXT | sizes)))
        encoder = OpenClipTextEncoder(TextEncoderConfig(**TINY_ENCODER)).eval()
    else:
        network = GRNClass(GRNClassConfig(**(TINY_CLASS | sizes)))
    with torch.no_grad():
        for parameter in network.parameters():  # heads that start at zero would say nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER))
    return GeneratorPipeline(network.eval(), tokenizer.eval(), encoder, sampling=QUICK)


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[tuple[str, str], GeneratorPipeline]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kinds = [(kind, target) for kind in ("text", "class") for target in ELEMENTS]
        yield {(kind, target): build(kind, target) for kind, target in kinds}


@pytest.fixture(params=["text-bit", "text-index", "class-bit", "class-index"])
def pipeline(request: Any, pipelines: Any) -> GeneratorPipeline:
    return pipelines[tuple(request.param.split("-"))]


@pytest.fixture(params=["bit", "index"])
def film(request: Any, pipelines: Any) -> GeneratorPipeline:
    return pipelines["text", request.param]


def condition(pipeline: GeneratorPipeline, number: int = 0) -> Any:
    if pipeline.is_text:
        return pipeline.condition({"captions": [f"the digit {number}"]})
    return pipeline.condition({"class_labels": [number]})


def clips_for(pipeline: GeneratorPipeline, count: int = 1) -> Tensor:
    return torch.rand(count, 3, 5 if pipeline.is_text else 1, 16, 16) * 2 - 1


def job(**rest: Any) -> DrawJob:
    return DrawJob(sample_index=INDEX, seed=1, **rest)


def mask_for(clips: Tensor) -> Tensor:
    """The right half, that is one of two columns of positions."""
    mask = torch.zeros(1, 1, *clips.shape[-2:], dtype=torch.bool)
    mask[..., 8:] = True
    return mask


@pytest.mark.parametrize("mode", ["clean", "renoised"])
def test_inpainting_keeps_what_is_known_and_draws_the_rest(
    pipeline: GeneratorPipeline, mode: Any
) -> None:
    clips = clips_for(pipeline)
    config = InpaintConfig(mode=mode)
    result = inpaint(pipeline, clips, mask_for(clips), condition(pipeline), job(), config)
    known = pipeline.tokenize(clips)[..., 0]
    assert result.elements[..., 0].equal(known.expand_as(result.elements[..., 0]))
    assert not result.elements[0, ..., 1].equal(result.elements[1, ..., 1])
    assert result.clips[..., :8].equal(clips[..., :8].expand(2, -1, -1, -1, -1))
    assert not (result.clips[..., 8:] == clips[..., 8:]).all()
    assert (result.before[..., 8:] == 0).all()


@pytest.mark.parametrize("blend", [None, 0, 3])
def test_edges_are_as_soft_as_asked(film: GeneratorPipeline, blend: int | None) -> None:
    clips = clips_for(film)
    config = InpaintConfig(blend=blend)
    result = inpaint(film, clips, mask_for(clips), condition(film), job(), config)
    raw = film.detokenize(result.elements)
    given = clips.expand_as(raw)
    same = [result.clips[..., x].equal(given[..., x]) for x in range(16)]
    drawn = [torch.allclose(result.clips[..., x], raw[..., x], atol=1e-5) for x in range(16)]
    if blend is None:
        assert all(drawn)
    else:
        assert same == [True] * (8 - blend) + [False] * (8 + blend)
        assert drawn == [False] * 8 + [True] * 8


def test_a_grown_mask_draws_more(film: GeneratorPipeline) -> None:
    clips = clips_for(film)
    config = InpaintConfig(grow=1)
    result = inpaint(film, clips, mask_for(clips), condition(film), job(), config)
    assert not result.elements[0].equal(film.tokenize(clips)[0])
    assert not result.elements[0, ..., 0].equal(film.tokenize(clips)[0, ..., 0])
    assert result.clips[..., :8].equal(clips[..., :8].expand(2, -1, -1, -1, -1))


def test_outpainting_keeps_the_picture_in_the_middle(film: GeneratorPipeline) -> None:
    clips = clips_for(film)
    result = outpaint(film, clips, (8, 0, 16, 8), condition(film), job())
    assert result.clips.shape == (2, 3, 5, 40, 24)
    assert result.clips[..., 16:32, 8:].equal(clips.expand(2, -1, -1, -1, -1))
    assert (result.before[..., :16, :] == 0).all()
    assert not result.clips[0, ..., :16, :].equal(result.clips[1, ..., :16, :])


@pytest.mark.parametrize("ends", ["first", "last", "both"])
def test_frames_begin_and_end_as_given(film: GeneratorPipeline, ends: str) -> None:
    first, last = (torch.rand(1, 3, 1, 16, 16) * 2 - 1 for _ in range(2))
    result = frames(
        film,
        first=first if ends in ("first", "both") else None,
        last=last if ends in ("last", "both") else None,
        num_frames=5,
        condition=condition(film),
        job=job(),
    )
    assert result.clips.shape == (2, 3, 5, 16, 16)
    if ends != "last":
        assert result.elements[:, :, :1].equal(film.tokenize(first).expand(2, -1, -1, -1, -1))
        torch.testing.assert_close(  # of a causal decoder
            result.clips[:, :, :1], film.detokenize(film.tokenize(first)).expand(2, -1, -1, -1, -1)
        )
    if ends != "first":
        still = film.tokenize(last.expand(-1, -1, 9, -1, -1))[:, :, -1:]
        assert result.elements[:, :, -1:].equal(still.expand(2, -1, -1, -1, -1))
    assert not result.elements[0, :, 1].equal(result.elements[1, :, 1])


@pytest.mark.parametrize(("overlap", "wanted"), [(1, 9), (3, 9), (3, 14)])
def test_a_clip_goes_on_from_its_last_frames(
    film: GeneratorPipeline, overlap: int, wanted: int
) -> None:
    clips = clips_for(film)
    asked = {"num_frames": wanted, "window": 5, "overlap": overlap}
    result = extend(film, clips, condition=condition(film), job=job(), **asked)
    assert result.clips.shape == (2, 3, wanted, 16, 16)
    untouched = 5 - overlap
    assert result.clips[:, :, :untouched].equal(clips[:, :, :untouched].expand(2, -1, -1, -1, -1))
    assert result.before[:, :, 5:].eq(0).all()
    num_windows = -(-(wanted - 5) // (5 - overlap))
    assert result.num_steps.tolist() == [3 * num_windows] * 2

    one = extend(film, clips, condition=condition(film), job=job(), **(asked | {"num_frames": 6}))
    inside = slice(5, min(6, 10 - 2 * overlap))  # before the second window's seam
    assert result.clips[:, :, inside].equal(one.clips[:, :, inside])
    known = film.tokenize(clips[:, :, -overlap:])
    assert one.elements[:, :, : known.shape[2]].equal(known.expand(2, -1, -1, -1, -1))


def test_windows_do_not_share_their_noise(film: GeneratorPipeline) -> None:
    still = torch.zeros(1, 3, 5, 16, 16)
    asked: dict[str, Any] = {"window": 5, "overlap": 1, "condition": condition(film)}
    first = extend(film, still, num_frames=9, job=job(), **asked)
    second = extend(film, first.clips[:, :, :9], num_frames=13, job=job(), **asked)
    both = extend(film, still, num_frames=13, job=job(), **asked)
    assert not both.elements.equal(second.elements)  # the second window has a number of its own


def test_a_variation_skips_the_steps_before_its_time(pipeline: GeneratorPipeline) -> None:
    clips, prompt = clips_for(pipeline), condition(pipeline)
    config = RefineConfig(num_steps=4)
    size = tuple(clips.shape[2:])
    late = vary(pipeline, clips, prompt, job(config=config), start_time=0.8)
    assert late.num_steps.tolist() == [1, 1]
    assert late.before.equal(clips.expand(2, -1, -1, -1, -1))
    early = vary(pipeline, clips, prompt, job(config=config), start_time=0.0)
    plain = pipeline.draw(prompt, INDEX, size=size, seed=1, config=config)
    assert early.elements.equal(plain.elements)
    assert early.num_steps.tolist() == [4, 4]


@pytest.mark.parametrize("is_given", [False, True])
def test_a_swap_of_equal_prompts_changes_nothing(
    pipeline: GeneratorPipeline, is_given: bool
) -> None:
    clips = clips_for(pipeline) if is_given else None
    size = (5, 16, 16) if pipeline.is_text else (1, 16, 16)
    prompt = condition(pipeline)
    never = EditConfig(position_threshold=0.0)
    result = swap(
        pipeline, source=prompt, target=prompt, size=size, job=job(), clips=clips, config=never
    )
    index = INDEX
    plain = pipeline.draw(prompt, index, size=size, seed=1)
    if is_given:
        assert result.elements.equal(pipeline.tokenize(clips).expand_as(result.elements))
        assert result.before.equal(clips.expand_as(result.before))
    else:
        assert result.elements.equal(plain.elements)
        assert result.before.equal(plain.clips)
        assert result.clips.equal(plain.clips)


def test_a_swap_without_thresholds_draws_the_target(film: GeneratorPipeline) -> None:
    everything = EditConfig(position_threshold=-torch.inf, element_threshold=-torch.inf)
    result = swap(
        film,
        source=condition(film, 3),
        target=condition(film, 8),
        size=(5, 16, 16),
        job=job(),
        clips=clips_for(film),
        config=everything,
    )
    plain = film.draw(condition(film, 8), INDEX, size=(5, 16, 16), seed=1)
    assert result.elements.equal(plain.elements)


def refusals() -> dict[str, tuple[Any, str]]:
    def inpaint_with(mask: Tensor) -> Any:
        return lambda p: inpaint(p, clips_for(p), mask, condition(p), job())

    def extend_with(**asked: int) -> Any:
        return lambda p: extend(p, clips_for(p), condition=condition(p), job=job(), **asked)

    def frames_with(**asked: Any) -> Any:
        return lambda p: frames(p, condition=condition(p), job=job(), **asked)

    picture, other = torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 1, 8, 8)
    yes = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    return {
        "size": (inpaint_with(yes[..., :8]), r"the size of the clips, \(5, 16, 16\).*\(1, 16, 8\)"),
        "empty": (inpaint_with(~yes), "the mask covers nothing"),
        "borders": (
            lambda p: outpaint(p, clips_for(p), (0, 0, 0, 0), condition(p), job()),
            r"borders must be pixels.*got \(0, 0, 0, 0\)",
        ),
        "short": (extend_with(num_frames=5, window=5, overlap=3), "more than the 5 given ones"),
        "overlap": (
            extend_with(num_frames=9, window=5, overlap=2),
            r"overlap and window must be 1 \+ 2 k frames.*got 2 and 5",
        ),
        "long": (extend_with(num_frames=19, window=9, overlap=7), "at most the 5 given frames"),
        "none": (frames_with(first=None, last=None, num_frames=5), "give a first or a last"),
        "sizes": (frames_with(first=picture, last=other, num_frames=5), r"\(16, 16\), \(8, 8\)"),
        "few": (frames_with(first=picture, last=picture, num_frames=3), "ask for more frames"),
        "stride": (frames_with(first=picture, last=None, num_frames=4), r"1 \+ 2 k frames, got 4"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_edited_is_refused(pipelines: Any, name: str) -> None:
    call, message = refusals()[name]
    with pytest.raises(ValueError, match=message):
        call(pipelines["text", "bit"])


def test_pictures_have_no_frames(pipelines: Any) -> None:
    stills = pipelines["class", "bit"]
    with pytest.raises(ValueError, match="draws pictures only"):
        frames(
            stills,
            first=torch.zeros(1, 3, 1, 16, 16),
            last=None,
            num_frames=5,
            condition=condition(stills),
            job=job(),
        )


def test_impossible_edges_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError, match="grow must be .*blend must be .*mode must be 'clean' or"):
        InpaintConfig(grow=-1, blend=-2, mode="hard")  # type: ignore[arg-type]


def test_an_edit_does_not_depend_on_its_batch(film: GeneratorPipeline) -> None:
    clips = clips_for(film)

    def run(index: Tensor) -> Edited:
        one = DrawJob(sample_index=index, seed=1)
        return extend(
            film, clips, num_frames=9, window=5, overlap=3, condition=condition(film), job=one
        )

    both, alone = run(INDEX), run(INDEX[1:])
    assert alone.elements.equal(both.elements[1:])
    assert alone.clips.equal(both.clips[1:])


def test_a_seam_fades_from_the_old_frames_to_the_new(film: GeneratorPipeline) -> None:
    clips = clips_for(film)
    result = extend(
        film, clips, num_frames=7, window=5, overlap=3, condition=condition(film), job=job()
    )
    window = film.detokenize(result.elements)
    for n, weight in enumerate((0.25, 0.5, 0.75)):
        expected = (1 - weight) * clips[:, :, 2 + n] + weight * window[:, :, n]
        torch.testing.assert_close(result.clips[:, :, 2 + n], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.clips[:, :, 5:], window[:, :, 3:], rtol=0, atol=1e-5)
