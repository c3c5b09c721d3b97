"""Generation by densities: each step is the one that a bare loop takes, and bits are those that numpy computes."""

import copy
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from scipy.special import expit
from torch import Tensor, nn
from torch.optim import SGD

from tests.tasks.generation_parts import CLASSES, fit, images
from tests.tasks.pretraining_parts import Tiny
from visiontasks import heads
from visiontasks.backbones import GatedPixelCNN
from visiontasks.contracts import Batch, UsageError
from visiontasks.heads.generation.generators import TransposedGenerator
from visiontasks.layers.batch_norm import ProcessBatchNorms
from visiontasks.layers.distributed import rank, world_size
from visiontasks.layers.draws import draws, image_keys
from visiontasks.tasks import Generation, Likelihood
from visiontasks.tasks.generative import EVALUATION, normal
from visiontasks.tasks.optimisation import constant

pytestmark = pytest.mark.usefixtures("one_thread")

SIDES = {"vae": 16, "pixelcnn": 5, "told": 5}
SHARES = (slice(0, 4), slice(4, 7))  # of seven images, for each of two processes
Figures = dict[str, Tensor]


def made(name: str, *, seed: int = 0, task: dict[str, Any] | None = None, **options: Any) -> Likelihood:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"optimizer": partial(SGD, lr=0.02, momentum=0.5), "scheduler": constant, "measured": 6}
    settings |= {"classes": CLASSES, "image_size": SIDES[name], "neighbours": 0} | (task or {})
    if name == "vae":
        generator = partial(TransposedGenerator, latent_dim=6, width=4)
        return Likelihood(backbone=Tiny(), head=partial(heads.VAE, generator=generator, **options), **settings)
    kind = heads.PixelCNN if name == "pixelcnn" else heads.ConditionalPixelCNN
    head = partial(kind, **({"depth": 1, "hidden": 6, "values": 4} | options))
    return Likelihood(backbone=GatedPixelCNN(depth=2, width=6), head=head, **settings)


def batches(name: str, count: int = 16, *, batch_size: int = 8) -> list[Batch]:
    side = SIDES[name]
    return [each | {"image": each["image"][:, :, :side, :side]} for each in images(count, batch_size=batch_size)]


def bare(task: Likelihood, given: list[Batch], *, beta: float) -> nn.Module:
    """A copy of a task after a plain loop over the batches, whose loss is written out."""
    own = copy.deepcopy(task).train()
    optimizer = SGD(own.parameters(), lr=0.02, momentum=0.5)
    for batch in given:
        pixels = batch["image"].float()
        if isinstance(own.head, heads.VAE):
            noise = normal(draws(image_keys(batch["index"], seed=0, epoch=0), 6))
            flat = own.backbone((pixels / 255 - 0.5) / 0.5)[-1].flatten(1)  # (B, 8 * 4 * 4)
            mean, log_variance = F.linear(flat, own.head.code.weight, own.head.code.bias).split(6, dim=1)
            decoded = (own.head.generator(mean + (0.5 * log_variance).exp() * noise) + 1) * 127.5
            scale, decoded = own.head.log_scale.double().exp().view(1, 3, 1, 1), decoded.double()  # far from the mean
            ends = torch.sigmoid((pixels + 0.5 - decoded) / scale), torch.sigmoid((pixels - 0.5 - decoded) / scale)
            share = ends[0].where(pixels < 255, 1) - ends[1].where(pixels > 0, 0)
            nats = -share.log().sum() + beta * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
        else:
            values = (pixels * 3 / 255).round().long()
            stacks = own.backbone((values * 85 / 255 - 0.5) / 0.5)[0].chunk(2, dim=1)
            stacks = own.head.layers[0](*stacks, batch["label"] if own.conditional else None)
            logits = own.head.last(own.head.hidden(stacks[1].relu()).relu())  # (B, 3 * 4, H, W)
            logits = logits.view(len(pixels), 3, 4, *pixels.shape[2:])
            nats = -logits.log_softmax(dim=2).gather(2, values[:, :, None]).sum()
        optimizer.zero_grad()
        (nats / pixels.numel() / math.log(2)).backward()
        optimizer.step()
    return own


