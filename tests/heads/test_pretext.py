"""The classic pretexts: what is made of images, what is asked of them, and that it is learnt."""

from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lightning import Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import AdamW

from tests.tasks.pretraining_parts import PRETEXTS, Tiny
from visiontasks import heads
from visiontasks.contracts import Level, UsageError
from visiontasks.heads.pretraining.inpainting import covered
from visiontasks.heads.pretraining.jigsaw import corners, cut, distant_permutations, laid_out, levelled
from visiontasks.heads.pretraining.lab import ColourBins, to_lab, to_rgb
from visiontasks.layers.draws import image_keys
from visiontasks.tasks import Pretraining

SIDE = 36


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(heads, name)(levels=Tiny.levels, **(PRETEXTS[name] | options))


def photographs(count: int = 6, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Smooth colours that are unlike in each image and at each place."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 5, 5), generator=random).float()
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").round().to(torch.uint8)


def keys(count: int = 6, epoch: int = 0) -> Tensor:
    return image_keys(torch.arange(count), seed=0, epoch=epoch)


def parts(prepared: tuple[list[Tensor], Any], count: int, *, turned: bool = False) -> list[Tensor]:
    """All that was made of images, a row for each of so many."""
    inputs, targets = prepared
    flat = [*inputs, *(targets if isinstance(targets, tuple) else (targets,))]
    if turned:
        return [each.unflatten(0, (4, count)).transpose(0, 1) for each in flat]
    return [each.unflatten(0, (count, -1)) for each in flat]


@pytest.mark.parametrize("name", PRETEXTS)
def test_what_is_made_of_an_image_belongs_to_it_and_the_epoch(name: str) -> None:
    method, images, turned = make(name), photographs(), name == "Rotation"
    whole = parts(method.prepare([images], keys()), 6, turned=turned)
    some = torch.tensor([4, 1, 3])
    again = parts(method.prepare([images[some]], keys()[some]), 3, turned=turned)
    for all_rows, rows in zip(whole, again, strict=True):
        assert torch.allclose(all_rows[some].double(), rows.double(), atol=1e-4)
    later = parts(method.prepare([images], keys(epoch=1)), 6, turned=turned)
    same = all(torch.equal(first, second) for first, second in zip(whole, later, strict=True))
    assert same == (name in {"Rotation", "Colorization"})  # which draw nothing


@pytest.mark.parametrize("every", [True, False])
def test_images_are_turned_counter_clockwise_by_what_is_asked(every: bool) -> None:
    images = photographs(16)
    (turned,), turns = make("Rotation", every=every).prepare([images], keys(16))
    assert len(turned) == len(turns) == (64 if every else 16)
    for row, (image, turn) in enumerate(zip(turned, turns.tolist(), strict=True)):
        original = images[row % 16].permute(1, 2, 0).numpy()
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.rot90(original, turn))
    assert set(turns.tolist()) == {0, 1, 2, 3}


def test_images_that_are_not_square_are_not_turned() -> None:
    with pytest.raises(UsageError, match=r"36 x 48 pixels.*data.image_size=36"):
        make("Rotation").prepare([photographs(2, 36, 48)], keys(2))


def test_tiles_without_gaps_put_back_give_the_image() -> None:
    images = photographs(4, 36, 48)
    places = corners([12, 16], torch.device("cpu"))
    tiles = cut(images, places.expand(4, 9, 2), [12, 16])
    assert tiles.shape == (4, 9, 3, 12, 16)
    for image, its_tiles in zip(images, tiles, strict=True):
        assert torch.equal(laid_out(its_tiles, gap=0), image)
        assert torch.equal(its_tiles[5], image[:, 12:24, 32:48])


def test_a_puzzle_is_solved_by_the_permutation_that_is_asked_for() -> None:
    """Without gaps there is nothing to draw but the permutation."""
    method, images = make("Jigsaw", gap=0.0, permutations=30), photographs(8)
    (tiles,), labels = method.prepare([images], keys(8))
    places = corners([12, 12], torch.device("cpu")).expand(8, 9, 2)
    expected = levelled(cut(images, places, [12, 12]))
    for row, label in enumerate(labels.tolist()):
        for at, tile in enumerate(method.order[label].tolist()):
            assert torch.equal(tiles[9 * row + at], expected[row, tile])
    assert labels.unique().numel() > 4


