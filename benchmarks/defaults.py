"""A default run against the same network, data and recipe in a stock Lightning script: images a second and accuracy.

python benchmarks/defaults.py [--epochs 4] [--backbone resnet18]

Stock means float32, the default memory layout, PIL images, torchvision transforms, two loader workers, self.log and a
metric's forward every step. Both train on the embedded digits, ours first; the rates are medians over epochs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from overhead import composed
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import models, transforms

from visiontasks.cli.build import build_data, build_task, build_trainer
from visiontasks.cli.train import quieten
from visiontasks.data.source import Source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Rate(Callback):
    """Images a second of each epoch, validation not counted."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start, self.images = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch["image"] if isinstance(batch, dict) else batch[0])
        self.stop = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.epochs.append(self.images / (self.stop - self.start))


class Pictures(Dataset[tuple[Tensor, int]]):
    """The scenes as PIL images through torchvision transforms."""

    def __init__(self, source: Source, transform: Any) -> None:
        self.images = [Image.fromarray(source[index]["image"]) for index in range(len(source))]
        self.labels = [int(source[index]["label"]) for index in range(len(source))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Stock(LightningModule):
    """The module of the tutorials."""

    def __init__(self, name: str, steps: int) -> None:
        super().__init__()
        self.net = models.get_model(name, num_classes=10)
        self.train_accuracy, self.accuracy = (
            MulticlassAccuracy(10, average="micro"),
            MulticlassAccuracy(10, average="micro"),
        )
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1], label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy(logits, batch[1]), prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, self.steps, pct_start=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def ours(config: dict[str, Any], folder: Path) -> tuple[Rate, float]:
    """Epoch rates and test accuracy of the default run."""
    rate, data = Rate(), build_data(config)
    data.select(frozenset({"label"}))
    data.setup()
    task = build_task(config, classes=data.classes)
    trainer = build_trainer(config, folder=folder)
    trainer.callbacks.append(rate)  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=data)
    (tested,) = trainer.test(task, datamodule=data, verbose=False)
    return rate, tested["test/accuracy"]


def stock(config: dict[str, Any], folder: Path, size: int) -> tuple[Rate, float]:
    """Epoch rates and test accuracy of the stock script."""
    rate, data = Rate(), build_data(config)
    data.select(frozenset({"label"}))
    data.setup()
    scale = tuple(config["augment"]["train"]["scale"])
    amount = [config["augment"]["train"][name] for name in ("brightness", "contrast", "saturation", "hue")]
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    first = [transforms.RandomResizedCrop(size, scale), transforms.ColorJitter(*amount)]
    train = Pictures(data.source("train"), transforms.Compose([*first, *last]))
    test = Pictures(data.source("test"), transforms.Compose(last))
    batch, epochs = config["data"]["batch_size"], config["trainer"]["max_epochs"]
    loader = DataLoader(train, batch, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True)
    module = Stock(config["backbone"]["name"], epochs * len(loader))
    trainer = Trainer(max_epochs=epochs, callbacks=[rate], default_root_dir=folder)
    trainer.fit(module, loader)
    (tested,) = trainer.test(module, DataLoader(test, batch), verbose=False)
    return rate, tested["test/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--backbone", default="resnet18")
    options = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as name:
        config = composed([f"backbone={options.backbone}"], Path(name))
        config["trainer"]["max_epochs"] = options.epochs
        size = config["data"]["image_size"]
        seed_everything(0, verbose=False)
        mine, accuracy = ours(config, Path(name))
        seed_everything(0, verbose=False)
        theirs, other = stock(config, Path(name), size)
    rates = [statistics.median(rate.epochs) for rate in (mine, theirs)]
    print(f"{options.backbone}, {size} px, {options.epochs} epochs of {config['data']['train_size']} scenes")
    print(f"ours  {rates[0]:6.0f} images a second, test accuracy {accuracy:.3f}")
    print(f"stock {rates[1]:6.0f} images a second, test accuracy {other:.3f}")
    print(f"ratio {rates[0] / rates[1]:.2f} (target 2.0 on a CPU with native bf16)")


if __name__ == "__main__":
    main()