@pytest.mark.parametrize(("name", "options"), [("vae", {"beta": 2.0}), ("pixelcnn", {}), ("told", {})])
def test_steps_are_those_of_a_bare_loop(name: str, options: dict[str, Any]) -> None:
    task, given = made(name, **options), batches(name)
    start = copy.deepcopy(task)
    expected = bare(task, given, beta=options.get("beta", 1.0))
    trainer = fit(task, given)
    assert trainer.global_step == 2
    rows = [nn.utils.parameters_to_vector(each.parameters()) for each in (task, expected, start)]
    assert (rows[0] - rows[1]).abs().max() < 1e-6
    assert (rows[0] - rows[2]).abs().max() > 1e-3


def evaluated(task: Likelihood, given: list[Batch]) -> Figures:
    task.eval()
    with torch.no_grad():
        for batch in given:
            task.evaluation_step(batch)
    figures, _ = task.metrics.compute()
    return figures


def test_bits_of_a_vae_are_those_of_numpy() -> None:
    task, given = made("vae", beta=3.0), batches("vae", 7, batch_size=4)
    with torch.no_grad():
        task.head.log_scale.copy_(torch.tensor([3.0, 4.0, 5.0]))
    found = evaluated(task, given)
    reconstruction, divergence = [], []
    for batch in given:
        pixels = batch["image"].double().numpy()
        noise = normal(draws(image_keys(batch["index"], seed=0, epoch=EVALUATION), 6))
        with torch.no_grad():
            mean, log_variance = task.head.encode(task(task.images(batch)))
            decoded = task.head.decode(mean + (log_variance / 2).exp() * noise).double().numpy()
        mean, log_variance = mean.double().numpy(), log_variance.double().numpy()
        scale = np.exp([3.0, 4.0, 5.0])[:, None, None]
        above = np.where(pixels < 255, expit((pixels + 0.5 - decoded) / scale), 1)
        share = above - np.where(pixels > 0, expit((pixels - 0.5 - decoded) / scale), 0)
        reconstruction += list(-np.log(share).sum(axis=(1, 2, 3)))
        divergence += list(0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=1))
    parts, dimensions = (np.mean(reconstruction), np.mean(divergence)), 3 * 16 * 16
    assert found["bits_per_dim"].item() == pytest.approx(sum(parts) / dimensions / np.log(2), rel=1e-5)
    assert found["elbo"].item() == pytest.approx(-sum(parts), rel=1e-5)
    assert (found["reconstruction"].item(), found["divergence"].item()) == pytest.approx(parts, rel=1e-5)
    assert found["loss"].item() == pytest.approx((parts[0] + 3 * parts[1]) / dimensions / np.log(2), rel=1e-5)


@pytest.mark.parametrize("name", ["pixelcnn", "told"])
def test_bits_of_a_pixelcnn_are_those_of_numpy(name: str) -> None:
    task, given = made(name), batches(name, 7, batch_size=4)
    found = evaluated(task, given)
    nats = []
    for batch in given:
        values = np.rint(batch["image"].numpy() / 85).astype(int)
        with torch.no_grad():
            (maps,) = task.backbone(torch.from_numpy(values * 85 / 127.5 - 1).float())
            stacks = task.head.layers[0](*maps.chunk(2, dim=1), batch["label"] if name == "told" else None)
            logits = task.head.logits(stacks[1]).double().numpy()
        shares = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
        nats += list(-np.log(np.take_along_axis(shares, values[:, :, None], axis=2)).sum(axis=(1, 2, 3, 4)))
    assert found["bits_per_dim"].item() == pytest.approx(np.mean(nats) / 75 / np.log(2), rel=1e-5)
    assert found["log_likelihood"].item() == pytest.approx(-np.mean(nats), rel=1e-5)
    assert found["fid"].isfinite()
    assert "likelihood" not in found


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("vae", "pixelcnn"):
        whole, first, second = (made(name) for _ in range(3))
        fit(whole, batches(name), max_epochs=2)
        fit(first, batches(name), max_epochs=1).save_checkpoint(tmp_path / f"{name}.ckpt")
        trainer = fit(second, batches(name), max_epochs=2, ckpt=tmp_path / f"{name}.ckpt")
        assert trainer.global_step == 4
        assert all(
            torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values(), strict=True)
        )


def learnt(name: str) -> Figures:
    """The weights after three steps on seven images each, and the figures of seven images."""
    task = made(name, task={"optimizer": partial(SGD, lr=0.005)})
    own = [
        {key: value[SHARES[rank()]] if world_size() > 1 else value for key, value in batch.items()}
        for batch in batches(name, 21, batch_size=7)
    ]
    together: dict[str, Any] = {"devices": world_size(), "use_distributed_sampler": False}
    if world_size() > 1:
        together |= {"strategy": "ddp", "sync_batchnorm": True, "plugins": [ProcessBatchNorms()]}
    fit(task, own, **together)
    figures = {f"figure {key}": value for key, value in evaluated(task, own[:1]).items()}
    return {key: value.clone() for key, value in task.state_dict().items() if value.is_floating_point()} | figures


