"""Several views of one image: whose draws, with which steps, in which batches."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tests.data.test_module import Noise, NoiseData
from visiontasks.contracts import Sample, UsageError
from visiontasks.data.source import Source
from visiontasks.data.views import Blur, MultiView, multi_crop, one_view, two_views, view

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = sorted(
    path.stem for path in (CONF / "augment").glob("[!_]*.yaml") if path.read_text().startswith("# For pretraining")
)
PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
STILL: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": 0.0, "grey": 0.0, "blur": 0.0}


class Photographs(Noise):
    """One and the same image, so that equal views can only come from equal draws."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample | {"image": PHOTOGRAPH, "label": index % 3, "mask": np.full((40, 50), index % 3, np.uint8)}


class Album(NoiseData):
    """12 images to train on, 5 and 7 to evaluate."""

    provides = frozenset({"label", "mask"})

    def __init__(self, **options: Any) -> None:
        made = partial(two_views, first={"scale": (0.2, 1.0)})
        super().__init__(**({"train_size": 12, "train_transform": made, "max_bad_fraction": 0.5} | options))

    def source(self, split: str) -> Source:
        return Photographs(len(super().source(split)), bad=self.bad)

    def read_classes(self) -> tuple[str, ...]:
        return ("a", "b", "c")


def album(*wants: str, **options: Any) -> Album:
    data = Album(**options)
    data.select(frozenset(), frozenset(wants))
    return data


def views_of(loader: DataLoader[Any], epochs: int = 1) -> torch.Tensor:
    """All views of a loader, (epochs, images, views, 3, h, w)."""
    parts = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        parts.append(torch.cat([torch.stack(batch["views"], 1) for batch in loader]))
    return torch.stack(parts)


def distinct(views: torch.Tensor) -> int:
    return len(np.unique(views.reshape(-1, 3 * 16 * 16).numpy(), axis=0))


def test_no_two_views_share_a_draw_and_no_epoch_or_split_repeats() -> None:
    data = album()
    trained = views_of(data.train_dataloader(), epochs=3)
    assert trained.shape == (3, 12, 2, 3, 16, 16)
    assert distinct(trained) == 72
    together = [views_of(loader).flatten(0, 2) for loader in (data.val_dataloader(), data.test_dataloader())]
    assert distinct(torch.cat([trained.flatten(0, 2), *together])) == 72 + 10 + 14


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("workers", [1, 3])
def test_views_are_the_same_for_any_workers(workers: int) -> None:
    for name in ("train_dataloader", "val_dataloader"):
        here, there = (getattr(album(num_workers=number), name)() for number in (0, workers))
        assert torch.equal(views_of(here, epochs=2), views_of(there, epochs=2))


def test_two_ranks_see_the_views_of_one_process() -> None:
    def on(rank: int, world: int, batch_size: int) -> torch.Tensor:
        data = album(batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank, lightning_module=None)  # type: ignore[assignment]
        return views_of(data.train_dataloader())[0]

    assert torch.equal(torch.stack([on(0, 2, 2), on(1, 2, 2)], 1).flatten(0, 1), on(0, 1, 4))


def test_evaluation_shows_the_image_and_the_same_views_in_every_epoch() -> None:
    data = album("label", "mask")
    loader = data.val_dataloader()
    first, second = views_of(loader, epochs=2)
    assert torch.equal(first, second)
    batch = next(iter(loader))
    assert batch.keys() == {"image", "views", "index", "label", "mask"}
    assert batch["image"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["image"][0], batch["image"][1])


def test_a_training_batch_holds_views_and_the_label_that_is_wanted() -> None:
    assert next(iter(album().train_dataloader())).keys() == {"views", "index"}
    batch = next(iter(album("label", "mask").train_dataloader()))
    assert batch.keys() == {"views", "index", "label"}
    assert [view.shape for view in batch["views"]] == [(4, 3, 16, 16)] * 2
    assert all(view.dtype == torch.uint8 for view in batch["views"])
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch["views"])
    assert torch.equal(batch["label"], batch["index"] % 3)


def test_what_is_wanted_and_not_provided_is_left_out() -> None:
    data = album("label", "bboxes")
    assert data.keys == {"label"}
    with pytest.raises(UsageError, match="needs bboxes"):
        data.select(frozenset({"bboxes"}))


def test_setup_selects_what_the_task_of_the_trainer_wants() -> None:
    data = Album()
    task = SimpleNamespace(needs=frozenset(), wants=frozenset({"mask", "bboxes"}))
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=task)  # type: ignore[assignment]
    data.setup("fit")
    assert data.keys == {"mask"}