def test_tiles_are_smaller_than_their_cells_and_move_in_them() -> None:
    """Each pixel says where it is: its row is its green, its column its red."""
    place = torch.arange(SIDE, dtype=torch.uint8)
    image = torch.stack((place.expand(SIDE, SIDE), place[:, None].expand(SIDE, SIDE), place.expand(SIDE, SIDE)))
    method = make("Jigsaw", gap=0.25)
    images = image.expand(40, 3, SIDE, SIDE)
    seen: dict[str, Tensor] = {}

    def remember(images: Tensor, corner: Tensor, sides: list[int]) -> Tensor:
        seen["corner"], seen["tiles"] = corner, cut(images, corner, sides)
        return seen["tiles"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visiontasks.heads.pretraining.jigsaw.cut", remember)
        method.prepare([images], keys(40))
    assert seen["tiles"].shape == (40, 9, 3, 8, 8)
    first = seen["tiles"][:, :, :2, 0, 0].flip(2).long()  # (40, 9, 2) rows and columns
    assert torch.equal(first, seen["corner"])
    within = first - corners([12, 12], torch.device("cpu"))
    assert within.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(seen["tiles"][:, :, 0, 0, -1], seen["tiles"][:, :, 0, 0, 0] + 7)


def test_tiles_have_one_mean_and_deviation() -> None:
    tiles = torch.cat((photographs(4).float(), torch.full((1, 3, SIDE, SIDE), 77.0)))
    even = levelled(tiles).double().numpy()
    assert np.allclose(even.mean(axis=(2, 3)), 128, atol=1e-3)
    assert np.allclose(even[:4].reshape(4, -1).std(axis=1), 64, atol=1e-3)
    assert np.allclose(even[4], 128)


@pytest.mark.parametrize(("count", "least", "mean"), [(9, 9, 9), (10, 8, 8.8), (100, 6, 8.07), (1000, 5, 8.0)])
def test_permutations_are_far_apart(count: int, least: int, mean: float) -> None:
    found = distant_permutations(count)
    assert found.shape == (count, 9)
    assert (np.sort(found, axis=1) == np.arange(9)).all()
    unlike = (found[:, None] != found[None]).sum(axis=2)[~np.eye(count, dtype=bool)]
    assert unlike.min() >= least
    assert unlike.mean() >= mean - 1e-9
    assert count == 1000 or np.array_equal(distant_permutations.__wrapped__(count), found)


@pytest.mark.parametrize("count", [1, 362881])
def test_numbers_of_permutations_that_there_are_not(count: int) -> None:
    with pytest.raises(UsageError, match=f"362880 permutations, not {count}"):
        distant_permutations(count)


@pytest.mark.parametrize(("stride", "needed"), [(32, 128), (16, 64), (8, 32)])
def test_the_size_of_images_that_a_puzzle_needs(stride: int, needed: int) -> None:
    method = heads.Jigsaw(levels=(Level(4, stride),), permutations=9, hidden=8)
    with pytest.raises(UsageError, match=f"data.image_size={needed} or more"):
        method.prepare([photographs(1, needed - stride, needed - stride)], keys(1))
    (tiles,), _ = method.prepare([photographs(1, needed, needed)], keys(1))
    assert tiles.shape == (9, 3, stride, stride)
    (tiles,), _ = method.prepare([photographs(1, 224, 224)], keys(1))
    assert tiles.shape == (9, 3, 64, 64)


def test_lab_is_that_of_opencv() -> None:
    colours = torch.cartesian_prod(*[torch.arange(0, 256, 15)] * 3).T[:, :, None].float()  # (3, 5832, 1)
    pixels = (colours / 255).permute(1, 2, 0).numpy().astype(np.float32)
    off = np.abs(to_lab(colours).permute(1, 2, 0).numpy() - cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB))
    assert off.max() < 0.5  # its tables are that coarse
    assert off.mean() < 0.1
    assert (to_rgb(to_lab(colours)) - colours).abs().max() < 0.01


