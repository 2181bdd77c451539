"""The data of a run do not depend on ranks, workers or interruptions."""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from grn_lightning.lit.data import LoaderConfig, ShardData, ShardSource
from tests.shard_files import image_sample, numbers_in, video_sample, write_split

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # more than a test affords
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),  # Python 3.12; no deadlock
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning 2.6 on torch 2.15
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),  # as when resuming
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eleven pictures to train on, seven to validate."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    write_split(folder, "train", [image_sample(i) for i in range(11)], shard_size=3)
    write_split(folder, "val", [image_sample(i) for i in range(100, 107)])
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Five films to train on, three to validate."""
    folder = tmp_path_factory.mktemp("shards") / "films"
    write_split(folder, "train", [video_sample(i) for i in range(5)], shard_size=2)
    write_split(folder, "val", [video_sample(i) for i in range(50, 53)])
    return folder


def image_data(folder: Path, *, batch_size: int = 2, seed: int = 0, **loader: Any) -> ShardData:
    return ShardData(
        [ShardSource(path=str(folder), batch_size=batch_size, horizontal_flip=True)],
        image_size=8,
        num_classes=10,
        with_classes=True,
        with_captions=True,
        seed=seed,
        loader=LoaderConfig(**loader),
    )


def joint_data(
    images: Path, films: Path, *, weights: tuple[float, float] = (3, 1), **loader: Any
) -> ShardData:
    image_source = ShardSource(path=str(images), batch_size=4, weight=weights[0], image_size=8)
    film_source = ShardSource(
        path=str(films), batch_size=2, weight=weights[1], media="video", num_frames=3, fps=8
    )
    return ShardData(
        [image_source, film_source],
        image_size=16,
        with_captions=True,
        loader=LoaderConfig(**loader),
    )


def on_rank(data: ShardData, rank: int, num_ranks: int) -> ShardData:
    """Let the data module believe in a trainer of several processes."""
    total = SimpleNamespace(processed=0)
    epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(total=total))
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": num_ranks},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        world_size=num_ranks,
        overfit_batches=0,
    )
    return data


def first_batches(data: ShardData, count: int) -> list[dict[str, Any]]:
    data.setup("fit")
    return list(islice(data.train_dataloader(), count))


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.equal(theirs[name]), name
            else:
                assert value == theirs[name], name


def glue(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Join what the ranks read in one step."""
    joined = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: torch.cat(v) if isinstance(v[0], torch.Tensor) else [x for part in v for x in part]
        for name, v in joined.items()
    }


# --- batches --------------------------------------------------------------------------------------


def test_an_image_batch_is_a_clip_of_one_frame(images):
    batch = first_batches(image_data(images, batch_size=3), 1)[0]
    assert batch["clips"].shape == (3, 3, 1, 8, 8)
    assert batch["clips"].aminmax() == (-1, 1)
    assert batch["sample_index"].tolist() == [0, 1, 2]
    numbers = numbers_in(batch["clips"])
    assert batch["class_labels"].tolist() == [n % 10 for n in numbers]
    assert batch["captions"] == [f"picture {n}" for n in numbers]


def test_an_epoch_holds_every_sample_once(images):
    numbers = [n for b in first_batches(image_data(images, batch_size=11), 3)
               for n in numbers_in(b["clips"])]  # fmt: skip
    assert [sorted(numbers[i : i + 11]) for i in (0, 11, 22)] == [list(range(11))] * 3
    assert numbers[:11] != numbers[11:22]


@pytest.mark.parametrize(
    ("num_ranks", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2)], ids=str
)
def test_ranks_and_workers_do_not_change_the_data(images, num_ranks, num_workers):
    alone = first_batches(image_data(images, batch_size=6), 5)
    ranks = [
        first_batches(
            on_rank(
                image_data(
                    images,
                    batch_size=6 // num_ranks,
                    num_workers=num_workers,
                    multiprocessing_context="fork" if num_workers else None,
                ),
                rank,
                num_ranks,
            ),
            5,
        )
        for rank in range(num_ranks)
    ]
    assert_same([glue(parts) for parts in zip(*ranks, strict=True)], alone)


def test_spawned_workers_and_a_warm_cache_do_not_change_the_data(images):
    data = image_data(
        images, num_workers=1, multiprocessing_context="spawn", cache_decoded=True
    )  # fmt: skip
    first_batches(data, 0)
    data._readers["train"][0].read(0, number=0)  # files are open when the worker starts
    assert_same(list(islice(data.train_dataloader(), 12)), first_batches(image_data(images), 12))


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)], ids=str)
def test_validation_reads_everything_once(images, films, num_ranks, num_workers):
    seen: list[str] = []
    shapes = []
    for rank in range(num_ranks):
        data = on_rank(joint_data(images, films, num_workers=num_workers), rank, num_ranks)
        data.setup("validate")
        batches = list(data.val_dataloader())
        shapes.append([tuple(batch["clips"].shape) for batch in batches])
        for batch in batches:
            weights = batch["weights"].tolist()
            seen += [key for key, w in zip(batch["captions"], weights, strict=True) if w]
    assert sorted(seen) == sorted(
        [f"picture {i}" for i in range(100, 107)] + [f"film {i}" for i in range(50, 53)]
    )
    assert all(shape == shapes[0] for shape in shapes)


