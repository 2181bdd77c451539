"""Training on packs: noise, text and loss of each document are its own; resume is exact."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.datasets.documents import PackedBatch
from grn_lightning.functional import counter_uniform
from grn_lightning.functional.random import Stream
from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.code_stage import refuse_other_kind
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import CorruptionConfig, LitGenerator
from grn_lightning.lit.packed import PackedShardData, PackedSource
from grn_lightning.lit.packed_step import (
    corrupt_pack,
    document_weights,
    pack_condition,
    pack_elements,
    pack_step,
)
from grn_lightning.models.grn_text import GRNTextConfig, TextCondition
from grn_lightning.models.packed import pack_text
from grn_lightning.scripts.encode import encode
from tests.tiny_runs import (
    TINY_ENCODER,
    TINY_TEXT,
    callback,
    checkpoints,
    fit,
    generator_config,
    logged,
    source,
    tensors_equal,
)

BUDGET = 120


def packed_sources(digits: Path) -> list[dict[str, Any]]:
    """Clips of 5 frames, of 1, small pictures and larger ones: 24, 16, 16 and 28 tokens or so."""
    short = source(digits, "video", 4, name="short", split_val=None) | {"num_frames": 1}
    large = source(digits, "image", 4, name="large", split_val=None, image_size=32, weight=0.5)
    clips = source(digits, "video", 4, name="clips", weight=2.0)
    return [clips, short, source(digits, "image", 4, split_val=None), large]


def make_data(digits: Path, stage: Any, **rest: Any) -> PackedShardData:
    settings = {"token_budget": BUDGET, "image_size": 16, "with_captions": True, **rest}
    data = PackedShardData(settings.pop("sources", packed_sources(digits)), **settings)
    data.measure_by(stage)
    data.setup("fit")
    return data


def build(tokenizer: Path, **settings: Any) -> LitGenerator:
    """A text-conditional stage with random weights, in evaluation mode."""
    module = LitGenerator(
        GRNTextConfig(**TINY_TEXT),
        str(tokenizer),
        text_encoder=TINY_ENCODER,  # type: ignore[arg-type]
        **settings,
    )
    module.configure_model()
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value), world_size=1
    )
    for parameter in module.generator.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return module.eval()


@pytest.fixture(scope="module")
def module(tokenizer_run: Path) -> LitGenerator:
    return build(
        tokenizer_run,
        corruption=CorruptionConfig(condition_dropout=0.4, i2v_ratio=0.5),
        seed=11,
    )


@pytest.fixture(scope="module")
def batches(digits: Path, module: LitGenerator) -> list[PackedBatch]:
    data = make_data(digits, module)
    return [*itertools.islice(data.train_dataloader(), 4)]


def chosen(batch: PackedBatch, rows: list[int]) -> Any:
    """Some documents of a pack of clips, in this order."""
    return {
        **batch,
        "grids": [batch["grids"][i] for i in rows],
        "clips": [batch["clips"][i] for i in rows],
        "keys": [batch["keys"][i] for i in rows],
        "sources": [batch["sources"][i] for i in rows],
        "captions": [batch["captions"][i] for i in rows],
        "sample_index": batch["sample_index"][rows],
    }


def split_maps(values: Tensor, grids: Any) -> list[Tensor]:
    return list(values.split([f * h * w for f, h, w in grids]))


# --- documents ------------------------------------------------------------------------------------


def test_packs_mix_sizes_and_keep_to_the_budget(batches, module):
    for batch in batches:
        work = module.work_of(batch)
        assert work.samples == len(batch["keys"]) == batch["step_samples"]
        assert work.capacity == BUDGET
        assert 0.8 * BUDGET < work.tokens <= BUDGET
        shapes = {tuple(clip.shape[1:]) for clip in batch["clips"]}
        assert len(shapes) > 1
    assert shapes | {(5, 16, 16)} == {(5, 16, 16), (1, 16, 16), (1, 32, 32)}


def test_the_work_counts_what_the_network_reads(batches, module):
    corrupted = corrupt_pack(module, batches[0])
    tokens = len(corrupted.maps.codes) + len(corrupted.maps.grids)
    captions = sum(module.text_lengths(batches[0]["captions"]))
    assert module.work_of(batches[0]).tokens == tokens + captions


def test_the_noise_of_a_document_depends_on_its_number_alone(batches, module):
    """It is that of a batch of one size, and does not change with the neighbours."""
    batch = batches[0]
    rows = range(len(batch["keys"]))
    whole = corrupt_pack(module, batch)
    maps = split_maps(whole.maps.codes, whole.maps.grids)
    for row in rows:
        alone = corrupt_pack(module, chosen(batch, [row]))
        assert torch.equal(alone.maps.codes, maps[row])
        assert alone.t[0] == whole.t[row]
    backwards = [*rows][::-1]
    other = corrupt_pack(module, chosen(batch, backwards))
    moved = split_maps(other.maps.codes, other.maps.grids)
    assert all(torch.equal(moved[i], maps[row]) for i, row in enumerate(backwards))


def test_the_noise_is_that_of_a_batch_of_one_size(batches, tokenizer_run):
    module = build(tokenizer_run, corruption=CorruptionConfig(condition_dropout=0.0), seed=11)
    asked: list[Any] = []
    forward = module.generator.forward
    module.generator.forward = lambda *args: asked.append(args) or forward(*args)  # type: ignore[method-assign]
    for batch in batches[:2]:
        packed = corrupt_pack(module, batch)
        maps = split_maps(packed.maps.codes, packed.maps.grids)
        for row, clip in enumerate(batch["clips"]):
            index = batch["sample_index"][row][None]
            captions = {"captions": [batch["captions"][row]]}
            module._predict(module.tokenize(clip[None]), index, captions, 0.0)
            x_t, t, _ = asked[-1]
            assert torch.equal(maps[row], x_t[0].flatten(1).T)
            assert packed.t[row] == t[0]


def test_some_clips_are_given_their_first_frame_and_no_picture_is(batches, module):
    given = []
    for batch in batches:
        corrupted = corrupt_pack(module, batch)
        truth = split_maps(pack_elements(module, batch)[0], corrupted.maps.grids)
        maps = split_maps(corrupted.maps.codes, corrupted.maps.grids)
        sizes = torch.bincount(corrupted.document, minlength=len(maps)).tolist()
        u = counter_uniform(
            batch["sample_index"], seed=11, step=0, stream=Stream.FIRST_FRAME, shape=()
        )
        for row, (frames, h, w) in enumerate(corrupted.maps.grids):
            has = corrupted.maps.has_first_frame[row]
            assert has == (frames > 1 and bool(u[row] < 0.5))
            assert sizes[row] == (frames - has) * h * w
            if has:
                assert torch.equal(maps[row][: h * w], truth[row][: h * w])
            given.append((frames > 1, has))
    assert {(True, True), (True, False), (False, False)} == set(given)


def test_captions_are_dropped_as_in_a_batch(batches, module):
    batch = batches[0]
    u = counter_uniform(batch["sample_index"], seed=11, step=0, stream=Stream.DROP, shape=())
    kept = ["" if drop else text for text, drop in zip(batch["captions"], u < 0.4, strict=True)]
    assert "" in kept
    assert kept != [""] * len(kept)
    expected = pack_text(*module.condition({"captions": kept}))
    text = corrupt_pack(module, batch).text
    torch.testing.assert_close(text.embeds, expected.embeds)
    assert text.lengths == expected.lengths


@torch.no_grad()
def test_cached_features_give_the_same_text(batches, module):
    batch = batches[0]
    dropped = torch.arange(len(batch["keys"])) % 3 == 1
    expected = pack_condition(module, batch, dropped)
    full = module.condition({"captions": batch["captions"]})
    assert isinstance(full, TextCondition)
    packed = pack_text(*full)
    cached: Any = {
        **batch,
        "text_embeds": packed.embeds,
        "text_positions": packed.positions,
        "text_lengths": list(packed.lengths),
    }
    for mask in (dropped, torch.zeros_like(dropped)):
        found = pack_condition(module, cached, mask)
        expected = pack_condition(module, batch, mask)
        torch.testing.assert_close(found.embeds, expected.embeds)
        assert torch.equal(found.positions, expected.positions)
        assert found.lengths == expected.lengths


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "power"), [("uniform", 1.0), ("sqrt", 0.5), ("document", 0.0)])
def test_the_loss_is_the_weighted_mean_of_those_of_the_documents(
    batches, tokenizer_run, kind, power
):
    settings = {"corruption": CorruptionConfig(i2v_ratio=0.5), "seed": 11}
    module = build(tokenizer_run, loss_weights=kind, **settings)
    batch = batches[1]
    sizes = torch.bincount(corrupt_pack(module, batch).document).float()
    assert len(set(sizes.tolist())) > 2
    with torch.no_grad():
        losses = [pack_step(module, chosen(batch, [row])).loss for row in range(len(batch["keys"]))]
        weights = sizes**power
        expected = (weights * torch.stack(losses)).sum() / weights.sum()
        torch.testing.assert_close(pack_step(module, batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_the_mean_over_devices_counts_a_document_the_same_wherever_it_is(batches, module):
    batch = batches[1]
    number = len(batch["keys"])
    parts = [[*range(2)], [*range(2, number)]]
    with torch.no_grad():
        whole = pack_step(module, batch).loss
        totals = [
            document_weights(
                torch.bincount(corrupt_pack(module, chosen(batch, rows)).document), "sqrt"
            ).sum()
            for rows in parts
        ]
        weight = torch.stack(totals).sum()
        patched = two_devices(lambda v: torch.stack([weight.double(), 2 * v[1], 2 * v[2]]))
        before, module._trainer = module._trainer, patched
        results = [pack_step(module, chosen(batch, rows)) for rows in parts]
        module._trainer = before
        alone = [pack_step(module, chosen(batch, rows)).loss for rows in parts]
    shares = torch.stack([result.loss for result in results])
    torch.testing.assert_close(shares.mean(), whole, rtol=1e-5, atol=1e-6)
    # What is logged is a mean over documents, however many the other device has.
    own = torch.stack([result.own_loss for result in results])
    torch.testing.assert_close(own, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert ((shares - own).abs() > 0.1 * own).all()


def two_devices(total: Any) -> Any:
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: total(value))
    return SimpleNamespace(strategy=strategy, world_size=2)


def test_devices_that_have_cut_different_packs_stop(batches, module, monkeypatch):
    batch = batches[1]
    other = batch["step_mark"] + 1.0

    def add(mine: Tensor) -> Tensor:
        return mine + torch.tensor([1.0, other, other**2])

    monkeypatch.setattr(module, "_trainer", two_devices(add))
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match="the 2 devices have cut different packs .* resume from the last"
        ),
    ):
        pack_step(module, batch)


def test_what_is_logged_is_the_mean_of_a_devices_own_documents(batches, module, monkeypatch):
    batch, found = batches[1], {}
    double = two_devices(lambda v: torch.stack([9 * v[0], 2 * v[1], 2 * v[2]]))
    with torch.no_grad():
        expected = pack_step(module, batch).loss
        monkeypatch.setattr(module, "_trainer", double)
        monkeypatch.setattr(module, "log", lambda name, value, **rest: found.update({name: value}))
        monkeypatch.setattr(type(module), "is_logging_step", False)
        module.training_step(batch, 0)
    torch.testing.assert_close(found["train/loss"], expected)


# --- codes ----------------------------------------------------------------------------------------


def test_cached_codes_are_packed_as_their_clips_are(digits, tokenizer_run, module, tmp_path):
    """The elements of a document are the same, from pixels, from memory and from a cache."""
    folders = {}
    for name in ("clips", "images"):
        folders[name] = str(tmp_path / name)
        encode(digits / name, tokenizer=tokenizer_run, out=tmp_path / name, image_size=16)
    sources = packed_sources(digits)[:3]
    pixels = make_data(digits, module, sources=sources)
    coded = make_data(
        digits,
        module,
        sources=[{**s, "path": folders[Path(s["path"]).name], "split_val": None} for s in sources],
    )
    remembering = build(tokenizer_run, cache_codes=True)
    for first, second in itertools.islice(
        zip(pixels.train_dataloader(), coded.train_dataloader(), strict=True), 3
    ):
        assert first["keys"] == second["keys"]
        expected, grids = pack_elements(module, first)
        found, same = pack_elements(module, second)
        assert grids == same == second["grids"]
        assert torch.equal(found, expected)
        for _ in range(2):
            assert torch.equal(pack_elements(remembering, first)[0], expected)
    assert len(remembering._codes) > 0
    foreign: Any = {**second, "tokenizer_hash": "0" * 16}
    with pytest.raises(ValueError, match="the cache was made by tokenizer 0000000000000000"):
        pack_elements(module, foreign)


# --- order ----------------------------------------------------------------------------------------


def keys_of(data: PackedShardData, steps: int) -> list[list[str]]:
    return [batch["keys"] for batch in itertools.islice(data.train_dataloader(), steps)]


def stand_at(data: PackedShardData, steps: int) -> None:
    """Give data a trainer that has taken so many steps."""
    total = SimpleNamespace(processed=steps)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    data.trainer = SimpleNamespace(fit_loop=loop)  # type: ignore[assignment]


def test_a_restored_position_goes_on_with_other_ranks(digits, module, monkeypatch):
    whole = keys_of(make_data(digits, module), 12)
    data = make_data(digits, module)
    order = data._packed_order()
    data._order = order  # type: ignore[assignment]
    data._position = order.advance(order.start(), 6)  # type: ignore[assignment]
    stand_at(data, 6)
    state = data.state_dict()
    assert state["samples_seen"] == sum(map(len, whole[:6]))
    for num_ranks in (1, 2, 3):
        rest: list[Any] = []
        for rank in range(num_ranks):
            one = make_data(digits, module)
            monkeypatch.setattr(one, "_rank_and_number", lambda r=rank, n=num_ranks: (r, n))
            one.load_state_dict(state)
            monkeypatch.setattr(PackedShardData, "position", lambda self: self._position)
            rest.append(keys_of(one, 6 // num_ranks))
            monkeypatch.undo()
        assert [keys for step in zip(*rest, strict=True) for keys in step] == whole[6:]


def test_the_planned_documents_of_a_step_are_about_those_that_come(digits, module):
    data = make_data(digits, module)
    counts = [len(keys) for keys in keys_of(data, 32)]
    assert data.samples_per_step(1) == sum(counts) / 32
    assert data.samples_per_step(3) == 3 * sum(counts) / 32


def test_long_documents_are_counted_by_source(digits, module):
    data = make_data(digits, module, token_budget=21, max_left_out=1.0)
    with pytest.warns(UserWarning, match=r"left out, \d+ of \d+ documents so far: .*large|images"):
        keys_of(data, 24)
    stand_at(data, 23)
    left = data.left_out
    assert left["large"] > 0
    assert left["clips"] == left["short"] == left["images"] == 0


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": {"0.1M": 1.0}}, "unknown `presets` 0.1M; known are 0.06M"),
        ({"presets": {}}, "`presets` must hold at least one"),
        ({"presets": {"0.06M": 0.0}}, "positive weights"),
        ({"presets": {"0.06M": 1.0}, "image_size": 32}, "exclude one another"),
        ({"allow_shorter": True}, "`allow_shorter` is for videos"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PackedSource(path="x", batch_size=1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_budget": 2}, "`token_budget` must be at least 3, got 2"),
        ({"look_ahead": 0}, "`look_ahead` must be at least 1"),
        ({"max_left_out": 2.0}, r"`max_left_out` must be in \[0, 1\]"),
        ({"with_captions": False}, "set `with_captions` or `with_text_features`"),
    ],
)
def test_data_that_cannot_be_meant_are_refused(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(digits, None, **settings)


def test_packs_need_a_stage_that_measures(digits):
    data = make_data(digits, None)
    with pytest.raises(ValueError, match="packs are for text-conditional generators"):
        data.train_dataloader()


def test_settings_of_the_stage_are_checked(tokenizer_run):
    for name, value, known in (
        ("loss_weights", "tokens", "uniform, sqrt, document"),
        ("attention_backend", "fast", "auto, flex, documents, dense"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be one of {known}, got '{value}'"):
            build(tokenizer_run, **{name: value})
    with pytest.raises(ValueError, match=r"`i2v_ratio` must be in \[0, 1\], got 1.5"):
        CorruptionConfig(i2v_ratio=1.5)


# --- runs -----------------------------------------------------------------------------------------


def packed_config(folder: Path, digits: Path, tokenizer: Path, **trainer: Any) -> dict[str, Any]:
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind="text",
        sources=packed_sources(digits),
        init_args={
            "corruption": {"condition_dropout": 0.1, "i2v_ratio": 0.3, "time_mean": 0.0},
            "cache_codes": True,
            "loss_weights": "sqrt",
        },
        callbacks=[callback("EMA", decay=0.9), checkpoints(folder, 4)],
        trainer=trainer,
    )
    config["data"]["class_path"] = "grn_lightning.lit.packed.PackedShardData"
    config["data"]["init_args"]["token_budget"] = BUDGET
    return config


@pytest.mark.scale
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_packed_run_is_the_run_that_never_stopped(
    digits, tokenizer_run, tmp_path, capsys
):
    straight, first, second = (tmp_path / name for name in ("straight", "first", "second"))
    fit(straight, packed_config(straight, digits, tokenizer_run, max_steps=8))
    fit(first, packed_config(first, digits, tokenizer_run, max_steps=4))
    last = first / "checkpoints" / "last.ckpt"
    config = packed_config(second, digits, tokenizer_run, max_steps=8)
    fit(second, config, f"--ckpt_path={last}")
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (straight, second)]
    assert ends[0]["samples_seen"] == ends[1]["samples_seen"]
    assert tensors_equal(ends[0]["state_dict"], ends[1]["state_dict"])
    states = [end["PackedShardData"] for end in ends]
    assert states[0] == states[1]
    assert states[0]["samples_seen"] == ends[0]["samples_seen"]
    assert states[0]["packs"]["waiting"]
    losses = [logged(folder, "train/loss") for folder in (straight, second)]
    assert losses[1] == {step: x for step, x in losses[0].items() if step >= 4}
    plain = generator_config(tmp_path / "plain", digits, tokenizer_run, kind="text")
    with pytest.raises((ValueError, SystemExit)):
        fit(tmp_path / "plain", plain, f"--ckpt_path={last}")
    assert "trained on packs, and batches cannot go on" in capsys.readouterr().err


@pytest.mark.scale
def test_a_packed_run_learns(digits, tokenizer_run, tmp_path):
    config = packed_config(tmp_path, digits, tokenizer_run, max_steps=40)
    config["trainer"]["callbacks"] = [callback("Preflight")]
    fit(tmp_path, config)
    losses = [float(x) for x in logged(tmp_path, "train/loss").values()]
    assert sum(losses[-8:]) / 8 < 0.9 * sum(losses[:4]) / 4


def test_packs_go_on_from_packs_only(digits, module):
    data = make_data(digits, module)
    packs = {"PackedShardData": {"seed": 0, "sources": {}, "packs": {}}}
    plain = {"ShardData": {"seed": 0, "sources": {}}}
    refuse_other_kind(packs, data)
    refuse_other_kind({"state_dict": {}}, data)
    refuse_other_kind(packs, None)
    with pytest.raises(ValueError, match=r"batches of one size, and packs .* `.*data\.ShardData`"):
        refuse_other_kind(plain, data)
    batches = ShardData([source(digits, "image", 4)], image_size=16)  # type: ignore[list-item]
    refuse_other_kind(plain, batches)
    with pytest.raises(ValueError, match=r"on packs, and batches .*packed\.PackedShardData"):
        refuse_other_kind(packs, batches)


def test_a_run_of_batches_does_not_go_on_with_packs(
    digits, tokenizer_run, generator_runs, tmp_path, capsys
):
    last = generator_runs["text"] / "checkpoints" / "last.ckpt"
    config = packed_config(tmp_path, digits, tokenizer_run, max_steps=8)
    with pytest.raises((ValueError, SystemExit)):
        fit(tmp_path, config, f"--ckpt_path={last}")
    assert "trained on batches of one size, and packs cannot" in capsys.readouterr().err


def test_what_needs_packs_is_refused_without_them(digits, tokenizer_run, tmp_path, capsys):
    plain = generator_config(
        tmp_path / "plain",
        digits,
        tokenizer_run,
        kind="text",
        init_args={"corruption": {"i2v_ratio": 0.5}},
    )
    with pytest.raises(SystemExit):
        fit(tmp_path / "plain", plain)
    assert "`corruption.i2v_ratio` needs packs" in capsys.readouterr().err
    packed = packed_config(tmp_path / "class", digits, tokenizer_run)
    classes = generator_config(tmp_path / "class", digits, tokenizer_run, kind="class")
    packed["model"] = classes["model"]
    with pytest.raises(SystemExit):
        fit(tmp_path / "class", packed)
    assert "packs are for text-conditional generators" in capsys.readouterr().err