def test_lab_of_known_colours() -> None:
    """Values of D65 sRGB primaries as tables print them."""
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [119, 119, 119]])
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    found = to_lab(colours.T[:, :, None])[:, :, 0].T
    assert torch.allclose(found[:5], torch.tensor(expected), atol=0.03)
    assert found[5, 1:].abs().max() < 1e-3


def test_lab_is_not_rounded_by_autocast() -> None:
    images = photographs(2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = to_rgb(to_lab(images))
    assert torch.equal(rough, to_rgb(to_lab(images)))


def test_bins_are_those_that_colours_fall_into() -> None:
    bins = ColourBins()
    assert bins.centres.remainder(10).abs().max() == 0
    assert [0, 0] in bins.centres.tolist()
    assert len(bins.centres.unique(dim=0)) == len(bins.centres) == 261
    random = torch.randint(0, 256, (3, 20000, 1), generator=torch.Generator().manual_seed(0))
    ab = to_lab(random)[1:, :, 0].T  # (20000, 2)
    nearest = (ab / 10).round() * 10
    known = {tuple(centre) for centre in bins.centres.tolist()}
    assert {tuple(each) for each in nearest.tolist()} <= known


def test_colours_are_spread_over_the_five_nearest_bins() -> None:
    bins = ColourBins()
    centres = bins.centres.numpy().astype(float)
    random = np.random.default_rng(0)
    whole = random.integers(-60, 60, size=(2, 2, 4, 5)).astype(float)
    for ab, told in ((whole, True), (whole + random.uniform(-0.5, 0.5, size=whole.shape), False)):
        places, shares = bins.encode(torch.from_numpy(ab).float())
        assert places.shape == shares.shape == (2, 5, 4, 5)
        points = ab.transpose(0, 2, 3, 1).reshape(-1, 1, 2)
        far = ((points - centres) ** 2).sum(axis=2)  # (40, K)
        order = np.argsort(far, axis=1, kind="stable")[:, :5]
        expected = np.zeros_like(far)
        np.put_along_axis(expected, order, np.exp(-np.take_along_axis(far, order, axis=1) / 50), axis=1)
        expected /= expected.sum(axis=1, keepdims=True)
        found = np.zeros_like(far)
        rows = places.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        np.put_along_axis(found, rows, shares.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), axis=1)
        assert np.abs(found - expected).max() < (1e-5 if told else 0.1)
        assert np.abs(found - expected).mean() < (1e-6 if told else 1e-4)


def test_what_is_sure_is_decoded_to_its_bin_and_doubt_is_annealed() -> None:
    bins = ColourBins()
    logits = torch.full((1, len(bins.centres), 1, 1), -30.0)
    logits[0, 17] = 30.0
    assert torch.allclose(bins.decode(logits)[0, :, 0, 0], bins.centres[17], atol=1e-3)
    logits = torch.randn(1, len(bins.centres), 2, 3)
    shares = np.exp(logits.double().numpy()[0] / 0.38)
    expected = np.einsum("khw,kc->chw", shares / shares.sum(axis=0), bins.centres.double().numpy())
    assert np.allclose(bins.decode(logits)[0].numpy(), expected, atol=1e-3)


def test_the_backbone_sees_lightness_alone() -> None:
    images = photographs()
    (seen,), ab = make("Colorization").prepare([images], keys())
    expected = to_lab(images)
    assert seen.shape == images.shape
    for channel in range(3):
        assert torch.allclose(seen[:, channel] / 2.55, expected[:, 0], atol=1e-3)
    assert torch.equal(ab, expected[:, 1:])