def learn(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(process), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    torch.save({name: learnt(name) for name in SIDES}, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_unequal_parts_learn_and_measure_what_one_does(tmp_path: Path) -> None:
    expected = {name: learnt(name) for name in SIDES}
    mp.start_processes(learn, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        for name, values in expected.items():
            assert found[name].keys() == values.keys()
            for key, value in values.items():
                error = (found[name][key] - value).norm() / value.norm().clamp(min=1e-6)
                assert error < (1e-3 if "figure" in key and "fid" in key else 2e-5), (name, key, error)


@pytest.mark.parametrize("name", SIDES)
def test_samples_follow_from_their_noise_alone(name: str) -> None:
    task, side = made(name), SIDES[name]
    latents = task.latents(2, seed=3)
    labels = torch.tensor([0, 2]) if task.conditional else None
    pictures = task.sample(latents, labels)
    assert pictures.shape == (2, 3, side, side)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures[1:], task.sample(latents[1:], None if labels is None else labels[1:]))
    assert not torch.equal(pictures[0], pictures[1])
    assert task.training


def test_samples_are_made_in_evaluation_mode_and_change_nothing() -> None:
    task = made("vae")
    before = copy.deepcopy(task.state_dict())
    task.train()
    task.backbone.stages[0].eval()  # as what is frozen
    alone = [task.sample(row[None]) for row in task.latents(3)]
    assert torch.equal(torch.cat(alone), task.sample(task.latents(3)))  # a batch norm sees no batch
    back = task.reconstruct(batches("vae")[0]["image"])
    assert back is not None
    assert (back.dtype, back.shape) == (torch.uint8, (8, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert task.training
    assert task.backbone.stages[1].training
    assert not task.backbone.stages[0].training
    assert made("pixelcnn").reconstruct(batches("pixelcnn")[0]["image"]) is None


def test_a_grey_backbone_learns_the_bits_of_grey_pictures() -> None:
    torch.manual_seed(0)
    head = partial(heads.PixelCNN, depth=1, hidden=6, values=4)
    task = Likelihood(backbone=GatedPixelCNN(depth=1, width=4, in_channels=1), head=head, image_size=5, measured=2)
    pictures = task.sample(task.latents(3))
    assert pictures.shape == (3, 3, 5, 5)
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    bits = task.predict_step(batches("pixelcnn")[0], 0)
    assert bits.shape == (8,)
    assert (bits - 2).abs().max() < 0.5  # two bits a pixel of four values, of which it knows nothing


def test_any_precision_that_other_tasks_have_will_do() -> None:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    task = made("vae")
    start = copy.deepcopy(task)
    fit(task, batches("vae"), plugins=[scaled], accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert not torch.equal(task.head.code.weight, start.head.code.weight)
    full, mixed = made("pixelcnn"), made("pixelcnn")
    start = copy.deepcopy(full)
    fit(full, batches("pixelcnn"))
    fit(mixed, batches("pixelcnn"), precision="bf16-mixed")
    rows = [nn.utils.parameters_to_vector(each.parameters()) for each in (full, mixed, start)]
    assert F.cosine_similarity(rows[0] - rows[2], rows[1] - rows[2], dim=0) > 0.99


def test_a_head_chooses_what_task_generation_is() -> None:
    assert Generation.under(heads.VAE) is Generation.under(heads.ConditionalPixelCNN) is Likelihood
    assert Generation.under(heads.GAN) is Generation
    assert Likelihood.required(heads.ConditionalPixelCNN) == {"label"}
    assert Likelihood.required(heads.VAE) == frozenset()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: made("vae", task={"generator_lr": 1e-4}),
            r"task.generator_lr=0.0001 is of a game.*type optimizer.lr=",
        ),
        (lambda: made("vae", task={"ema": 0.9}), r"type callbacks.ema.decay=0.9, of all weights"),
        (
            lambda: Likelihood(backbone=Tiny(), head=heads.PixelCNN, image_size=5),
            "PixelCNN learns each pixel from those before it, and Tiny sees them all: leave out backbone=",
        ),
        (lambda: made("told").sample(torch.zeros(1, 75)), "give labels, one a picture"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()
