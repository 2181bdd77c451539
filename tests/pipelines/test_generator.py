"""Pipelines: one forward for many prompts, text run once, a first frame that stays, no waste."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grn_lightning.media.images import center_crop_resize, to_float
from grn_lightning.models.grn_text import FirstFrameCondition, TextCache, TextCondition
from grn_lightning.pipelines import (
    GeneratorPipeline,
    PromptStyle,
    prepare_text,
    trim_text,
    with_first_frame,
)
from grn_lightning.samplers import RefineConfig, refine
from grn_lightning.samplers.constraints import Constraint
from tests.pipelines.conftest import Build

ATTENTION = ["prefix", "full"]
PROMPTS = ["seven", "the digit two moves up and then down and then up again, over and over", ""]
CONFIG = RefineConfig(num_steps=4, guidance_scale=2.0)
SIZE = (5, 16, 16)  # 3 x 2 x 2 positions


class Spy:
    """Stands in for a generator's forward; remembers what it was asked, answers as told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, codes: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.asked.append((codes, t, condition))
        return self.answer(codes, t, condition)


def spy_on(pipeline: GeneratorPipeline, answer: Any = None) -> Spy:
    spy = Spy(answer or pipeline.generator.forward)
    pipeline.generator.forward = spy  # type: ignore[method-assign]
    return spy


def rows_of(condition: TextCondition, rows: slice) -> TextCondition:
    return TextCondition(*(part[rows] for part in condition))


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTENTION)
def test_prepared_text_gives_the_logits_of_text_as_it_came(kind: str, build: Build) -> None:
    pipeline = build(kind)
    text, null = pipeline.condition({"captions": PROMPTS}), pipeline.null_condition(3, "eight")
    codes, t = torch.randint(2, (3, 8, 3, 2, 2)), torch.rand(3)
    for condition, ready in zip(
        (text, null), prepare_text(pipeline.generator, [text, null]), strict=True
    ):
        assert isinstance(ready, TextCache if kind == "prefix" else TextCondition)
        expected = pipeline.generator(codes, t, condition)
        torch.testing.assert_close(pipeline.generator(codes, t, ready), expected)


@pytest.mark.parametrize("kind", ATTENTION)
def test_prompts_of_mixed_lengths_give_what_each_gives_alone(kind: str, build: Build) -> None:
    """In one forward, without the encoder's padding: 16 tokens instead of 40."""
    pipeline = build(kind)
    text = pipeline.condition({"captions": PROMPTS})
    assert text.mask.sum(1).tolist() == [3, 18, 2]
    codes, t = torch.randint(2, (3, 8, 3, 2, 2)), torch.rand(3)
    [ready] = prepare_text(pipeline.generator, [text])
    assert ready.mask.shape == (3, 32)
    together = pipeline.generator(codes, t, ready)
    for n in range(3):
        row = slice(n, n + 1)
        alone = rows_of(text, row)
        trimmed = TextCondition(alone.embeds[:, alone.mask[0]], alone.mask[:, alone.mask[0]])
        expected = pipeline.generator(codes[row], t[row], trimmed)
        torch.testing.assert_close(together[row], expected)


def test_conditions_of_different_lengths_meet_at_the_needed_one() -> None:
    def condition(length: int, used: int) -> TextCondition:
        mask = torch.arange(length)[None] < used
        return TextCondition(torch.randn(1, length, 3), mask)

    for lengths, used, expected in (
        ((40, 40), (3, 20), 32),
        ((40, 20), (3, 20), 32),
        ((7, 5), (2, 5), 7),
        ((40, 9), (0, 0), 16),
    ):
        given = [condition(*pair) for pair in zip(lengths, used, strict=True)]
        found = trim_text(given)
        assert [one.mask.shape[1] for one in found] == [expected] * 2
        for one, before in zip(found, given, strict=True):
            assert one.embeds[one.mask].equal(before.embeds[before.mask])


@pytest.mark.parametrize(("kind", "runs"), [("prefix", 2), ("full", 4)])
def test_text_goes_through_the_blocks_once_where_it_may(kind: str, runs: int, build: Build) -> None:
    """With prefix attention once per branch; with full attention in every step."""
    pipeline = build(kind)
    calls: list[int] = []
    pipeline.generator.text_proj.register_forward_hook(lambda *_: calls.append(1))
    encoded: list[int] = []
    hook = pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(1))  # type: ignore[union-attr]
    pipeline.draw_text(PROMPTS, size=SIZE, config=CONFIG)
    hook.remove()
    assert len(calls) == runs
    assert len(encoded) == 2  # the prompts, and one row of the empty one


