"""Tasks whose head is a density: their steps, figures and refusals."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from tests.tasks.generation_parts import CLASSES, SIDE, fit, images
from tests.tasks.pretraining_parts import Tiny
from visiontasks import heads
from visiontasks.backbones import GatedPixelCNN
from visiontasks.contracts import UsageError
from visiontasks.heads.generation.generators import TransposedGenerator
from visiontasks.heads.pretraining.draws import draws, image_keys
from visiontasks.tasks import Generation, Likelihood
from visiontasks.tasks.generative import normal
from visiontasks.tasks.optimisation import constant

DIMENSIONS = 3 * SIDE * SIDE
RATE = 0.01
VAE = partial(heads.VAE, generator=partial(TransposedGenerator, latent_dim=6, width=4), beta=2.0)
PIXELCNN = partial(heads.PixelCNN, depth=1, hidden=9, values=8)
CONDITIONAL = partial(heads.ConditionalPixelCNN, depth=1, hidden=9, values=8)


def made(head: Any = VAE, **options: Any) -> Likelihood:
    torch.manual_seed(0)
    backbone = Tiny() if head is VAE else GatedPixelCNN(depth=2, width=6)
    settings: dict[str, Any] = {"optimizer": partial(SGD, lr=RATE), "scheduler": constant} | options
    return Likelihood(backbone=backbone, classes=CLASSES, head=head, image_size=SIDE, **settings)


def bare_loss(task: Likelihood, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a VAE, of the parts that torch has."""
    pixels = batch["image"].float()
    mean, log_variance = task.head.code(
        F.adaptive_avg_pool2d(task.backbone(pixels / 127.5 - 1)[-1], 4).flatten(1)
    ).chunk(2, 1)
    noise = normal(draws(image_keys(batch["index"], seed=0, epoch=0), 6))
    decoded = (task.head.generator(mean + (log_variance / 2).exp() * noise) + 1) * 127.5
    scale = task.head.log_scale.exp()[:, None, None]
    upper = torch.where(pixels == 255, 1.0, torch.sigmoid((pixels + 0.5 - decoded).double() / scale))
    lower = torch.where(pixels == 0, 0.0, torch.sigmoid((pixels - 0.5 - decoded).double() / scale))
    nats = -(upper - lower).log().sum() + 2.0 * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
    return nats / len(pixels) / DIMENSIONS / np.log(2)  # type: ignore[no-any-return]


def bare_pixelcnn_loss(task: Likelihood, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a PixelCNN: the cross-entropy of its values."""
    values = (batch["image"].float() * 7 / 255).round().long()
    stacks = task.backbone((values * 255 / 7).round() / 127.5 - 1)[-1].chunk(2, dim=1)
    for layer in task.head.layers:
        stacks = layer(*stacks)
    logits = task.head.last(F.relu(task.head.hidden(F.relu(stacks[1])))).unflatten(1, (3, 8))
    return F.cross_entropy(logits.transpose(1, 2), values) / np.log(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("head", "loss"), [(VAE, bare_loss), (PIXELCNN, bare_pixelcnn_loss)])
def test_training_is_that_of_a_bare_loop(head: Any, loss: Any) -> None:
    task, bare, batches = made(head), made(head), images(24)
    optimizer = SGD(bare.parameters(), lr=RATE)
    for batch in batches:
        optimizer.zero_grad()
        loss(bare.train(), batch).backward()
        optimizer.step()
    fit(task, batches)
    rows = [torch.cat([each.detach().flatten() for each in learner.parameters()]) for learner in (task, bare)]
    start = torch.cat([each.detach().flatten() for each in made(head).parameters()])
    assert (rows[0] - rows[1]).norm() < 1e-6 * rows[1].norm()
    assert (rows[1] - start).norm() > 1e-4 * start.norm()


@pytest.mark.parametrize("head", [VAE, PIXELCNN, CONDITIONAL])
def test_figures_are_the_means_of_images(head: Any) -> None:
    task = made(head, measured=4).eval()
    task.metrics.prepare()
    with torch.no_grad():
        bits = torch.cat([task.evaluation_step(batch) for batch in images(11, batch_size=4)])
        parts = torch.cat([task.surprise(batch, epoch=-1) for batch in images(11, batch_size=4)])
    figures = {name: float(value) for name, value in task.metrics.compute()[0].items()}
    assert figures["bits_per_dim"] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert figures["bits_per_dim"] == pytest.approx(parts.sum(dim=1).mean().item() / DIMENSIONS / np.log(2), rel=1e-5)
    weights = torch.tensor(task.head.weights)
    assert figures["loss"] == pytest.approx((parts @ weights).mean().item() / DIMENSIONS / np.log(2), rel=1e-5)
    assert figures["elbo" if head is VAE else "log_likelihood"] == pytest.approx(
        -parts.sum(dim=1).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("head", [VAE, PIXELCNN, CONDITIONAL])
def test_samples_follow_from_their_noise_alone(head: Any) -> None:
    task = made(head)
    task.image_size = (SIDE, SIDE)
    latents = task.latents(2, seed=3)
    labels = torch.tensor([0, 2]) if task.conditional else None
    pictures = task.sample(latents, labels)
    assert pictures.shape == (2, 3, SIDE, SIDE)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures[1:], task.sample(latents[1:], None if labels is None else labels[1:]))
    assert not torch.equal(pictures[0], pictures[1])
    assert task.training


def test_only_what_has_codes_gives_images_back() -> None:
    (batch,) = images(3)
    back = made(VAE).reconstruct(batch["image"])
    assert back is not None
    assert back.shape == batch["image"].shape
    assert made(PIXELCNN).reconstruct(batch["image"]) is None


def test_the_head_decides_what_the_task_is() -> None:
    assert Generation.under(heads.VAE) is Likelihood
    assert Generation.under(heads.GAN) is Generation
    assert Generation.under(heads.ConditionalPixelCNN).required(heads.ConditionalPixelCNN) == {"label"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(made, generator_lr=1e-4), r"task\.generator_lr=0\.0001 is of a game"),
        (partial(made, ema=0.9), r"task\.ema=0\.9 is of a game's generator: type callbacks\.ema\.decay=0\.9"),
        (
            partial(Likelihood, backbone=Tiny(), head=PIXELCNN, image_size=SIDE, optimizer=SGD, scheduler=constant),
            r"PixelCNN learns each pixel from those before it, and Tiny sees them all: leave out backbone=",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()