def test_a_task_that_needs_annotations_is_not_given_views() -> None:
    data = Album()
    data.select(frozenset({"label"}))
    assert "views" not in next(iter(data.val_dataloader()))
    with pytest.raises(UsageError, match=r"needs label, and augment.train makes several views.*=crop_and_colour"):
        data.train_dataloader()


def test_bad_files_leave_a_batch_of_views() -> None:
    data = album(bad=frozenset({1, 2}), batch_size=12)
    batch = data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert len(batch["index"]) == len(batch["views"][0]) == len(batch["views"][1]) == 10
    assert sorted(data.bad_files) == ["noise/1", "noise/2"]


def numbers(batches: list[Any], key: str) -> list[int]:
    return [number for batch in batches for number in batch[key].tolist()]


def test_the_probe_shows_training_images_as_evaluation_does() -> None:
    def shown(data: Album) -> tuple[list[int], list[int]]:
        batches = list(data.probe_dataloader())
        assert all(batch.keys() == {"image", "index", "label"} for batch in batches)
        whole = next(iter(data.val_dataloader()))["image"][0]
        assert all(torch.equal(image, whole) for batch in batches for image in batch["image"])
        return numbers(batches, "index"), numbers(batches, "label")

    assert shown(album("label")) == (list(range(12)), [0, 1, 2] * 4)
    indices, labels = shown(album("label", probe_images=7))
    assert indices == list(range(7))
    drawn = {tuple(shown(album("label", probe_images=7, seed=seed))[1]) for seed in range(4)}
    assert tuple(labels) in drawn
    assert len(drawn) > 1


def test_bad_files_of_the_probe_are_counted_with_the_next_training_batch() -> None:
    data = album(bad=frozenset({1, 2}))
    assert numbers(list(data.probe_dataloader()), "index") == [0, *range(3, 12)]
    assert not data.bad_files
    data.on_before_batch_transfer({"index": 0}, 0)
    assert sorted(data.bad_files) == ["noise/1", "noise/2"]


def test_the_probe_is_shared_out_among_processes() -> None:
    parts = []
    for rank in range(2):
        data = album("label", probe_images=7)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, lightning_module=None)  # type: ignore[assignment]
        parts.append(numbers(list(data.probe_dataloader()), "index"))
    assert parts == [[0, 2, 4, 6], [1, 3, 5]]


def test_the_small_views_come_after_the_large_ones() -> None:
    recipe = partial(multi_crop, first={}, local={"scale": (0.05, 0.4)}, local_views=3, local_side=3 / 7)
    batch = next(iter(album(train_transform=recipe, image_size=[28, 42]).train_dataloader()))
    assert [tuple(view.shape[2:]) for view in batch["views"]] == [(28, 42)] * 2 + [(12, 18)] * 3
    with pytest.raises(UsageError, match=r"local_side=96 is no share .*local_side=0.4286"):
        multi_crop(size=224, mirror=True, first={}, local={}, local_side=96)


def drawn(made: MultiView, image: NDArray[np.uint8] = PHOTOGRAPH, count: int = 1) -> NDArray[np.uint8]:
    """Every view of `count` draws, (count, views, h, w, 3)."""
    return np.array([made.views(image, seed=0, epoch=0, index=index) for index in range(count)])


def test_a_view_without_steps_is_the_image() -> None:
    square = PHOTOGRAPH[:32, :32]
    made = one_view(size=32, mirror=False, **STILL)
    np.testing.assert_array_equal(drawn(made, square)[0, 0], square)


def test_solarising_inverts_the_bright_half() -> None:
    square = PHOTOGRAPH[:32, :32]
    made = one_view(size=32, mirror=False, solarise=1.0, **STILL)
    np.testing.assert_array_equal(drawn(made, square)[0, 0], np.where(square < 128, square, 255 - square))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_equals_a_convolution_with_the_gaussian(sigma: float) -> None:
    offsets = np.arange(-12, 13)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(PHOTOGRAPH.astype(np.float64), ((12, 12), (12, 12), (0, 0)), mode="reflect")
    rows = sum(weight * padded[start : start + 40] for start, weight in enumerate(weights))
    wanted = sum(weight * rows[:, start : start + 50] for start, weight in enumerate(weights))
    np.testing.assert_allclose(Blur().apply(PHOTOGRAPH, sigma), wanted, atol=1.5)


