"""What goes wrong in silence with data: each check looks at a data module that is set up and returns a verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from visiontasks.contracts import IGNORE, Sample, Verdict
from visiontasks.data.images import BadFile
from visiontasks.data.module import DataModule, Views, collate
from visiontasks.data.patience import PatientLoader
from visiontasks.data.source import Source

EPOCHS, DRAWS, WORKERS = 3, 16, 2
_BATCH = 4
_PATIENCE = 60.0  # seconds for a batch
_RARE = 10  # times that the most frequent class may occur as often as the rarest
_LISTED = 3


class Look(NamedTuple):
    """What a number of samples of a split hold."""

    split: str
    read: int
    size: int
    counts: NDArray[np.int64]  # of each class: images, objects or pixels
    unit: str
    bad: list[str]  # files
    wrong: list[str]  # annotations


def augmentation(data: DataModule) -> Verdict:
    """Draws one training image many times, over epochs and workers, and counts the different results."""
    views = data.train_dataloader().dataset
    if not isinstance(views, Views):
        return Verdict(
            "augmentation", "warning", f"{type(views).__name__} is no data set of ours: its draws are unknown"
        )
    shared, alone = _drawn(views, workers=WORKERS), _drawn(views, workers=0)
    distinct, total = len({result for epoch in shared for result in epoch}), EPOCHS * DRAWS
    told = f"{distinct} of {total} draws of one image are different, over {EPOCHS} epochs and {WORKERS} workers"
    if distinct == 1:
        off = _factory(data.train_transform) == _factory(data.eval_transform)
        why = "augmentation is off" if off else "is its seed fixed, or all of its probabilities 0?"
        return Verdict("augmentation", "warning" if off else "fault", f"{told}: {why}")
    first, second = _of_workers(shared[0])
    if first == second and len(set(first)) > 1:
        return Verdict("augmentation", "fault", f"{told}: every worker draws the same")
    if shared[0] == shared[1] == shared[2]:
        return Verdict("augmentation", "fault", f"{told}: every epoch repeats the draws of the first")
    if alone != shared:
        return Verdict("augmentation", "fault", f"{told}: the draws depend on the number of workers")
    return Verdict("augmentation", "ok", f"{told}, and alike without workers")


class _Same:
    """The first sample that can be read, at every position."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.first = next(index for index in range(len(source)) if _readable(source, index))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.first]

    def name(self, index: int) -> str:  # noqa: ARG002
        return self.source.name(self.first)


def _readable(source: Source, index: int) -> bool:
    try:
        source[index]
    except BadFile:
        return False
    return True


def _drawn(views: Views, *, workers: int) -> list[list[bytes]]:
    """What each draw of each epoch looks like."""
    same = Views(
        _Same(views.source),
        views.transform,
        split=views.split,
        keys=views.keys,
        seed=views.seed,
        multi_view=views.multi_view,
    )
    keys = [(epoch, index) for epoch in range(EPOCHS) for index in range(DRAWS)]
    loader = PatientLoader(
        same, timeout=_PATIENCE, batch_size=_BATCH, sampler=cast(Any, keys), num_workers=workers, collate_fn=collate
    )
    results = [result for batch in loader for result in _pixels(batch)]
    return [results[start : start + DRAWS] for start in range(0, len(results), DRAWS)]


def _pixels(batch: dict[str, Any]) -> Iterator[bytes]:
    images = batch["views"] if "views" in batch else [batch["image"]]
    for each in zip(*images, strict=True):
        yield b"".join(image.numpy().tobytes() for image in each)


