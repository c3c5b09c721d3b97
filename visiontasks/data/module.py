"""The data module: from a source of samples to batches, the same ones for any number of workers and processes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import visiontasks.data as exported
from visiontasks.contracts import Batch, Sample, Transform, UsageError
from visiontasks.data.fraction import share_of
from visiontasks.data.images import BadFile, printable
from visiontasks.data.masks import MaskFiles, Survey, median_frequency, survey
from visiontasks.data.patience import PatientLoader, Reading
from visiontasks.data.sampling import EpochSampler, too_large_a_batch
from visiontasks.data.source import Cached, CacheKind, Source, Subset
from visiontasks.layers.distributed import anywhere, collected, world_size

if TYPE_CHECKING:
    from visiontasks.data.views import MultiView

TransformFactory = Callable[..., Transform]  # called with size= and mirror=, and boxes=True where samples have boxes
Key = tuple[int, int]  # epoch, index
BadEntry = tuple[str, str, str]  # split, name, reason

SPLITS = ("train", "val", "test")
_PER_OBJECT = frozenset({"bboxes", "labels", "masks", "crowd", "area"})
_WITH_BOXES = frozenset({"crowd", "area"})  # what evaluation wants to know of each box, where the data say it
_PIXELS = frozenset({"image", "mask"})
_SHAPES = {"image": 3, "mask": 2, "masks": 3, "bboxes": 2, "labels": 1, "crowd": 1, "area": 1}
_DTYPES = {
    "image": np.uint8,
    "mask": np.uint8,
    "masks": np.uint8,
    "bboxes": np.float32,
    "labels": np.int64,
    "crowd": np.uint8,
    "area": np.float64,
}


class DataModule(LightningDataModule):
    """Files to batches; a subclass says where the samples are (`source`) and what the classes are (`read_classes`).

    A batch is a dict of "image" uint8 (B, 3, H, W) in channels-last memory, "index" (B,), and whichever of these the
    data provide: "label" (B,) int64 or (B, K) float32, "mask" (B, H, W) uint8, and, as lists of one tensor an image,
    "bboxes" (N, 4) float32 xyxy pixels, "labels" (N,) int64, "masks" (N, H, W) uint8, and in evaluation "crowd" (N,)
    uint8 and "area" (N,) float64 where the data know them. Where images differ in size, as an evaluation transform may
    leave them, "image" and "mask" are lists too, of (3, H, W) and (H, W). Each sample's augmentation is a
    function of (seed, epoch, index), its place in the order one of (seed, epoch). Where `train_transform` makes several
    views (visiontasks.data.views), a batch has "views", a list of one uint8 (B, 3, h, w) a view: training batches have
    them and "label" in the place of "image" and the other annotations, those of val and test beside everything else,
    drawn alike in every epoch. Files that cannot be read are the entry "bad", a list of (split, name, reason), until
    on_before_batch_transfer takes it out.

    `image_size` is the side of a square, or height and width. `train_transform` and `eval_transform` are factories,
    called with size= and mirror= (and boxes=True where samples have boxes); None means visiontasks.data.augment's
    crop_and_colour and resize_and_crop. `num_workers=None` means none without a GPU and else up to 8 for each. `cache`
    keeps decoded images in "ram" or on "disk" (see Cached): those of training shrunk to a short side of 8/7 of
    image_size, where they have no boxes and masks; the others as they are. `max_bad_fraction` is the share of a split's
    files that may be bad (left out, and named in `bad_files`) before training stops; with 0 the first one stops it.
    `fraction` is the share of the training images to learn from, see visiontasks.data.fraction.
    `probe_images` is how many training images `probe_dataloader` shows at most.
    A worker that gives no batch for `timeout` seconds is killed, and the file that it hung on named; 0: never.
    Several processes count their bad files together, and stop together: once in trainer.log_every_n_steps training
    batches, and at the end. Where a trainer goes on in the middle of an epoch, the training loader begins with the
    batch that is next, which takes the batch size and number of processes of before.
    """

    provides: frozenset[str] = frozenset()  # the annotations that samples have, in the words of contracts.Sample
    mirror: bool = True  # a mirrored image keeps its meaning
    background: bool = False  # index 0 of a mask is the background, and classes[i] is index i + 1
    classes: tuple[str, ...]
    remedies: ClassVar[Mapping[str, str]] = {}  # annotation not provided -> what to type to have it from these data

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        batch_size: int = 32,
        num_workers: int | None = None,
        train_transform: TransformFactory | None = None,
        eval_transform: TransformFactory | None = None,
        cache: CacheKind | None = None,
        max_bad_fraction: float = 0.0,
        fraction: float = 1.0,
        probe_images: int = 5000,
        timeout: float = 300.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = _side_or_sides(image_size)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.cache = cache
        self.max_bad_fraction = max_bad_fraction
        self.fraction = fraction
        self.probe_images = probe_images
        self.timeout = timeout
        self.seed = seed
        self.test_split = "test"
        self.bad_files: dict[str, str] = {}
        self._bad: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._found: list[BadEntry] = []  # since the processes last told each other
        self._stopped_at: Mapping[str, int] = {"epoch": 0, "batches": 0}
        self._batches = 0  # of training, which this process has seen
        self._needed: frozenset[str] = frozenset()
        self._selected: frozenset[str] | None = None
        self._sources: dict[str, Source] = {}
        self._caches: dict[tuple[str, bool], Source] = {}
        self._surveys: dict[str, Survey] = {}

    def source(self, split: str) -> Source:
        """The decoded samples of "train", "val" or "test", with at least the annotations in `keys`."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its samples are: define source(split)")

    def read_classes(self) -> tuple[str, ...]:
        """The class names, read from the data; () where there are none."""
        raise NotImplementedError(f"{type(self).__name__} does not name its classes: define read_classes()")

    @property
    def keys(self) -> frozenset[str]:
        """The annotations that batches carry: all that are provided, or those that were selected."""
        return self.provides if self._selected is None else self._selected

    @property
    def target_classes(self) -> tuple[str, ...]:
        """What the selected targets index: the classes, in a mask with a background after it."""
        return ("background", *self.classes) if self.background and "mask" in self.keys else self.classes

    def select(self, needs: frozenset[str], wants: frozenset[str] = frozenset(), *, otherwise: str = "") -> None:
        """Keep only these annotations in the samples, so that no work goes into the others.

        What a task `wants` is taken where it is provided, and else done without. Raises UsageError where one that it
        `needs` is not provided, with the data sets that would do, and with what to type `otherwise`.
        """
        missing = needs - self.provides
        if missing:
            raise UsageError(self._mismatch(missing, otherwise))
        selected = needs | wants & self.provides
        if selected != self.keys:
            self._sources.clear()
            self._caches.clear()
            self._surveys.clear()
        self._needed, self._selected = needs, selected

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002, Lightning names the stage
        """Find the data and check them; needs no Trainer, and does nothing the second time.

        Under a Trainer whose task has the attribute `needs`, `select` is called with it, and with its `wants`.
        Where the data are mask files and "mask" is selected, every training and validation mask is looked at (the
        result is kept on disk, see `survey`), so that a wrong one is known before training.
        Raises UsageError where a split is empty, classes are missing, samples are not as promised, the batch size is
        larger than the training data, or bad files are more than max_bad_fraction.
        """
        task = self.trainer.lightning_module if self.trainer else None
        needs = getattr(task, "needs", None)
        if needs is not None:
            self.select(frozenset(needs), frozenset(getattr(task, "wants", ())))
        if self._sources:
            return
        self._sources = {split: self.source(split) for split in SPLITS}
        whole, labelled = self._sources["train"], "label" in self.keys
        self._sources["train"] = share_of(whole, self.fraction, seed=self.seed, labelled=labelled)
        self.classes = self.read_classes()
        self._check()

    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(source) for split, source in self._sources.items()}

    def origins(self) -> list[str]:
        """The files that annotations were read from, where they were chosen among several."""
        return []

    def class_counts(self) -> NDArray[np.int64]:
        """Pixels of each of `target_classes` in the training masks, (K,); ignored pixels count nowhere.

        Raises UsageError where no masks are selected, or a mask holds what stands for no class.
        """
        return np.array(self._survey("train").pixels, np.int64)

    def class_weights(self) -> list[float]:
        """A weight for each of `target_classes` that makes rare ones count more, from the training masks.

        By median frequency balancing, see `median_frequency`. Raises UsageError as class_counts does.
        """
        return median_frequency(self._survey("train"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented, in whole global batches."""
        loader, stopped = self._loader("train", train=True), self._stopped_at
        sampler = cast(EpochSampler, loader.sampler)
        sampler.set_epoch(stopped["epoch"])  # workers begin to read before Lightning says it
        if stopped["batches"]:
            self._check_place(stopped)
            sampler.resume(epoch=stopped["epoch"], batches=stopped["batches"])
        return loader

    def state_dict(self) -> dict[str, int]:
        """The trainer's place among the batches, and what it depends on."""
        if self.trainer is None:
            return {}
        facts = {"batch_size": self.batch_size, "processes": self.trainer.world_size}
        loop: Any = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        within = epochs.ready > epochs.processed
        return facts | {"epoch": epochs.processed, "batches": batches if within else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from such a place; a trainer makes its loader before it knows how far it had come."""
        self._stopped_at = dict(state_dict)

    def _check_place(self, stopped: Mapping[str, int]) -> None:
        now = self.state_dict()
        if any(stopped[name] != now[name] for name in ("batch_size", "processes")):
            raise UsageError(
                f"The run stopped in the middle of an epoch, of batches of {stopped['batch_size']} on each of "
                f"{stopped['processes']} processes, and would go on with {now['batch_size']} on {now['processes']}: "
                f"type data.batch_size={stopped['batch_size']} trainer.devices={stopped['processes']}, and change them "
                "from a checkpoint of an epoch's end."
            )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation image exactly once, in order."""
        return self._loader("val", train=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every image of `test_split` exactly once, in order, through the evaluation transform."""
        return self._loader(self.test_split, train=False)

    def probe_dataloader(self, split: str = "train", *, images: int | None = None) -> DataLoader[Any]:
        """At most `images` (None: `probe_images`) of a split, drawn by the seed, once each, without views.

        Those of training, through the evaluation transform, are the bank of a nearest-neighbour classifier. They have
        the annotations that are selected, "index" counting from 0 in the bank; each process sees its own part, as in
        evaluation. It may be gone through at any time: its bad files are counted with the next training batch.
        """
        self.setup()
        source = self._decoded(split, shrink=split == "train")
        most = self.probe_images if images is None else images
        drawn = np.random.default_rng([self.seed, len(source)]).permutation(len(source))[:most]
        return self._evaluation_loader(Subset(source, np.sort(drawn)), split, views=False)

    def train_name(self, index: int) -> str:
        """What a person calls an image of the training batches."""
        return printable(self._sources["train"].name(index))

    def test_name(self, index: int) -> str:
        """What a person calls an image of the test loader."""
        return printable(self._sources[self.test_split].name(index))

    def loader(self, source: Source, *, split: str = "predict") -> DataLoader[Any]:
        """Every sample of any source exactly once, in order, through the evaluation transform: for prediction."""
        return self._loader_of(source, split, train=False, keys=frozenset())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Take the bad files out of a batch and note them.

        Raises UsageError where they are more than max_bad_fraction of their split, over all processes, or nothing else
        is left to train on; then it does so in every process.
        """
        entries = batch.pop("bad", []) if isinstance(batch, dict) else []
        self._found += entries
        lost = entries if entries and "index" not in batch else []
        if self._together():
            self._judge(lost=lost)
        elif lost:
            raise UsageError(_all_bad(lost))
        return batch

    def _together(self) -> bool:
        """Whether all processes are here, and tell each other what they found: once in a log interval of training.

        In evaluation they have uneven numbers of batches.
        """
        trainer = self.trainer
        if world_size() == 1 or trainer is None:
            return True
        if not trainer.training:
            return False
        self._batches += 1
        interval: int = getattr(trainer, "log_every_n_steps", 1)
        return self._batches % max(1, interval) == 0

    def teardown(self, stage: str | None = None) -> None:  # noqa: ARG002, Lightning names the stage
        """Note the bad files of the last evaluation; raises UsageError as on_before_batch_transfer does."""
        self._judge()

    def _judge(self, *, lost: Sequence[BadEntry] = ()) -> None:
        """Note what every process has found bad since the last time; `lost` are the files of a batch with no other."""
        if not anywhere(bool(self._found)):
            return
        parts = collected((self._found.copy(), lost))
        self._found.clear()
        found = [entry for entries, _ in parts for entry in entries]
        for split in dict.fromkeys(split for split, _, _ in found):
            self._note_all(split, [(name, reason) for part, name, reason in found if part == split])
        for _, files in parts:
            if files:
                raise UsageError(_all_bad(files))

    def _note(self, split: str, name: str, reason: str) -> None:
        self.bad_files[name] = reason
        known = self._bad.setdefault(split, set())
        known.add(name)
        size = self.sizes().get(split)
        if size is not None and len(known) > self.max_bad_fraction * size:
            raise UsageError(
                f"{len(known)} of {size} {split} files are bad: {_sentence(name, reason)}. Mend or remove what is bad, "
                f"or type data.max_bad_fraction={_rounded_up(len(known) / size)} (now {self.max_bad_fraction})"
            )

    def _survey(self, split: str) -> Survey:
        """What the masks of a split hold; the bad ones are noted."""
        self.setup()
        if "mask" not in self.keys:
            raise UsageError(
                f"Classes are counted in masks, and the task uses {_listed(self.keys) or 'images only'}: give class "
                "weights as a list, one number a class"
            )
        if split not in self._surveys:
            files = self._sources[split]
            source = files if isinstance(files, MaskFiles) else self._decoded(split, shrink=split == "train")
            self._surveys[split] = survey(source, len(self.target_classes))
            self._note_all(split, self._surveys[split].bad)
        return self._surveys[split]

    def _note_all(self, split: str, bad: list[tuple[str, str]]) -> None:
        """Note bad files, all before the first may raise; the error names the first."""
        self.bad_files.update(bad)
        self._bad.setdefault(split, set()).update(name for name, _ in bad)
        if bad:
            self._note(split, *bad[0])

    def _transform(self, *, train: bool, keys: frozenset[str]) -> Transform:
        from visiontasks.data.augment import crop_and_colour, resize_and_crop

        factories: tuple[TransformFactory, TransformFactory] = (
            self.train_transform or crop_and_colour,
            self.eval_transform or resize_and_crop,
        )
        extra: dict[str, Any] = {"boxes": True} if "bboxes" in keys else {}
        return factories[not train](size=self.image_size, mirror=self.mirror, **extra)

    def _transforms(
        self, *, train: bool, keys: frozenset[str], views: bool
    ) -> tuple[Transform | None, MultiView | None]:
        """What makes the pixels of samples, and, where they are to show the `views` of training, what makes those."""
        trained: Any = self._transform(train=True, keys=keys) if train or views else None
        multi_view: MultiView | None = trained if hasattr(trained, "views") else None
        if not train:
            return self._transform(train=False, keys=keys), multi_view
        if multi_view is not None and self._needed:
            raise UsageError(
                f"The task needs {_listed(self._needed)}, and augment.train makes several views without it: type "
                "another augment=, such as augment=crop_and_colour"
            )
        return (None, multi_view) if multi_view is not None else (trained, None)

    def _loader(self, split: str, *, train: bool) -> DataLoader[Any]:
        self.setup()
        source = self._decoded(split, shrink=train)
        if train:
            return self._loader_of(source, split, train=True, keys=self.keys)
        return self._evaluation_loader(source, split, views=not self._needed)

    def _evaluation_loader(self, source: Source, split: str, *, views: bool) -> DataLoader[Any]:
        kind = partial(_EvaluationLoader, found=self._found)
        return self._loader_of(source, split, train=False, keys=self.keys, views=views, kind=kind)

    def _decoded(self, split: str, *, shrink: bool) -> Source:
        if self.cache is None:
            return self._sources[split]
        if (split, shrink) not in self._caches:
            side = self.image_size if isinstance(self.image_size, int) else max(self.image_size)
            size = -(-side * 8 // 7) if shrink else None
            self._caches[split, shrink] = Cached(self._sources[split], self.cache, size=size)
        return self._caches[split, shrink]

    def _loader_of(
        self,
        source: Source,
        split: str,
        *,
        train: bool,
        keys: frozenset[str],
        views: bool = False,
        kind: Callable[..., DataLoader[Any]] = PatientLoader,
    ) -> DataLoader[Any]:
        transform, multi_view = self._transforms(train=train, keys=keys, views=views)
        data = Views(source, transform, split=split, keys=keys, seed=self.seed, multi_view=multi_view)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        workers = default_workers() if self.num_workers is None else self.num_workers
        sampler = EpochSampler(
            data,
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            rank=rank,
            num_replicas=world,
            order=getattr(source, "order", None),
        )
        return kind(
            data,
            timeout=self.timeout,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch would draw a number from the global one
        )

    def _check(self) -> None:
        for split, size in self.sizes().items():
            if size == 0:
                raise UsageError(f"{type(self).__name__} has no {split} images: {self.sizes()}")
        if self.keys & {"label", "labels", "mask"} and not self.classes:
            raise UsageError(f"{type(self).__name__} provides {_listed(self.keys)} but names no classes")
        if self.batch_size < 1:
            raise UsageError(f"data.batch_size={self.batch_size} is no batch: give 1 or more")
        if self.batch_size > self.sizes()["train"]:
            raise UsageError(too_large_a_batch(self.batch_size, 1, self.sizes()["train"]))
        self._check_masks()
        for split, source in self._sources.items():
            self._check_sample(split, source)

    def _check_masks(self) -> None:
        for split in ("train", "val"):
            if "mask" in self.keys and isinstance(self._sources[split], MaskFiles):
                self._survey(split)

    def _check_sample(self, split: str, source: Source) -> None:
        try:
            sample = source[0]
        except BadFile as error:
            self._note(split, error.path, error.reason)
            return
        absent = self.keys - sample.keys()
        if absent:
            raise UsageError(f"{source.name(0)} has no {_listed(absent)}, which {type(self).__name__} promises")
        for key in _SHAPES.keys() & sample.keys():
            _check_array(source.name(0), key, cast(NDArray[Any], sample[key]))  # type: ignore[literal-required]

    def _mismatch(self, missing: frozenset[str], otherwise: str) -> str:
        names = [name for name in exported.__all__ if missing <= _provided(getattr(exported, name))]
        others = ", ".join(f"data={conf_name(name)}" for name in names if name != type(self).__name__)
        own = [*filter(None, [otherwise]), *(self.remedies[key] for key in sorted(missing) if key in self.remedies)]
        remedy = " or ".join([*dict.fromkeys(own), *([f"one of {others}"] if others else [])])
        return (
            f"The task needs {_listed(missing)} and {conf_name(type(self).__name__)} provides "
            f"{_listed(self.provides) or 'images only'}: type {remedy or 'data= with your own data module'}"
        )


class Views(Dataset[Sample | BadEntry]):
    """A source's samples, each transformed by a draw that belongs to (seed, epoch, index); keys are (epoch, index).

    With `multi_view` samples have the entry "views" beside what `transform` makes; without `transform` they have no
    other pixels, and of the annotations the label.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None,
        *,
        split: str,
        keys: frozenset[str],
        seed: int = 0,
        multi_view: MultiView | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.split = split
        self.keys = keys | {"image"} | (_WITH_BOXES if "bboxes" in keys else frozenset())
        self.seed = seed
        self.multi_view = multi_view
        self.reading = Reading(0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key | int) -> Sample | BadEntry:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with self.reading.sample(index):
            return self._item(epoch=epoch, index=index)

    def _item(self, *, epoch: int, index: int) -> Sample | BadEntry:
        try:
            given = self.given(index)
            if getattr(self.transform, "mixes", False):
                given["others"] = _Others(self)
            sample = self._drawn(given, epoch=epoch, index=index)
        except BadFile as error:
            return self.split, error.path, error.reason
        sample["index"] = index
        return sample

    def given(self, index: int) -> Sample:
        """The sample as its source has it, with the annotations that are wanted."""
        return cast(Sample, {name: value for name, value in self.source[index].items() if name in self.keys})

    def _drawn(self, given: Sample, *, epoch: int, index: int) -> Sample:
        from visiontasks.data.randomness import draw

        numbers = {"seed": self.seed, "epoch": epoch, "index": index}
        if self.transform is not None:
            sample = draw(cast(Any, self.transform), given, **numbers)
        else:
            sample = Sample(label=given["label"]) if "label" in given else Sample()
        if self.multi_view is not None:
            first = SPLITS.index(self.split) << 32  # so that no split repeats another's draws
            sample["views"] = self.multi_view.views(given["image"], **numbers, first=first)
        return sample


class _Others(Sequence[Sample]):
    """All samples of a source, untransformed, for a transform that joins several."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: Any) -> Any:
        return self.views.given(index)


class _EvaluationLoader(PatientLoader):
    """Hands on no bad files, nor a batch of them alone: they are put to those `found`."""

    def __init__(self, data: Dataset[Any], *, found: list[BadEntry], **options: Any) -> None:
        super().__init__(data, **options)
        self.found = found

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.found += batch.pop("bad", [])
            if "image" in batch:
                yield batch


def collate(items: list[Sample | BadEntry]) -> Batch:
    """Stack samples to a batch; a BadEntry goes to its entry "bad", which is there only when it is needed.

    Images, or masks, that differ in size become a list of one tensor each.
    """
    bad = [item for item in items if isinstance(item, tuple)]
    samples: list[Any] = [item for item in items if not isinstance(item, tuple)]
    batch: Batch = {key: _collated(key, [sample[key] for sample in samples]) for key in _keys(samples)}
    if bad:
        batch["bad"] = bad
    return batch


def default_workers() -> int:
    """No worker processes without a GPU, where the model takes every core; else up to 8 for each GPU."""
    if not torch.cuda.is_available():
        return 0
    return min(8, len(os.sched_getaffinity(0)) // torch.cuda.device_count())


def _keys(samples: list[Any]) -> tuple[str, ...]:
    return tuple(samples[0]) if samples else ()


def _collated(key: str, values: list[Any]) -> Tensor | list[Tensor]:
    if key in _PER_OBJECT:
        return [torch.from_numpy(np.ascontiguousarray(value, _DTYPES[key])) for value in values]
    if key == "views":
        return [_channels_first(np.stack(same)) for same in zip(*values, strict=True)]
    arrays = [np.asarray(value) for value in values]
    if key in _PIXELS and len({array.shape for array in arrays}) > 1:
        return [_listed_pixels(array) for array in arrays]
    stacked = np.stack(arrays)
    return _channels_first(stacked) if key == "image" else torch.from_numpy(stacked)


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """Images (B, H, W, 3) as (B, 3, H, W) on the same memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _listed_pixels(array: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(array))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels  # (3, H, W) or (H, W)


def _check_array(name: str, key: str, array: NDArray[Any]) -> None:
    if array.ndim != _SHAPES[key] or array.dtype != _DTYPES[key] or (key == "image" and array.shape[2] != 3):
        found = f"{array.dtype} of shape {array.shape}"
        raise UsageError(
            f"{name} gives {key} as {found}: it takes {np.dtype(_DTYPES[key])} with {_SHAPES[key]} dimensions"
        )


def _provided(thing: object) -> frozenset[str]:
    concrete = isinstance(thing, type) and issubclass(thing, DataModule) and thing is not DataModule
    return cast(type[DataModule], thing).provides if concrete else frozenset()


def _side_or_sides(given: int | Sequence[int]) -> int | tuple[int, int]:
    sides = (given,) if isinstance(given, int) else tuple(given)
    if len(sides) > 2 or not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UsageError(f"data.image_size={given} is no size: give one side, or [height,width], in pixels")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def conf_name(name: str) -> str:
    """What conf/data calls a data module's class."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _listed(words: frozenset[str]) -> str:
    return ", ".join(sorted(words))


def _sentence(name: str, reason: str) -> str:
    return f"{name} {reason}" if reason[:1].islower() else f"{name}: {reason}"


def _all_bad(files: Sequence[BadEntry]) -> str:
    return f"All {len(files)} files of a batch are bad, among them {_sentence(*files[0][1:])}"


def _rounded_up(fraction: float) -> str:
    return f"{np.ceil(fraction * 10000) / 10000:g}"