def test_the_second_view_is_made_as_the_first_unless_it_is_told_otherwise() -> None:
    still, solarised = {**STILL}, {**STILL, "solarise": 1.0}
    alike = drawn(two_views(size=40, mirror=False, first=solarised), PHOTOGRAPH[:, :40])[0]
    unlike = drawn(two_views(size=40, mirror=False, first=still, second=solarised), PHOTOGRAPH[:, :40])[0]
    np.testing.assert_array_equal(alike[0], alike[1])
    np.testing.assert_array_equal(unlike[1], alike[0])
    np.testing.assert_array_equal(unlike[0], PHOTOGRAPH[:, :40])


@pytest.mark.parametrize(("side", "blurs"), [(95, False), (96, True)])
def test_small_views_are_not_blurred(side: int, blurs: bool) -> None:
    steps = view(size=(side, 200), mirror=True, blur=1.0).transforms
    assert any(isinstance(step, Blur) for step in steps) is blurs


# scale; probabilities of jitter, grey, blur, solarise; strengths of brightness, contrast, saturation, hue
STRONG, MILD, UNLIKE = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1)
Row = tuple[tuple[float, float], tuple[float, ...], tuple[float, ...]]
SIMCLR: Row = ((0.08, 1.0), (0.8, 0.2, 0.5, 0.0), STRONG)
TABLE: dict[str, list[Row]] = {  # of the papers
    "simclr": [SIMCLR] * 2,
    "small_views": [((0.08, 1.0), (0.8, 0.2, 0.0, 0.0), MILD)] * 2,
    "moco": [((0.2, 1.0), (0.8, 0.2, 0.5, 0.0), MILD)] * 2,
    "byol": [((0.08, 1.0), (0.8, 0.2, 1.0, 0.0), UNLIKE), ((0.08, 1.0), (0.8, 0.2, 0.1, 0.2), UNLIKE)],
    "swav": [((0.14, 1.0), (0.8, 0.2, 0.5, 0.0), STRONG)] * 2 + [((0.05, 0.14), (0.8, 0.2, 0.5, 0.0), STRONG)] * 6,
    "dino": [
        ((0.4, 1.0), (0.8, 0.2, 1.0, 0.0), UNLIKE),
        ((0.4, 1.0), (0.8, 0.2, 0.1, 0.2), UNLIKE),
        *[((0.05, 0.4), (0.8, 0.2, 0.5, 0.0), UNLIKE)] * 8,
    ],
    "one_view": [((0.2, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))],
}


def preset(name: str) -> Callable[..., MultiView]:
    with initialize_config_dir(str(CONF), version_base=None):
        group = compose(overrides=[f"+augment={name}"]).augment
    made: Callable[..., MultiView] = instantiate(group.train, _convert_="all")
    return made


def row(transform: Any) -> Row:
    """What a composed view does, read from its steps."""
    steps = {type(step).__name__: step for step in transform.transforms}
    probabilities = tuple(getattr(steps.get(name), "p", 0.0) for name in ("ColourMatrix", "ToGray", "Blur", "Solarize"))
    jitter = steps.get("ColourMatrix")
    strengths = tuple(getattr(jitter, name, 0.0) for name in ("brightness", "contrast", "saturation", "hue"))
    return steps["RandomWindow"].scale, probabilities, strengths


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_papers(name: str) -> None:
    made = preset(name)(size=224, mirror=True)
    assert [row(transform) for transform in made.transforms] == TABLE[name]
    sides = [each.shape for each in made.views(PHOTOGRAPH, seed=0, epoch=0, index=0)]
    assert sides == [(224, 224, 3)] * min(2, len(sides)) + [(96, 96, 3)] * (len(sides) - 2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_mirror_half_of_the_views_or_none(name: str) -> None:
    ramp = np.repeat(np.tile(np.arange(50, dtype=np.uint8) * 2 + 20, (40, 1))[..., None], 3, axis=2)

    def falling(mirror: bool) -> NDArray[np.bool_]:
        transforms = preset(name)(size=32, mirror=mirror).transforms[:1]
        grey = drawn(MultiView(transforms), ramp, count=80).astype(np.float64).sum(-1)  # (80, 1, 32, 32)
        rise = grey[..., 16:].mean((-2, -1)) - grey[..., :16].mean((-2, -1))
        result: NDArray[np.bool_] = rise[np.abs(rise) > 1] < 0
        return result

    assert 0.3 < falling(mirror=True).mean() < 0.7
    assert falling(mirror=False).sum() == 0


def test_a_strength_of_the_first_view_holds_for_all_that_take_it_over() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        train = compose(overrides=["+augment=dino", "augment.train.first.hue=0.03"]).augment.train
    assert train.second.hue == train.local.hue == 0.03