def _of_workers(results: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The draws of the first worker and of the second, whose batches take turns."""
    batches = [results[start : start + _BATCH] for start in range(0, len(results), _BATCH)]
    first, second = batches[0::WORKERS], batches[1::WORKERS]
    return [result for batch in first for result in batch], [result for batch in second for result in batch]


def _factory(transform: Any) -> object:
    return getattr(transform, "func", transform)


def evaluated_once(data: DataModule, *, processes: tuple[int, ...] = (1, 2, 3)) -> Verdict:
    """Counts how often each sample of val and test is evaluated on a number of processes."""
    sizes = data.sizes()
    for split, loader in (("val", data.val_dataloader), (data.test_split, data.test_dataloader)):
        for world in processes:
            seen = Counter(index for rank in range(world) for index in _indices(data, loader, rank, world))
            twice = sum(count - 1 for count in seen.values())
            missing = sizes[split] - len(seen)
            if twice or missing:
                told = f"{world} processes evaluate {sum(seen.values())} of {sizes[split]} {split} samples"
                return Verdict("evaluation", "fault", f"{told}: {twice} too often, {missing} never")
    told = f"each of {sizes['val']:,} val and {sizes[data.test_split]:,} {data.test_split} samples is counted once"
    return Verdict("evaluation", "ok", f"{told} on {', '.join(map(str, processes))} processes")


def _indices(data: DataModule, loader: Callable[[], DataLoader[Any]], rank: int, world: int) -> list[int]:
    before = data.trainer
    data.trainer = cast(Any, SimpleNamespace(world_size=world, global_rank=rank, training=False, lightning_module=None))
    try:
        keys: list[Any] = list(loader().sampler)
    finally:
        data.trainer = before
    return [key[1] if isinstance(key, tuple) else key for key in keys]


def look(data: DataModule, split: str = "train", *, samples: int = 200, seconds: float = 5.0) -> Look:
    """Reads samples that are spread evenly over a split, as many as the time allows."""
    source, names = data.source(split), data.target_classes
    counts, unit, read = np.zeros(len(names), np.int64), "images", 0
    bad: list[str] = []
    wrong: list[str] = []
    end = time.monotonic() + seconds
    for index in np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).astype(int)).tolist():
        if time.monotonic() > end:
            break
        read += 1
        try:
            given: dict[str, Any] = dict(source[index])
        except BadFile as error:
            bad.append(str(error))
            continue
        sample = cast(Sample, {key: value for key, value in given.items() if key in data.keys | {"image"}})
        wrong += [f"{source.name(index)} {fault}" for fault in _faults(sample, len(names))]
        occurring, unit = _occurring(sample, len(names))
        counts += occurring
    return Look(split, read, len(source), counts, unit, bad, wrong)


def files(found: Look, *, max_bad_fraction: float) -> Verdict:
    """Whether all files that were read give right pixels, and no annotation contradicts its image."""
    told = f"{found.read:,} of {found.size:,} {found.split} samples were read"
    if found.wrong:
        some = "; ".join(found.wrong[:_LISTED])
        return Verdict("annotations", "fault", f"{told}, {len(found.wrong)} annotations are wrong: {some}")
    if found.bad:
        status: Literal["fault", "warning"] = "fault" if len(found.bad) > max_bad_fraction * found.size else "warning"
        return Verdict("files", status, f"{told}, {len(found.bad)} are bad: {'; '.join(found.bad[:_LISTED])}")
    return Verdict("files", "ok", f"{told}, none is bad and no annotation contradicts its image")


def balance(found: Look, classes: tuple[str, ...]) -> Verdict:
    """Whether one class occurs much more often than another."""
    if not classes or not found.counts.any():
        return Verdict("classes", "ok", "there are no classes to balance")
    shares = found.counts / found.counts.sum()
    most, least = int(np.argmax(shares)), int(np.argmin(shares))
    told = f"{classes[most]} is {shares[most]:.1%} of the {found.unit}, {classes[least]} {shares[least]:.1%}"
    absent = [name for name, count in zip(classes, found.counts, strict=True) if not count]
    if absent:
        missing = f"{len(absent)} of {len(classes)} classes ({', '.join(absent[:_LISTED])}) are in none"
        return Verdict("classes", "warning", f"{missing} of the {found.read} samples that were read; {told}")
    if shares[most] > _RARE * shares[least]:
        return Verdict("classes", "warning", f"{told}: weigh the classes, or look at figures for each class")
    return Verdict("classes", "ok", told)


def _occurring(sample: Sample, classes: int) -> tuple[NDArray[np.int64], str]:
    """How often each class is there, and what was counted."""
    label = np.asarray(sample.get("label", np.empty(0, np.int64)))
    if label.dtype.kind == "f":
        return (label > 0).astype(np.int64), "labels"
    for key, unit, found in (
        ("mask", "pixels", sample.get("mask")),
        ("labels", "objects", sample.get("labels")),
        ("label", "images", label),
    ):
        if key in sample:
            return np.bincount(np.ravel(cast(Any, found)), minlength=max(256, classes))[:classes].astype(np.int64), unit
    return np.zeros(classes, np.int64), "images"


def _faults(sample: Sample, classes: int) -> Iterator[str]:
    height, width = sample["image"].shape[:2]
    boxes = sample.get("bboxes", np.zeros((0, 4), np.float32))
    if not np.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
        yield "has a box that is not finite or has no extent"
    elif (boxes[:, :2] < -1).any() or (boxes[:, 2:] > [width + 1, height + 1]).any():
        yield f"has a box outside its {width} x {height} pixels"
    for key in ("label", "labels", "mask"):
        values = np.unique(np.asarray(sample.get(key, [])))
        values = values[values != IGNORE] if key == "mask" else values
        if values.dtype.kind in "iu" and len(values) and not 0 <= values[0] <= values[-1] < classes:
            yield f"has {values[0]} to {values[-1]} in its {key} where there are {classes} classes"


def normalised(images: Tensor) -> Verdict:
    """Whether pixels (B, C, H, W) as the network sees them are about 0 in the mean and 1 in their spread."""
    mean, std = images.float().mean().item(), images.float().std().item()
    told = f"the first batch has mean {mean:+.2f} and standard deviation {std:.2f} when normalised"
    if not (abs(mean) < 1.5 and 0.2 < std < 2.5):
        return Verdict("pixels", "warning", f"{told}, far from 0 and 1: are the backbone's mean and std the data's?")
    return Verdict("pixels", "ok", told)
