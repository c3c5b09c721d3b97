"""The data module: the same batches for any number of workers, bad files by name, mistakes before training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.images import BadFile
from visiontasks.data.module import DataModule, collate
from visiontasks.data.source import Source


class Noise:
    """Noise images of one size with every annotation; the positions in `bad` cannot be read."""

    def __init__(self, size: int, *, bad: frozenset[int] = frozenset()) -> None:
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"noise/{index}"

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadFile(self.name(index), "is bad")
        generator = np.random.default_rng(index)
        return Sample(
            image=generator.integers(0, 256, (16, 16, 3)).astype(np.uint8),
            label=index % 2,
            mask=generator.integers(0, 2, (16, 16)).astype(np.uint8),
            bboxes=np.array([[2, 3, 9, 12]] * (index % 3), np.float32).reshape(-1, 4),
            labels=np.zeros(index % 3, np.int64),
            masks=np.ones((index % 3, 16, 16), np.uint8),
        )


class NoiseData(DataModule):
    """24 images to train on, 5 and 7 to evaluate."""

    provides = frozenset({"label", "mask", "masks", "bboxes", "labels"})

    def __init__(self, *, bad: frozenset[int] = frozenset(), train_size: int = 24, **options: Any) -> None:
        super().__init__(**{"image_size": 16, "batch_size": 4, **options})
        self.bad = bad
        self.train_size = train_size

    def source(self, split: str) -> Source:
        return Noise({"train": self.train_size, "val": 5, "test": 7}[split], bad=self.bad)

    def read_classes(self) -> tuple[str, ...]:
        return ("even", "odd")


def labelled(**options: Any) -> NoiseData:
    data = NoiseData(**options)
    data.select(frozenset({"label"}))
    return data


def seen(loader: DataLoader[Any], epochs: int = 2) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    batches = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += [(tuple(batch["index"].tolist()), batch["image"].clone()) for batch in loader]
    return batches


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_are_the_same_for_any_workers(workers: int, persistent: bool) -> None:
    expected = seen(labelled(num_workers=0).train_dataloader())
    made = labelled(num_workers=workers).train_dataloader()
    loader = DataLoader(
        made.dataset,
        batch_size=made.batch_size,
        sampler=made.sampler,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=persistent,
    )
    found = seen(loader)
    assert [indices for indices, _ in found] == [indices for indices, _ in expected]
    assert all(torch.equal(left, right) for (_, left), (_, right) in zip(found, expected, strict=True))


def test_no_two_draws_are_alike() -> None:
    class Same(Noise):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(1)

    data = labelled(num_workers=2)
    data.source = lambda _: Same(24)  # type: ignore[method-assign, assignment]
    images = [image.numpy().tobytes() for _, batch in seen(data.train_dataloader(), epochs=3) for image in batch]
    assert len(set(images)) == len(images) == 72


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    seen(labelled().train_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_ranks_see_the_global_batches() -> None:
    def on(rank: int, world: int, batch_size: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        data = labelled(batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank, lightning_module=None)  # type: ignore[assignment]
        return seen(data.train_dataloader())

    whole = on(0, 1, 8)
    for (_, one), (_, other), (indices, together) in zip(on(0, 2, 4), on(1, 2, 4), whole, strict=True):
        interleaved = torch.stack([one, other], 1).flatten(0, 1)
        assert len(indices) == 8
        assert torch.equal(interleaved, together)


def test_a_batch_has_the_shapes_and_types_of_the_contract() -> None:
    data = NoiseData()
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].tolist() == [0, 1, 0, 1]
    assert batch["label"].dtype == torch.int64
    assert batch["mask"].shape == (4, 16, 16)
    assert batch["mask"].dtype == torch.uint8
    assert [tuple(boxes.shape) for boxes in batch["bboxes"]] == [(0, 4), (1, 4), (2, 4), (0, 4)]
    assert [tuple(masks.shape) for masks in batch["masks"]] == [(0, 16, 16), (1, 16, 16), (2, 16, 16), (0, 16, 16)]
    assert [labels.dtype for labels in batch["labels"]] == [torch.int64] * 4
    assert batch["bboxes"][1].tolist() == [[2, 3, 9, 12]]
    assert "bad" not in batch
    np.testing.assert_array_equal(batch["image"][2].permute(1, 2, 0), Noise(5)[2]["image"])


def test_many_hot_labels_are_stacked() -> None:
    samples = [Sample(image=np.zeros((2, 2, 3), np.uint8), label=np.eye(3, dtype=np.float32)[row]) for row in (0, 2)]
    assert collate([*samples])["label"].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_holds_every_sample_once(split: str) -> None:
    data = labelled()
    batches = seen(getattr(data, f"{split}_dataloader")(), epochs=1)
    assert sum((indices for indices, _ in batches), ()) == tuple(range(data.sizes()[split]))


def test_selected_annotations_alone_are_in_the_batch() -> None:
    data = NoiseData()
    data.setup()
    data.select(frozenset({"mask"}))
    assert next(iter(data.train_dataloader())).keys() == {"image", "index", "mask"}
    data.select(frozenset())
    assert next(iter(data.train_dataloader())).keys() == {"image", "index"}


def test_setup_selects_what_the_task_of_the_trainer_needs() -> None:
    data = NoiseData()
    task = SimpleNamespace(needs=frozenset({"label"}))
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=task)  # type: ignore[assignment]
    data.setup("fit")
    assert data.keys == {"label"}
    assert data.classes == ("even", "odd")


def test_what_the_data_lack_is_said_with_the_data_that_have_it() -> None:
    from visiontasks.data import MNIST, DigitScenes

    with pytest.raises(UsageError, match=r"needs mask and mnist provides label: .*data=digit_scenes"):
        MNIST().select(frozenset({"mask"}))
    with pytest.raises(UsageError, match=r"data\.digits=\[1,1\] or data\.multi_label=true or .*data=cifar10"):
        DigitScenes().select(frozenset({"label"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_size": 0}, "has no train images"),
        ({"batch_size": 25}, r"does not fit into 24 training images: type data.batch_size=24"),
        ({"batch_size": 0}, "is no batch"),
        ({"read_classes": lambda: ()}, "names no classes"),
        ({"provides": frozenset({"weather"})}, r"noise/0 has no weather"),
        ({"source": lambda _: WrongImages(24)}, r"image as float64 of shape \(4, 4, 3\): it takes uint8"),
    ],
)
def test_mistakes_are_found_before_training(change: dict[str, Any], message: str) -> None:
    data = NoiseData()
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises(UsageError, match=message):
        data.setup()


class WrongImages(Noise):
    def __getitem__(self, index: int) -> Sample:
        return {**super().__getitem__(index), "image": np.zeros((4, 4, 3))}  # type: ignore[typeddict-item]


class Watch(LightningModule):
    """Trains nothing, and notes which samples arrive."""

    needs = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.indices: list[int] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.indices += batch["index"].tolist()
        return self.weight * len(batch["image"])

    def validation_step(self, batch: Any, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: DataModule, folder: Path, **options: Any) -> Watch:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    watch = Watch()
    Trainer(accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **quiet, **options).fit(watch, data)
    return watch


def test_lightning_keeps_our_sampler_and_moves_its_epochs(tmp_path: Path) -> None:
    watch = fit(NoiseData(), tmp_path, max_epochs=2)
    data = labelled()
    expected = [index for indices, _ in seen(data.train_dataloader()) for index in indices]
    assert watch.indices == expected


@pytest.mark.parametrize("cache", [None, "ram"])
def test_the_first_bad_file_stops_training_by_default(tmp_path: Path, cache: Any) -> None:
    with pytest.raises(
        UsageError, match=r"1 of 24 train files are bad: noise/7 is bad\. .* data.max_bad_fraction=0.0417"
    ):
        fit(NoiseData(bad=frozenset({7}), cache=cache), tmp_path, max_epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_within_bounds_are_left_out_and_named(tmp_path: Path, workers: int) -> None:
    data = NoiseData(bad=frozenset({3, 7}), max_bad_fraction=0.25, num_workers=workers)
    watch = fit(data, tmp_path, max_epochs=1)
    assert data.bad_files == {"noise/3": "is bad", "noise/7": "is bad"}
    assert sorted(watch.indices) == [index for index in range(24) if index not in (3, 7)]


def test_more_bad_files_than_allowed_stop_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 of 24 train files are bad"):
        fit(NoiseData(bad=frozenset({1, 2, 3}), max_bad_fraction=0.1), tmp_path, max_epochs=1)


def test_a_batch_with_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="All 2 files of a batch are bad, among them noise/"):
        fit(NoiseData(batch_size=2, bad=frozenset(range(1, 24)), max_bad_fraction=1.0), tmp_path, max_epochs=1)


def test_an_evaluation_batch_with_nothing_left_is_passed_over(tmp_path: Path) -> None:
    data = NoiseData(bad=frozenset({4}), max_bad_fraction=0.2)  # of 5 validation images the last, alone in its batch
    fit(data, tmp_path, max_epochs=1)
    assert data.bad_files == {"noise/4": "is bad"}


def test_any_source_can_be_predicted_without_training_data() -> None:
    data = NoiseData(train_size=0)
    batches = list(data.loader(Noise(6, bad=frozenset({1}))))
    assert [batch["index"].tolist() for batch in batches] == [[0, 2, 3], [4, 5]]
    assert batches[0]["bad"] == [("predict", "noise/1", "is bad")]
