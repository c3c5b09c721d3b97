import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

from tests.callbacks.watched import scenes, trainer_of
from visiontasks.callbacks import Interpolations, NearestImages, Reconstructions, SampleSheets, samples
from visiontasks.callbacks.samples import animate, between, evenly, features_of, sheet_of
from visiontasks.contracts import UsageError
from visiontasks.tasks.extractors import RandomFeatures
from visiontasks.tasks.generation_metrics import SampleQuality

SIDE = 16


class Painter:
    """Makes pictures of one colour: red is the noise's first number, green its second, blue the class."""

    device = torch.device("cpu")
    image_size = (SIDE, SIDE)

    def __init__(self, *, conditional: bool = False) -> None:
        self.conditional = conditional
        self.classes = tuple(f"class {k}" for k in range(10))
        self.metrics = SampleQuality()
        self.asked = 0

    def latents(self, count: int, *, seed: int) -> Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        assert (labels is not None) == self.conditional
        self.asked = max(self.asked, len(latents))
        blue = torch.zeros(len(latents)) if labels is None else labels * 20.0
        colours = torch.stack((latents[:, 0] * 40 + 128, latents[:, 1] * 40 + 128, blue), dim=1)
        return colours.clamp(0, 255).byte()[:, :, None, None].expand(-1, -1, SIDE, SIDE)


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


def test_a_sheet_is_drawn_after_each_validation_and_all_are_animated(tmp_path: Path) -> None:
    module: Any = Painter()
    trainer = trainer_of(module, scenes(), default_root_dir=tmp_path)
    sheets = SampleSheets(rows=3, columns=4)
    for trainer.current_epoch in range(3):
        sheets.on_validation_end(trainer, module)
        module.sample = lambda latents, _: Painter().sample(latents + 1)
    trainer.sanity_checking, trainer.current_epoch = True, 7
    sheets.on_validation_end(trainer, module)
    trainer.sanity_checking, trainer.is_global_zero, trainer.current_epoch = False, False, 8
    sheets.on_validation_end(trainer, module)
    names = [f"epoch_{epoch:03d}.png" for epoch in range(3)]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == names
    first, *others = (pixels(Image.open(tmp_path / "samples" / name)) for name in names)
    assert not np.array_equal(first, others[0])
    assert np.array_equal(*others)  # the noise stays the same
    trainer.is_global_zero = True
    sheets.on_train_end(trainer, module)
    with Image.open(tmp_path / "samples.gif") as animation:
        assert (animation.n_frames, animation.size[0]) == (3, first.shape[1])