def test_rare_colours_count_more_by_the_images_that_were_seen() -> None:
    method = make("Colorization", prior_images=8)
    outputs = [torch.zeros(6, 261, 9, 9)]
    assert torch.allclose(method.rarity(), torch.ones(261))
    _, ab = method.prepare([photographs()], keys())
    places, shares = method.bins.encode(torch.nn.functional.avg_pool2d(ab, 4))
    counts = np.zeros(261)
    np.add.at(counts, places.numpy().ravel(), shares.numpy().ravel())
    method.observe(outputs, ab)
    prior = counts / counts.sum()
    weights = 1 / (0.5 * prior + 0.5 / 261)
    assert np.allclose(method.rarity().numpy(), weights / (weights * prior).sum(), rtol=1e-4)
    method.observe(outputs, ab)
    assert method.prior.sum() == pytest.approx(2 * counts.sum(), rel=1e-5)
    method.observe(outputs, ab)
    assert method.seen == 12
    assert method.prior.sum() == pytest.approx(2 * counts.sum(), rel=1e-5)


def test_the_loss_of_colours_is_that_of_the_weighted_mean() -> None:
    method = make("Colorization")
    _, ab = method.prepare([photographs()], keys())
    method.observe([torch.zeros(6, 261, 9, 9)], ab)
    logits = torch.randn(6, 261, 9, 9)
    places, shares = method.bins.encode(torch.nn.functional.avg_pool2d(ab, 4))
    surprise = -logits.log_softmax(dim=1).gather(1, places)
    expected = ((surprise * shares).sum(dim=1) * method.rarity()[places[:, 0]]).mean()
    assert method.loss([logits], ab).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("blocks", "side", "share"), [("centre", 0.5, 0.25), (1, 0.25, 0.0625), (4, 0.25, None)])
def test_holes_are_where_they_are_said(blocks: Any, side: float, share: float | None) -> None:
    images = photographs(8, 40, 40)
    (seen,), (pixels, weight) = make("Inpainting", blocks=blocks, side=side).prepare([images], keys(8))
    hole = (weight == 1)[:, 0].numpy()  # (8, 40, 40)
    assert np.allclose(pixels.numpy() * 127.5 + 127.5, images.numpy(), atol=1e-3)
    for image, shown, its_hole in zip(images.numpy().astype(float), seen.numpy(), hole, strict=True):
        assert np.allclose(shown[:, ~its_hole], image[:, ~its_hole])
        assert np.allclose(shown[:, its_hole], image[:, ~its_hole].mean(axis=1)[:, None], atol=0.05)
        assert 0 < its_hole.mean() <= 0.25
        assert share is None or its_hole.mean() == share
    grown = [cv2.dilate(each.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0 for each in hole]
    assert np.array_equal((weight[:, 0] == 10).numpy(), np.array(grown) & ~hole)
    assert set(weight.unique().tolist()) == {0, 1, 10}
    if blocks == "centre":
        assert hole[:, 10:30, 10:30].all()
    else:
        assert len({each.tobytes() for each in hole}) == 8


def test_squares_reach_over_edges() -> None:
    found = covered(torch.tensor([[[-1, 2], [3, 3]]]), 3, (5, 6))[0, 0]
    expected = np.zeros((5, 6), bool)
    expected[:2, 2:5] = expected[3:, 3:] = True
    assert np.array_equal(found.numpy(), expected)


def test_the_hole_is_what_counts() -> None:
    method = make("Inpainting", overlap=0.0)
    images = photographs(6, 40, 40)
    _, targets = method.prepare([images], keys())
    pixels, weight = targets
    said = pixels + 100 * (weight == 0)
    assert method.loss([said], targets) == 0
    assert method.loss([pixels + 0.5], targets).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Jigsaw", {"gap": 1.0}, "head.gap=0.125"),
        ("Colorization", {"mixing": 0.0}, "head.mixing=0.5"),
        ("Inpainting", {"blocks": 0}, "head.blocks=4"),
        ("Inpainting", {"blocks": "middle"}, "head.blocks=centre"),
        ("Inpainting", {"side": 1.0}, "head.side=0.25"),
    ],
)
def test_mistakes_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make(name, **options)