def test_validation_does_not_augment(images, films):
    flipped = image_data(images)
    source = ShardSource(
        path=str(films), batch_size=3, media="video", num_frames=3, random_window=True
    )
    for data in (flipped, ShardData([source], image_size=16)):
        data.setup("validate")
        clips = torch.cat([batch["clips"] for batch in data.val_dataloader()])
        assert (clips[:, 1, 0, 0, 0] == -1).all()  # not mirrored
        assert sorted(numbers_in(clips)) in ([*range(100, 107)], [50, 51, 52])  # first frames


def test_a_source_need_not_have_validation(images):
    source = ShardSource(path=str(images), batch_size=1, split_val=None)
    data = ShardData([source], image_size=8)
    data.setup()
    assert data.val_dataloader() == []


# --- several sources ------------------------------------------------------------------------------


def test_a_step_takes_one_source_and_sources_take_turns(images, films):
    batches = first_batches(joint_data(images, films), 40)
    shapes = [tuple(batch["clips"].shape) for batch in batches]
    assert set(shapes) == {(4, 3, 1, 8, 8), (2, 3, 3, 16, 16)}
    for end in range(1, 41):
        assert abs(shapes[:end].count((4, 3, 1, 8, 8)) - 0.75 * end) <= 1
    numbers = torch.cat([batch["sample_index"] for batch in batches])
    assert numbers.equal(torch.arange(len(numbers)))


# --- training and resuming ------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Trains one number on the brightness and remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Any]] = []
        self.num_validated = 0.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return (self.level - batch["clips"][:, 0].mean()) ** 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.num_validated += float(batch["weights"].sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def trainer(folder: Path, *, max_steps: int, **options: Any) -> L.Trainer:
    saver = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    defaults = {
        "callbacks": [saver],
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **(defaults | options),
    )


def fit(folder: Path, data: ShardData, *, max_steps: int, ckpt_path: Path | None = None,
        **options: Any) -> Recorder:  # fmt: skip
    module = Recorder()
    trainer(folder, max_steps=max_steps, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["images", "joint"])
def test_a_resumed_run_is_the_run_that_never_stopped(images, films, tmp_path, kind, num_workers):
    def data() -> ShardData:
        if kind == "images":
            return image_data(images, batch_size=4, num_workers=num_workers)
        return joint_data(images, films, num_workers=num_workers)

    whole = fit(tmp_path / "whole", data(), max_steps=11)
    fit(tmp_path, data(), max_steps=8)  # two steps after the file of step 6
    rest = fit(tmp_path, data(), max_steps=11, ckpt_path=tmp_path / "step=6.ckpt")
    assert_same(rest.batches, whole.batches[6:])
    assert rest.level.equal(whole.level)
    assert whole.num_validated == 2 * (7 if kind == "images" else 10)


def test_cut_epochs_go_on_with_unseen_samples(images, tmp_path):
    """A limit on batches makes epochs; none of them starts over, resumed or not."""
    options = {"limit_train_batches": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    file = tmp_path / "step=3.ckpt"
    short = fit(tmp_path, image_data(images), max_steps=5, **options)
    rest = fit(tmp_path, image_data(images), max_steps=9, ckpt_path=file, **options)
    expected = first_batches(image_data(images), 9)
    assert_same(short.batches, expected[:5])
    assert_same(rest.batches, expected[3:])


def test_fitting_on_continues_and_a_new_trainer_starts_over(images, tmp_path):
    data, module = image_data(images), Recorder()
    first = trainer(tmp_path, max_steps=3)
    first.fit(module, data)
    first.fit_loop.epoch_loop.max_steps = 5
    first.fit(module, data)
    assert data.samples_seen == 10
    trainer(tmp_path, max_steps=2).fit(module, data)
    expected = first_batches(image_data(images), 5)
    assert_same(module.batches, [*expected, *expected[:2]])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_devices_or_batch_size_goes_on_where_it_stopped(images, num_ranks):
    before = on_rank(image_data(images, batch_size=2), 0, 2)
    first_batches(before, 1)
    before.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 4  # 16 samples
    ranks = []
    for rank in range(num_ranks):
        after = on_rank(image_data(images, batch_size=5), rank, num_ranks)
        after.load_state_dict(before.state_dict())
        after.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 4
        ranks.append(first_batches(after, 3))
        assert after.samples_seen == 16
    single = glue(tuple(first_batches(image_data(images, batch_size=1), 16 + 3 * 5 * num_ranks)))
    resumed = glue(tuple(glue(parts) for parts in zip(*ranks, strict=True)))
    assert_same([resumed], [{name: value[16:] for name, value in single.items()}])


def test_the_state_is_plain_data(images, films):
    data = on_rank(joint_data(images, films), 0, 2)
    first_batches(data, 1)
    data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 4
    assert json.loads(json.dumps(data.state_dict())) == {
        "seed": 0,
        "samples_seen": 3 * 4 * 2 + 1 * 2 * 2,
        "sources": {
            "images": {"samples_seen": 24, "batches": 3, "weight": 3},
            "films": {"samples_seen": 4, "batches": 1, "weight": 1},
        },
    }


def test_a_source_may_join_later(images, films):
    before = on_rank(image_data(images, batch_size=4), 0, 1)
    first_batches(before, 1)
    before.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 100
    after = on_rank(joint_data(images, films, weights=(1, 1)), 0, 1)
    after.load_state_dict(before.state_dict())
    after.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 100
    with pytest.warns(UserWarning, match=r"trained on the sources \['images'\], this run on"):
        batches = first_batches(after, 20)
    assert sum(batch["clips"].shape[2] == 3 for batch in batches) == 10  # no catching up
    assert batches[0]["sample_index"].tolist() == [400, 401, 402, 403]
    position = after.position()
    assert (position.samples, position.num_batches) == ((400, 0), 100)


def test_another_seed_does_not_resume(images):
    before, after = image_data(images), image_data(images, seed=1)
    first_batches(before, 1)
    after.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="data seed 0, got 1: resume with `seed: 0`"):
        first_batches(after, 1)


# --- settings -------------------------------------------------------------------------------------


def test_four_samples_can_be_overfitted(images):
    source = ShardSource(path=str(images), batch_size=4, max_samples=4)
    batches = first_batches(ShardData([source], image_size=8), 3)
    assert all(sorted(numbers_in(batch["clips"])) == [0, 1, 2, 3] for batch in batches)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"overfit_batches": 2}, "max_samples"),
        (
            {"_accelerator_connector": SimpleNamespace(use_distributed_sampler=True)},
            "use_distributed_sampler` must be false",
        ),
    ],
)
def test_trainer_settings_that_would_change_the_order_are_refused(images, setting, message):
    data = on_rank(image_data(images), 0, 2)
    vars(data.trainer).update(setting)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_all_wrong_values_of_a_source_are_named_at_once():
    with pytest.raises(
        ValueError, match=r"source 'cats': .*`batch_size`.*; `weight`.*; `num_frames`"
    ):
        ShardSource(path="data/cats", batch_size=0, weight=-1, num_frames=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 9}, "`num_frames` of images must be 1"),
        ({"fps": 8.0}, "are for videos"),
        ({"media": "audio"}, "'image' or 'video', got 'audio'"),
        ({"max_samples": 0}, "`max_samples` must be at least 1"),
    ],
)
def test_what_a_source_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShardSource(path="x", batch_size=1, **options)