def test_a_sheet_shows_the_pictures_in_their_places() -> None:
    module = Painter()
    noise = module.latents(12, seed=0)
    sheet = pixels(SampleSheets(rows=3, columns=4).sheet(module))
    times = samples.SHOWN // SIDE
    step = SIDE * times + samples.GAP
    assert sheet.shape == (3 * step - samples.GAP, 4 * step - samples.GAP, 3)
    for place, colour in enumerate(module.sample(noise)[:, :, 0, 0].tolist()):
        assert sheet[place // 4 * step + 5, place % 4 * step + 5].tolist() == colour
    assert (sheet[step - 1] == 255).all()


def test_large_pictures_stay_as_they_are_and_a_last_row_may_be_short() -> None:
    assert pixels(sheet_of(torch.zeros(3, 3, 128, 64, dtype=torch.uint8), 2)).shape == (258, 130, 3)


def test_rows_are_classes_and_columns_noises_where_a_class_can_be_asked_for() -> None:
    module = Painter(conditional=True)
    sheet = pixels(SampleSheets(rows=4, columns=3).sheet(module))
    step = SIDE * (samples.SHOWN // SIDE) + samples.GAP
    picture = sheet[:, -(3 * step - samples.GAP) :]  # the names stand before it
    assert picture.shape[1] < sheet.shape[1]
    assert (sheet[:, : sheet.shape[1] - picture.shape[1]] < 100).any()
    found = np.array([[picture[row * step + 3, column * step + 3] for column in range(3)] for row in range(4)])
    assert (found[:, :, :2] == found[:1, :, :2]).all()
    assert found[:, :, 2].tolist() == [[20 * k] * 3 for k in (0, 3, 6, 9)]


def test_more_is_made_in_small_batches() -> None:
    module = Painter()
    SampleSheets(rows=10, columns=30).sheet(module)
    assert module.asked == samples.BATCH


@pytest.mark.parametrize("conditional", [False, True])
def test_interpolations_go_from_noise_to_noise(conditional: bool, tmp_path: Path) -> None:
    module: Any = Painter(conditional=conditional)
    callback = Interpolations(rows=3, columns=5)
    trainer = trainer_of(module, scenes(), default_root_dir=tmp_path)
    callback.on_train_end(trainer, module)
    sheet = pixels(Image.open(tmp_path / "interpolations.png"))
    step = SIDE * (samples.SHOWN // SIDE) + samples.GAP
    picture = sheet[:, -(5 * step - samples.GAP) :]
    noise = module.latents(6, seed=callback.seed)
    for row in range(3):
        blue = 20 * row if conditional else 0
        for column, end in ((0, noise[row]), (4, noise[3 + row])):
            red, green = (min(255, max(0, int(value * 40 + 128))) for value in end[:2].tolist())
            assert picture[row * step + 3, column * step + 3] == pytest.approx([red, green, blue], abs=1)


def test_the_way_between_turns_evenly() -> None:
    starts, ends = torch.eye(3)[:1] * 2, torch.eye(3)[1:2] * 4
    middle = between(starts, ends, 0.5)
    torch.testing.assert_close(middle, torch.tensor([[1.0, 1.0, 0.0]]) / 2**0.5 * 3)
    for first, second in ((starts, starts), (starts, -starts), (torch.zeros(1, 3), ends)):
        assert between(first, second, 0.3).isfinite().all()
    torch.testing.assert_close(between(starts, starts, 0.3), starts)


def test_numbers_are_spread_evenly() -> None:
    assert (evenly(10, 4), evenly(3, 8), evenly(1, 1)) == ([0, 3, 6, 9], [0, 1, 2], [0])


def test_an_animation_has_a_frame_for_each_epoch_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"epoch_{epoch:03d}.png" for epoch in range(9)]
    for grey, file in enumerate(files):
        Image.new("RGB", (40, 30), (grey * 20,) * 3).save(file)
    monkeypatch.setattr(samples, "FRAMES", 5)
    animate(files, tmp_path / "all.gif", milliseconds=100)
    with Image.open(tmp_path / "all.gif") as animation:
        assert (animation.n_frames, animation.size) == (5, (40, 30 + samples.LINE))
        animation.seek(4)
        assert (animation.info["duration"], animation.convert("RGB").getpixel((20, 40))) == (800, (160, 160, 160))


def nearest_of(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    drawn: list[tuple[Any, ...]] = []
    draw = samples.draw_nearest
    monkeypatch.setattr(samples, "draw_nearest", lambda *given: (drawn.append(given), draw(*given)))
    trainer = trainer_of(module, scenes(), default_root_dir=folder)
    NearestImages(samples=3, nearest=4, compared=10).on_train_end(trainer, module)
    assert matplotlib.image.imread(folder / "nearest.png").std() > 0.02
    return drawn[0]


def test_a_training_image_that_is_repeated_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = Painter()
    data = scenes()
    data.setup()
    batch = next(iter(data.probe_dataloader()))
    module.sample = lambda latents, _: batch["image"][:1].expand(len(latents), -1, -1, -1)
    pictures, found, distances, title, _ = nearest_of(module, tmp_path, monkeypatch)
    assert len(pictures) == len(found) == 3
    assert {len(row) for row in found} == {4}
    for row in distances:
        assert row == sorted(row)
        assert row[0] == pytest.approx(0, abs=1e-5)
        assert row[1] > 0.01
    bank = data.probe_dataloader().dataset
    expected = samples.thumbnail(bank, int(batch["index"][0]), 2 * samples.SHOWN)
    assert np.array_equal(found[0][0], expected)
    assert "nearest of 47 training images: " in title
    assert float(title.split("from unseen")[0].split(",")[-1]) > 0.01


def test_samples_unlike_the_data_lie_farther_than_unseen_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, distances, title, _ = nearest_of(Painter(conditional=True), tmp_path, monkeypatch)
    assert len(distances) == 10
    assert float(title.split(" from samples")[0].split(" ")[-1]) > float(title.split(" from unseen")[0].split(" ")[-1])


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    module: Any = Painter()
    data = scenes()
    trainer_of(module, data)
    features, index = features_of(data.probe_dataloader(), RandomFeatures())
    (Path(folder) / f"{rank}.json").write_text(json.dumps([features.tolist(), index.tolist()]))
    own = Path(folder) / str(rank)
    own.mkdir()
    trainer = trainer_of(module, data, default_root_dir=own)
    for callback in (SampleSheets(), Interpolations(), NearestImages(compared=5)):
        for hook in {"on_validation_end", "on_train_end"} & vars(type(callback)).keys():
            getattr(callback, hook)(trainer, module)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")  # a forked process must not wait for threads that it has not
def test_two_processes_see_all_training_images_and_one_draws(tmp_path: Path) -> None:
    features, index = features_of(scenes().probe_dataloader(), RandomFeatures())
    mp.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found[1] == index.tolist() == list(range(47))
        torch.testing.assert_close(torch.tensor(found[0]), features, rtol=1e-6, atol=1e-6)
    made = {"samples", "interpolations.png", "nearest.png"}
    assert made <= {file.name for file in (tmp_path / "0").iterdir()}
    assert not list((tmp_path / "1").iterdir())


@pytest.mark.parametrize("make", [lambda: SampleSheets(rows=0), lambda: Interpolations(columns=0)])
def test_an_empty_sheet_is_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="shows nothing"):
        make()


def test_images_stand_above_what_comes_back_of_them(tmp_path: Path) -> None:
    module: Any = Painter()
    trainer = trainer_of(module, scenes(), default_root_dir=tmp_path)
    given: list[Tensor] = []
    module.reconstruct = lambda images: (given.append(images), 255 - images)[1]
    Reconstructions(rows=2, columns=4).on_train_end(trainer, module)
    sheet = pixels(Image.open(tmp_path / "reconstructions.png"))
    step = SIDE * (samples.SHOWN // SIDE) + samples.GAP
    picture = sheet[:, -(4 * step - samples.GAP) :]
    assert len(given[0]) == 8
    assert len(picture) == 4 * step - samples.GAP
    for place, image in enumerate(given[0]):
        top, left = place // 4 * 2 * step, place % 4 * step
        colour = image[:, 0, 0].tolist()
        assert picture[top, left].tolist() == colour
        assert picture[top + step, left].tolist() == [255 - value for value in colour]
    images = torch.zeros(5, 3, SIDE, SIDE, dtype=torch.uint8)
    assert pixels(Reconstructions(columns=3).sheet(images, images)).shape[0] == 2 * step - samples.GAP  # no short row


def test_what_has_no_codes_gets_no_reconstructions(tmp_path: Path) -> None:
    module: Any = Painter()
    module.reconstruct = lambda _: None
    Reconstructions().on_train_end(trainer_of(module, scenes(), default_root_dir=tmp_path), module)
    assert not list(tmp_path.iterdir())