@pytest.mark.parametrize("kind", ATTENTION)
def test_the_pipeline_draws_what_the_bare_sampler_draws(kind: str, build: Build) -> None:
    pipeline = build(kind)
    numbers = torch.arange(3)
    condition, null = pipeline.condition({"captions": PROMPTS}), pipeline.null_condition(3)
    bare = refine(
        pipeline.generator, (8, 3, 2, 2), condition=condition, null_condition=null,
        sample_index=numbers, seed=4, alphabet_size=2, config=CONFIG,
    )  # fmt: skip
    drawn = pipeline.draw(condition, numbers, size=SIZE, config=CONFIG, seed=4)
    assert drawn.elements.equal(bare.codes)
    assert drawn.num_forwards == bare.num_forwards
    assert drawn.num_steps.tolist() == [4, 4, 4]
    torch.testing.assert_close(drawn.entropy, bare.entropy)
    torch.testing.assert_close(drawn.clips, pipeline.detokenize(bare.codes))


@pytest.mark.parametrize("kind", [*ATTENTION, "class"])
def test_a_sample_does_not_depend_on_its_batch(kind: str, build: Build) -> None:
    pipeline = build(kind)
    wanted = {"class_labels": [7, 1, 4]} if kind == "class" else {"captions": PROMPTS}
    size = (1, 16, 16) if kind == "class" else SIZE

    def drawn(rows: list[int]) -> Any:
        some = {name: [values[n] for n in rows] for name, values in wanted.items()}
        numbers = torch.tensor(rows)
        return pipeline.draw(pipeline.condition(some), numbers, size=size, config=CONFIG, seed=2)

    whole = drawn([0, 1, 2])
    assert len({one.numpy().tobytes() for one in whole.elements}) == 3
    for rows in ([2, 0], [1]):
        part = drawn(rows)
        assert part.elements.equal(whole.elements[rows])
        assert part.clips.equal(whole.clips[rows])


# --- a first frame --------------------------------------------------------------------------------


@pytest.fixture
def pictures() -> list[Tensor]:
    """Two pictures of other sizes than the clips."""
    torch.manual_seed(3)
    return [torch.randint(256, shape, dtype=torch.uint8) for shape in ((3, 20, 48), (3, 16, 16))]


