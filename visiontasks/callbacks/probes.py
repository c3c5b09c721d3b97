"""What the features know while they are learnt: probes at validation, which touch nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning import Callback, Trainer
from torch import Tensor

from visiontasks.callbacks.features import Features, annotations, say
from visiontasks.contracts import IGNORE, Batch, UsageError
from visiontasks.layers.distributed import in_order, sum_over_processes
from visiontasks.layers.modes import at_rest
from visiontasks.tasks.dense_probe import draw_pixels, pixel_features, pixel_logits
from visiontasks.tasks.probes import fit_linear, nearest_classes
from visiontasks.tasks.segmentation_metrics import PixelConfusion, confusion_figures, predicted_classes


class Probe(Protocol):
    """Learns from the bank, then judges validation images; both are spread over the processes."""

    def learn(self, batch: Batch) -> None: ...

    def fit(self) -> None: ...

    def judge(self, batch: Batch) -> None: ...

    def figures(self) -> Mapping[str, Tensor]: ...


class Probes(Callback):
    """Logs how well the backbone's features, as they are, tell the classes apart that the training does not see.

    The bank is `data.probe_dataloader()`: training images, as evaluation shows them. Of pooled features, against one
    label an image: val/knn and val/knn_N, the accuracy of the weighted votes of the `neighbours` nearest in the bank
    (Wu et al. 2018, arXiv 1805.01978), the first number without its N; val/linear, that of a logistic regression fitted
    to the bank. With `dense`, against masks: val/dense_miou, the mean IoU of a logistic regression of all levels at a
    pixel (hypercolumns, Hariharan et al. 2015, arXiv 1411.5752), fitted to `dense_pixels` pixels of the bank.

    No weight is kept from one time to the next, and the backbone, its statistics, gradients and mode, and the random
    state stay as they are. The figures are the same on any number of processes. They are measured in the validations
    of every `every_n_epochs`-th epoch from the first on and of the last one, in time for checkpoints and early stopping
    to monitor them, and with `untrained` also before the first step. What cannot be measured is named when the run
    starts.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        neighbours: Sequence[int] = (20, 200),
        temperature: float = 0.07,
        decay: float = 1e-3,
        dense: bool = False,
        dense_pixels: int = 20_000,
        untrained: bool = True,
    ) -> None:
        if every_n_epochs < 1:
            raise UsageError(f"every_n_epochs={every_n_epochs} is no number of epochs: give 1 or more.")
        self.every_n_epochs = every_n_epochs
        self.neighbours = tuple(neighbours)
        self.temperature = temperature
        self.decay = decay
        self.dense = dense
        self.dense_pixels = dense_pixels
        self.untrained = untrained
        self.bank: Any = None  # the loader
        self.kinds: list[str] = []
        self.probes: list[Probe] = []
        self._measured = False
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured, "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured, self._begun = state_dict["measured"], state_dict["begun"]

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Has the masks read where they are probed and the data have them."""
        if stage == "fit" and self.dense:
            module.wants = module.wants | {"mask"}
            _data(trainer).setup()

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:  # noqa: ARG002
        """Looks at what the data have, and says what will not be measured."""
        data = _data(trainer)
        self.bank = data.probe_dataloader()
        sample, images = annotations(self.bank), len(self.bank.dataset)
        classes = "label" in sample and not getattr(sample["label"], "ndim", 0)
        self.kinds = [*(["label"] if classes else []), *(["mask"] if self.dense and "mask" in sample else [])]
        name = type(data).__name__
        lines = []
        if not classes:
            found = "several labels" if "label" in sample else "no label"
            lines.append(f"no val/knn and val/linear: an image of {name} has {found}")
        if self.dense and "mask" not in sample:
            lines.append(f"no val/dense_miou: an image of {name} has no mask")
        if classes and max(self.neighbours) > images:
            lines.append(f"all {images} images of the bank vote where {max(self.neighbours)} neighbours are asked for")
        say(trainer, lines)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Measures the backbone before its first step."""
        begun, self._begun = self._begun, True
        if not (self.untrained and self.kinds) or trainer.global_step or begun:
            return
        with at_rest(module):
            probes = self._fitted(trainer, module)
            for batch in Features(trainer, module).batches(_data(trainer).probe_dataloader("val")):
                for probe in probes:
                    probe.judge(batch)
            figures = {name: value.item() for probe in probes for name, value in probe.figures().items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)
        say(trainer, ["untrained " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())])

    def on_validation_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """Fits the probes here and not later, where a moving average of the weights would be gone again."""
        self.probes = self._fitted(trainer, module) if self.kinds and self._due(trainer) else []

    def on_validation_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: Any,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Batch,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        for probe in self.probes:
            probe.judge(batch)

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:  # noqa: ARG002
        for probe in self.probes:
            for name, value in probe.figures().items():
                module.log(name, value.float(), prog_bar=name == module.monitor)
        self._measured = self._measured or bool(self.probes)
        self.probes = []

    def _due(self, trainer: Trainer) -> bool:
        """Whether this validation measures; the first of a run does, so that there is a figure to monitor."""
        epoch = trainer.current_epoch
        regular = epoch % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs
        return not trainer.sanity_checking and (regular or not self._measured)

    def _fitted(self, trainer: Trainer, module: Any) -> list[Probe]:
        features = Features(trainer, module)
        probes = [self._probe(kind, features, _data(trainer)) for kind in self.kinds]
        for batch in features.batches(self.bank):
            for probe in probes:
                probe.learn(batch)
        for probe in probes:
            probe.fit()
        return probes

    def _probe(self, kind: str, features: Features, data: Any) -> Probe:
        if kind == "label":
            return LabelProbe(features, len(data.classes), self.neighbours, self.temperature, self.decay)
        share = -(-self.dense_pixels // len(self.bank.dataset))
        return DenseProbe(features, len(data.target_classes), share, self.decay, data.seed)


class LabelProbe:
    """Nearest neighbours and a logistic regression of pooled features, against one label an image."""

    def __init__(
        self, features: Features, classes: int, neighbours: tuple[int, ...], temperature: float, decay: float
    ) -> None:
        self.features = features
        self.classes = classes
        self.neighbours = neighbours
        self.temperature = temperature
        self.decay = decay
        names = ["val/knn", *(f"val/knn_{number}" for number in neighbours[1:]), "val/linear"]
        self.counts = torch.zeros(
            len(names) + 1, dtype=torch.int64, device=features.module.device
        )  # images, then right
        self.names = names
        self.parts: list[tuple[Tensor, ...]] = []

    def learn(self, batch: Batch) -> None:
        self.parts.append((self.features.pooled(batch), batch["index"], batch["label"]))

    def fit(self) -> None:
        self.bank, _, self.labels = in_order(self.parts, self.features.module.device)
        self.linear = fit_linear(self.bank, self.labels, classes=self.classes, decay=self.decay)

    def judge(self, batch: Batch) -> None:
        features, labels = self.features.pooled(batch), batch["label"]
        elected = nearest_classes(
            features,
            self.bank,
            self.labels,
            classes=self.classes,
            neighbours=self.neighbours,
            temperature=self.temperature,
        )  # (R, B)
        guesses = torch.cat((elected, self.linear(features).argmax(dim=1)[None]))  # (R + 1, B)
        right = (guesses == labels).sum(dim=1)
        self.counts += torch.cat((right.new_tensor([len(labels)]), right))

    def figures(self) -> Mapping[str, Tensor]:
        images, *right = sum_over_processes(self.counts).double()
        return {name: count / images for name, count in zip(self.names, right, strict=True)}


class DenseProbe:
    """A logistic regression of all levels at a pixel, against masks."""

    def __init__(self, features: Features, classes: int, share: int, decay: float, seed: int) -> None:
        self.features = features
        self.classes = classes
        self.share = share  # pixels of an image
        self.decay = decay
        self.seed = seed
        self.multiple = max(level.stride for level in features.module.backbone.levels)
        self.confusion = PixelConfusion(classes).to(features.module.device)
        self.parts: list[tuple[Tensor, ...]] = []

    def learn(self, batch: Batch) -> None:
        masks, index = batch["mask"], batch["index"]
        numbered = zip(masks, index.tolist(), strict=True)
        pixels = torch.stack([draw_pixels(mask, self.share, seed=self.seed, index=k) for mask, k in numbered])
        values = masks[torch.arange(len(masks))[:, None], pixels[..., 0], pixels[..., 1]].flatten()  # (B * P,)
        features = pixel_features(self._levels(batch), pixels, self._size(masks)).flatten(0, 1)  # (B * P, C)
        counted = values != IGNORE
        self.parts.append((features[counted], index.repeat_interleave(self.share)[counted], values[counted].long()))

    def fit(self) -> None:
        features, _, values = in_order(self.parts, self.features.module.device)
        self.linear = fit_linear(features, values, classes=self.classes, decay=self.decay)

    def judge(self, batch: Batch) -> None:
        masks = batch["mask"]
        height, width = masks.shape[-2:]
        logits = pixel_logits(self._levels(batch), self.linear, self._size(masks))[..., :height, :width]
        self.confusion.update(predicted_classes(logits), masks)

    def figures(self) -> Mapping[str, Tensor]:
        return {"val/dense_miou": confusion_figures(self.confusion.compute())[0]["miou"]}

    def _levels(self, batch: Batch) -> list[Tensor]:
        return self.features.pyramid(batch, multiple=self.multiple)

    def _size(self, masks: Tensor) -> tuple[int, int]:
        height, width = (-(-side // self.multiple) * self.multiple for side in masks.shape[-2:])
        return height, width


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule")  # noqa: B009