def task(name: str) -> Pretraining:
    torch.manual_seed(0)
    options = PRETEXTS[name] | ({"every": False} if name == "Rotation" else {})
    return Pretraining(
        backbone=Tiny(), head=partial(getattr(heads, name), **options), optimizer=partial(AdamW, lr=1e-2)
    )


def batch(count: int = 6) -> dict[str, Any]:
    images = photographs(count)
    return {"image": images, "views": [images], "index": torch.arange(count)}


@pytest.mark.parametrize("name", PRETEXTS)
def test_a_few_steps_lower_the_loss_and_reach_every_weight(name: str) -> None:
    module = task(name)
    module._progress = lambda: 0.5  # type: ignore[method-assign]
    module.watch = lambda *_: None  # type: ignore[method-assign]
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer, losses = AdamW(module.parameters(), lr=1e-2), []
    for step in range(20):
        optimizer.zero_grad()
        loss = module.training_step(batch(), step)
        loss.backward()
        losses.append(loss.item())
        for part, parameter in module.named_parameters():
            assert parameter.grad is not None, part
            assert parameter.grad.isfinite().all(), part
            if step == 0:
                assert parameter.grad.abs().sum() > 0 or part.endswith("bias"), part
        optimizer.step()
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["Rotation", "Jigsaw"])
def test_right_answers_are_counted(name: str) -> None:
    method = make(name)
    labels = torch.tensor([0, 3, 2, 2, 1])
    said = torch.eye(4)[torch.tensor([0, 3, 1, 2, 2])]
    assert method.measure([said], labels).tolist() == [[3, 5]]
    module = task(name).eval()
    module.evaluation_step(batch())
    assert 0 <= module.metrics.compute()[0]["pretext_accuracy"] <= 1


@pytest.mark.parametrize(("name", "sizes"), [("Rotation", 1), ("Jigsaw", 2), ("Colorization", 2), ("Inpainting", 2)])
def test_pictures_show_what_was_asked_and_answered(name: str, sizes: int) -> None:
    module = task(name).eval()
    raw = module.evaluation_step(batch())
    truth = module.truths(batch())[4]
    shown, title = module._answered(**truth)
    assert len(shown) == sizes
    assert all(image.dtype == torch.uint8 for image in shown)
    axes = Figure().subplots()
    module.draw(axes, batch()["image"][4], module.predictions(raw)[4], truth)
    assert axes.images[0].get_array().shape[1] > SIDE
    assert axes.get_title() == title
    module.draw(axes, batch()["image"][4], module.predictions(raw)[4], None)
    assert axes.images[1].get_array().shape[:2] == (SIDE, SIDE)


def test_the_picture_of_a_right_answer_is_the_puzzle_solved() -> None:
    method, images = make("Jigsaw", gap=0.0), photographs(1)
    inputs, labels = method.prepare([images], keys(1))
    said = torch.nn.functional.one_hot(labels, len(method.order)).float()
    (_, solved), title = method.picture(inputs, [said], labels)
    places = corners([12, 12], torch.device("cpu")).expand(1, 9, 2)
    assert torch.equal(solved, laid_out(levelled(cut(images, places, [12, 12]))[0]))
    assert title == "9 of 9 in place"


def test_the_picture_of_known_colours_and_pixels_is_the_image() -> None:
    images = photographs(1, 40, 40)
    method = make("Inpainting")
    inputs, targets = method.prepare([images], keys(1))
    _, filled = method.picture(inputs, [targets[0]], targets)[0]
    assert torch.allclose(filled, images[0].float(), atol=1e-3)
    method = make("Colorization")
    green = torch.tensor([0, 160, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    inputs, ab = method.prepare([green], keys(1))
    places, _ = method.bins.encode(ab)
    logits = 50 * torch.nn.functional.one_hot(places[:, 0], 261).permute(0, 3, 1, 2).float()
    _, coloured = method.picture(inputs, [logits], ab)[0]
    assert (to_lab(coloured) - to_lab(green)[0]).abs().max() < 10


def test_pretexts_take_one_view() -> None:
    with pytest.raises(UsageError, match="makes 2: type augment=one_view"):
        make("Rotation").check(2)
    make("Rotation").check(1)