def test_a_first_frame_covers_and_is_cut_from_the_middle(
    build: Build, pictures: list[Tensor]
) -> None:
    pipeline = build()
    found = pipeline.first_frame(pictures, size=(16, 16))
    cut = torch.stack([center_crop_resize(picture, (16, 16)) for picture in pictures])
    assert found.shape == (2, 8, 1, 2, 2)
    assert found.equal(pipeline.tokenize(to_float(cut)[:, :, None]))


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_generator_that_is_right_continues_the_picture(
    kind: str, build: Build, pictures: list[Tensor]
) -> None:
    """Asked for frames 1.. with the clean frame beside; decoded as one clip from frame 0 on."""
    pipeline = build(kind)
    truth = torch.randint(2, (2, 8, 2, 2, 2))

    def answer(codes: Tensor, t: Tensor, condition: FirstFrameCondition) -> Tensor:
        return 50.0 * one_hot(truth.repeat(len(codes) // 2, 1, 1, 1, 1), 2).float()

    spy = spy_on(pipeline, answer)
    drawn = pipeline.draw_text(PROMPTS[:2], size=SIZE, pictures=pictures, config=CONFIG)
    first = pipeline.first_frame(pictures, size=SIZE[1:])
    assert drawn.elements.equal(torch.cat([first, truth], dim=2))
    torch.testing.assert_close(drawn.clips, pipeline.detokenize(drawn.elements))
    torch.testing.assert_close(drawn.clips[:, :, :1], pipeline.detokenize(first))
    for codes, _, condition in spy.asked:
        assert codes.shape[2:] == (2, 2, 2)
        # In both branches, row by row, so that guidance acts on the text alone.
        assert condition.first_frame.equal(first.repeat(len(codes) // 2, 1, 1, 1, 1))


@pytest.mark.parametrize("kind", ATTENTION)
def test_frames_behind_a_picture_are_drawn_as_in_a_clip_whose_frame_0_is_clean(
    kind: str, build: Build, pictures: list[Tensor]
) -> None:
    """Oracle: every step asks for the whole clip, clean frame in front, and drops its logits."""
    pipeline = build(kind)
    first = pipeline.first_frame(pictures, size=SIZE[1:])
    condition, null = pipeline.condition({"captions": PROMPTS[:2]}), pipeline.null_condition(2)

    def whole_clip(codes: Tensor, t: Tensor, condition: Any) -> Tensor:
        clean = first.repeat(len(codes) // 2, 1, 1, 1, 1)
        return pipeline.generator(torch.cat([clean, codes], dim=2), t, condition)[:, :, 1:]

    expected = refine(
        whole_clip, (8, 2, 2, 2), condition=condition, null_condition=null,
        sample_index=torch.arange(2), seed=5, alphabet_size=2, config=CONFIG,
    )  # fmt: skip
    drawn = pipeline.draw_text(PROMPTS[:2], size=SIZE, pictures=pictures, config=CONFIG, seed=5)
    assert drawn.elements[:, :, 1:].equal(expected.codes)
    assert drawn.elements[:, :, :1].equal(first)
    other = pipeline.draw(
        with_first_frame(condition, 1 - first), torch.arange(2), size=SIZE, config=CONFIG, seed=5
    )
    assert (other.entropy - drawn.entropy).abs().min() > 1e-5  # the picture has a say


def test_one_picture_serves_all_prompts_and_one_prompt_all_pictures(
    build: Build, pictures: list[Tensor]
) -> None:
    pipeline = build()
    first = pipeline.first_frame(pictures, size=SIZE[1:])
    text = pipeline.condition({"captions": PROMPTS})
    assert with_first_frame(text, first[:1]).first_frame.shape[0] == 3
    joined = with_first_frame(rows_of(text, slice(1)), first)
    assert joined.text.mask.equal(text.mask[:1].expand(2, -1))
    with pytest.raises(ValueError, match="got 3 captions and 2 first frames"):
        with_first_frame(text, first)
    with pytest.raises(ValueError, match="goes with a text condition, got one of type Tensor"):
        with_first_frame(torch.tensor([1]), first)


def test_a_picture_that_nothing_follows_is_refused(build: Build, pictures: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two latent frames"):
        build().draw_text(["x"], size=(1, 16, 16), pictures=pictures[:1])
    with pytest.raises(ValueError, match="pictures continue nothing"):
        build("class").first_frame(pictures, size=(16, 16))


# --- constraints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_first_frame", [False, True])
def test_what_is_known_is_in_the_answer(
    has_first_frame: bool, build: Build, pictures: list[Tensor]
) -> None:
    pipeline = build()
    known = torch.randint(2, (1, 8, 3, 2, 2))
    mask = torch.rand(1, 1, 3, 2, 2) < 0.5
    condition = pipeline.condition({"captions": PROMPTS[:2]})
    first = pipeline.first_frame(pictures, size=SIZE[1:])
    if has_first_frame:
        condition = with_first_frame(condition, first)
    drawn = pipeline.draw(
        condition, torch.arange(2), size=SIZE, config=CONFIG, constraint=Constraint(known, mask)
    )
    rest = slice(1 if has_first_frame else 0, None)
    found = drawn.elements[:, :, rest][mask[:, :, rest].expand(2, 8, -1, -1, -1)]
    assert found.equal(
        known.expand(2, -1, -1, -1, -1)[:, :, rest][mask[:, :, rest].expand(2, 8, -1, -1, -1)]
    )
    if has_first_frame:
        assert drawn.elements[:, :, :1].equal(first)


# --- classes, styles, decoding --------------------------------------------------------------------


def test_classes_are_drawn_at_the_generator_s_own_size(build: Build) -> None:
    pipeline = build("class", sampling=CONFIG)
    spy = spy_on(pipeline)
    drawn = pipeline.draw_classes([3, 9], seed=1)
    assert drawn.clips.shape == (2, 3, 1, 16, 16)
    assert [asked[2].tolist() for asked in spy.asked] == [[3, 9, 10, 10]] * 4
    with pytest.raises(ValueError, match=r"in \[0, 10\), got \[-1, 10\]"):
        pipeline.draw_classes([3, -1, 10])
    numbered = pipeline.draw_classes([9], sample_index=torch.tensor([1]), seed=1)
    assert numbered.elements.equal(drawn.elements[1:])
    for prompts in ("a boat", []):
        with pytest.raises(ValueError, match="`prompts` must be a list of one text or more, got"):
            build().draw_text(prompts, size=(1, 16, 16))
    with pytest.raises(ValueError, match="use `draw_classes`"):
        pipeline.draw_text(["x"], size=(1, 16, 16))
    with pytest.raises(ValueError, match="use `draw_text`"):
        build().draw_classes([3])
    with pytest.raises(ValueError, match="draws from 'class_labels', got"):
        pipeline.condition({"captions": ["x"]})


def test_prompts_wear_the_style_of_their_task(
    build: Build, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    styles = {
        "video": PromptStyle(tag="<T2V>", suffix="!", negative="bad"),
        "first_frame": PromptStyle(tag="<I2V>"),
    }
    pipeline = build(styles=styles)
    read: list[list[str]] = []
    whole = pipeline.condition
    monkeypatch.setattr(pipeline, "condition", lambda b: read.append(b["captions"]) or whole(b))
    pipeline.draw_text(["cat", ""], size=SIZE, config=CONFIG)
    pipeline.draw_text(["cat"], size=SIZE, config=CONFIG, negative_prompt="")
    pipeline.draw_text(["cat"], size=SIZE, config=CONFIG, pictures=pictures[:1])
    assert read == [["<T2V>cat!", ""], ["bad"], ["<T2V>cat!"], [""], ["<I2V>cat"], [""]]
    with pytest.raises(ValueError, match="draw 'video', 'first_frame', but not 'image'"):
        pipeline.draw_text(["cat"], size=(1, 16, 16))


def test_a_negative_prompt_is_what_guidance_leaves(build: Build) -> None:
    """With the prompt itself as negative one, no guidance is left: l_u + s (l_c - l_u) = l_c."""
    pipeline = build()
    condition = pipeline.condition({"captions": ["seven"]})
    settings: dict[str, Any] = {"size": SIZE, "seed": 1}
    plain = pipeline.draw(
        condition, torch.tensor([0]), config=RefineConfig(num_steps=4), **settings
    )
    strong = dataclasses.replace(CONFIG, guidance_scale=5.0)
    against = [
        pipeline.draw_text(["seven"], negative_prompt=text, config=strong, **settings)
        for text in ("seven", "one")
    ]
    assert against[0].elements.equal(plain.elements)
    assert not against[1].elements.equal(plain.elements)


def test_long_clips_are_decoded_in_chunks_of_bounded_size(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build()
    elements = torch.randint(2, (2, 8, 7, 2, 2))
    whole = pipeline.detokenize(elements)
    monkeypatch.setattr("grn_lightning.pipelines.generator.POSITIONS_AT_ONCE", 9)
    chunks = list(pipeline.decode_chunks(elements))
    assert [chunk.shape[2] for chunk in chunks] == [3, 4, 4, 2]  # 2 latent frames at a time
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole)
    assert pipeline.detokenize(elements).equal(torch.cat(chunks, dim=2))
    assert float(whole.abs().max()) <= 1


def test_hashes_name_the_parts(build: Build) -> None:
    first, second = build("prefix").hashes, build("class").hashes
    assert set(first) == {"generator", "tokenizer", "text_encoder"}
    assert set(second) == {"generator", "tokenizer"}
    assert first["tokenizer"] == second["tokenizer"] != first["generator"]


def test_parts_that_do_not_fit_are_refused(build: Build, parts: dict[str, Any]) -> None:
    text, classes = build("prefix"), build("class")
    with pytest.raises(ValueError, match="needs a text encoder"):
        GeneratorPipeline(text.generator, text.tokenizer)
    wrong = dataclasses.replace(text.generator.config, num_elements=9)
    classes.generator.config = wrong  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"must be \(4, 4\) or \(8, 2\)"):
        GeneratorPipeline(classes.generator, text.tokenizer)