def test_missing_data_say_which_source_and_what_to_do(images, tmp_path):
    empty = ShardData([ShardSource(path=str(tmp_path), batch_size=1)], image_size=8)
    with pytest.raises(ValueError, match=r"source '.*': no shards of split 'train'.*make data"):
        empty.setup("fit")
    source = ShardSource(path=str(images), batch_size=1, split_val="test")
    no_test = ShardData([source], image_size=8)
    with pytest.raises(ValueError, match=r"splits there: train, val.*set `split_val: null`"):
        no_test.setup("validate")
    with pytest.raises(ValueError, match=r"'images' in .* have no video .* cls, png, txt"):
        ShardData(
            [ShardSource(path=str(images), batch_size=1, media="video")], image_size=8
        ).setup()


def test_two_sources_need_two_names():
    twins = [ShardSource(path=f"{root}/images", batch_size=1) for root in ("a", "b")]
    with pytest.raises(ValueError, match=r"different `name`s, got \['images', 'images'\]"):
        ShardData(twins, image_size=8)


def test_hyperparameters_are_plain_data_that_build_the_module_again(images, films):
    data = joint_data(images, films, num_workers=1)
    plain = json.loads(json.dumps(dict(data.hparams)))
    assert ShardData(**plain).hparams == data.hparams


# --- configuration --------------------------------------------------------------------------------

YAML = """
data:
  class_path: grn_lightning.lit.data.ShardData
  init_args:
    image_size: [64, 96]
    with_captions: true
    sources:
      - {path: data/pictures, batch_size: 32, weight: 3, split_train: "{00000..00099}.tar"}
      - {path: data/films, media: video, batch_size: 4, num_frames: 17, fps: 8, split_val: null}
    loader: {num_workers: 4, multiprocessing_context: spawn}
"""


def parse(text: str) -> ShardData:
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    return parser.instantiate(parser.parse_string(text)).data


def test_the_module_is_built_from_yaml():
    data = parse(YAML)
    assert data.image_size == (64, 96)
    assert [(s.title, s.batch_size, s.num_frames) for s in data.sources] == [
        ("pictures", 32, 1),
        ("films", 4, 17),
    ]
    assert data.loader == LoaderConfig(num_workers=4, multiprocessing_context="spawn")


@pytest.mark.parametrize("typo", ["batchsize", "num_frame"])
def test_a_misspelt_key_of_a_source_is_an_error(typo):
    with pytest.raises(ArgumentError, match=typo):
        parse(YAML.replace("weight", typo))
