from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from visiontasks.backbones import CifarResNet, TorchvisionBackbone
from visiontasks.contracts import Batch, UsageError
from visiontasks.heads import FPN, SkipFCN
from visiontasks.losses import Term, dice, pixel_cross_entropy
from visiontasks.tasks import Segmentation

CLASSES = ("background", "a", "b", "c")


def small(**options: Any) -> Segmentation:
    torch.manual_seed(0)
    return Segmentation(backbone=CifarResNet(depth=20), classes=CLASSES, head=FPN, **options)


def batch(images: int = 6, size: int = 32) -> Batch:
    """Noise, with very different numbers of ignored pixels an image: the last two have nothing else."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    mask = torch.randint(0, len(CLASSES), (images, size, size), dtype=torch.uint8, generator=generator)
    for index in range(images):
        mask[index, : size * (index + 1) // (images - 1)] = 255
    return {"image": pixels, "mask": mask, "index": torch.arange(images)}


def test_logits_have_the_size_of_any_image() -> None:
    task = small().eval()
    for height, width in ((32, 32), (33, 47), (5, 70)):
        assert task(torch.randn(1, 3, height, width)).shape == (1, 4, height, width)


def test_padding_is_cut_off_again() -> None:
    task = small().eval()
    images = torch.randn(1, 3, 30, 32)
    wide = torch.cat([images, images[..., -1:, :], images[..., -1:, :]], dim=2)
    assert torch.equal(task(images), task(wide)[..., :30, :])


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    terms = {"ce": Term(loss=pixel_cross_entropy, weight=2.0), "dice": Term(loss=dice, weight=0.5, class_weights=False)}
    task, data = small(losses=terms, class_weights=[1.0, 2.0, 3.0, 4.0]), batch()
    loss = task.training_step(data, 0)
    logits = task(task.images(data))
    first, second = (
        pixel_cross_entropy(logits, data["mask"], weight=torch.tensor([1.0, 2, 3, 4])),
        dice(logits, data["mask"]),
    )
    assert loss.item() == pytest.approx((2 * first[0] / first[1] + 0.5 * second[0] / second[1]).item(), rel=1e-5)
    oracle = nn.functional.cross_entropy(logits, data["mask"].long(), torch.tensor([1.0, 2, 3, 4]), ignore_index=255)
    assert (first[0] / first[1]).item() == pytest.approx(oracle.item(), rel=1e-5)


def test_the_auxiliary_head_learns_and_answers_nothing() -> None:
    task, data = small(auxiliary=0.4), batch()
    assert task.auxiliary is not None
    task.training_step(data, 0).backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    before = task.eval()(task.images(data))
    nn.init.normal_(next(task.auxiliary.parameters()))
    assert torch.equal(task(task.images(data)), before)


def test_a_batch_with_everything_ignored_gives_a_loss_of_zero() -> None:
    task, data = small(), batch()
    data["mask"].fill_(255)
    loss = task.training_step(data, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(
        torch.count_nonzero(parameter.grad) == 0 for parameter in task.parameters() if parameter.grad is not None
    )


def test_images_of_several_sizes_are_answered_one_by_one() -> None:
    task = small().eval()
    sizes = ((32, 32), (20, 40), (33, 17))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    masks = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    together = task.evaluation_step({"image": images, "mask": masks})
    alone = [task.predict_step({"image": image[None]}, 0)[0] for image in images]
    assert [tuple(mask.shape) for mask in together] == list(sizes)
    assert all(torch.equal(left, right) for left, right in zip(together, alone, strict=True))
    confusion = task.metrics.compute()[1]["confusion"]
    assert int(confusion.sum()) == sum(height * width for height, width in sizes)


def test_flips_make_the_answer_symmetric() -> None:
    task = small(flips=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.allclose(task.infer(images).flip(-1), task.infer(images.flip(-1)), atol=1e-4)


def test_errors_grow_with_the_wrong_pixels_and_leave_ignored_ones_out() -> None:
    task, truth = small(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    truth[:, 4:] = 1
    truth[2] = 255
    guess = truth.clone()
    guess[1, 4:6] = 2
    guess[2] = 3
    errors = task.errors(list(guess), {"mask": truth})["mistakes"]
    assert errors[0] == 0
    assert errors[1] == pytest.approx(1 - (1 + 0.5 + 0) / 3, abs=1e-6)
    assert errors[2] == 0


def test_a_saved_mask_keeps_its_indices_and_shows_its_colours(tmp_path: Path) -> None:
    task, mask = small(), torch.arange(16, dtype=torch.uint8).view(4, 4) % 4
    (prediction,) = task.predictions([mask])
    assert prediction["classes"] == dict.fromkeys(CLASSES, 0.25)
    line = task.save(prediction, tmp_path, "x")
    with Image.open(tmp_path / line["mask"]) as saved:
        assert np.array_equal(np.asarray(saved), mask.numpy())
        assert np.asarray(saved.convert("RGB"))[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_ignored_pixels_are_no_errors_in_the_picture() -> None:
    task, image = small(), torch.full((3, 8, 8), 100, dtype=torch.uint8)
    truth, guess = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
    truth[:4] = 255
    axes = Figure().subplots()
    task.draw(axes, image, {"mask": guess, "classes": {}}, {"mask": truth})
    drawn = axes.get_images()[0].get_array()
    assert drawn is not None
    errors = np.asarray(drawn)[:, -8:]
    assert np.array_equal((errors == [230, 20, 60]).all(axis=2), np.arange(8)[:, None].repeat(8, 1) >= 4)
    assert axes.get_title() == "0% of pixels right"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": [1.0]}, "1 numbers and the masks 4 classes"),
        ({"window": 0}, "task.window=0"),
        ({"window": [64]}, r"task.window=\[64\]"),
        ({"overlap": 1.0}, "task.overlap=1.0"),
        ({"scales": []}, r"task.scales=\[\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        small(**options)


def learner() -> Segmentation:
    """A task without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    head = partial(SkipFCN, skips=1)
    terms = {"ce": Term(), "dice": Term(loss=dice, class_weights=False)}
    backbone = TorchvisionBackbone(name="vgg11")
    return Segmentation(backbone=backbone, classes=CLASSES, head=head, losses=terms, class_weights=[1.0, 2.0, 0.5, 3.0])


def learnt(task: Segmentation, data: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of one step and the figures of one evaluation."""
    nn.init.normal_(task.head.scores[0].weight, std=0.1)  # type: ignore[union-attr, arg-type, index]
    task.training_step(data, 0).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None
    }
    with torch.no_grad():
        task.eval().test_step(data, 0)
    return gradients, task.metrics.compute()[0]


def one_of_three(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    data = {name: value[2 * rank : 2 * rank + 2] for name, value in batch().items()}
    torch.save(learnt(learner(), data), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_with_uneven_ignored_pixels_learn_and_measure_as_one(tmp_path: Path) -> None:
    mp.spawn(one_of_three, args=(str(tmp_path),), nprocs=3)
    gradients, figures = learnt(learner(), batch())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert torch.equal(ranks[0][1]["miou"], ranks[2][1]["miou"])
    for name, value in figures.items():
        assert ranks[1][1][name].item() == pytest.approx(value.item(), rel=1e-6), name
    total = torch.cat([gradient.flatten() for gradient in gradients.values()])
    averaged = torch.cat([sum(rank[0][name] for rank in ranks).flatten() / 3 for name in gradients])  # as DDP does
    assert (averaged - total).norm() < 1e-6 * total.norm()
