"""Networks in whose features images are compared; figures are comparable only under the same one."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.contracts import Backbone, UsageError
from visiontasks.tasks.base import Task
from visiontasks.tasks.classification import Classification
from visiontasks.weights import read_tensors

Seen = tuple[Tensor, Tensor | None]  # features (B, D) and, of a network that knows classes, logits (B, K)
PUBLISHED_SIZE = (224, 224)  # of the images that published networks have learnt


class Extractor(nn.Module):
    """Turns uint8 images (B, 3, H, W) into float32 features (B, D), and logits (B, K) where it knows classes.

    name is what figures carry, source where the weights come from.
    """

    name: str
    source: str
    knows_classes: bool = False

    def look(self, images: Tensor) -> Seen:
        """Features and logits of uint8 images, in full precision and without gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Seen:
        with torch.autocast(images.device.type, enabled=False):
            return self.look(images)

    def digest(self) -> str:
        """Eight letters that tell weights apart."""
        sums = hashlib.sha256()
        for tensor in self.state_dict().values():
            sums.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return sums.hexdigest()[:8]


MakeExtractor = Callable[[], Extractor]


class RandomFeatures(Extractor):
    """Three strided convolutions whose weights are drawn once and for all, so that figures need no file.

    The features are the mean and the deviation of each channel over the image, at every level. Random features tell
    distributions apart, also of images unlike ImageNet's (Naeem et al. 2020, arXiv 2002.09797, section 3.3).
    """

    name = "random"
    source = "drawn by a fixed seed"
    widths = (3, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for level, (given, made) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            weight = torch.randn(made, given, 3, 3, generator=generator) * (2 / (9 * given)) ** 0.5
            self.register_buffer(f"weight{level}", weight)

    def look(self, images: Tensor) -> Seen:
        x = images.float() / 127.5 - 1
        features: list[Tensor] = []
        for weight in self.buffers():
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))  # (B, C, h, w)
            features += torch.std_mean(x, dim=(2, 3), correction=0)  # (B, C) each
        return torch.cat(features, dim=1), None


class TaskFeatures(Extractor):
    """The pooled coarsest level of a task's backbone and, where the task tells classes apart, its logits.

    size is the height and width that the backbone has learnt, to which images are resized.
    """

    def __init__(self, task: Task, *, name: str, source: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.task: Any = task
        self.name = name
        self.source = source
        self.size = size
        self.knows_classes = isinstance(task, Classification) and not task.multi_label

    def look(self, images: Tensor) -> Seen:
        if images.shape[-2:] != self.size:
            images = F.interpolate(images.float(), size=self.size, mode="bilinear", antialias=True)
        levels = self.task.backbone(self.task.images({"image": images}))
        features = levels[-1].float().mean(dim=(2, 3))  # (B, C)
        return features, self.task.head(levels) if self.knows_classes else None


def published_features(backbone: Backbone, *, name: str, source: str) -> TaskFeatures:
    """A published backbone, without its classifier."""
    task = Task(backbone=backbone, classes=(), monitor="", mode="")
    return TaskFeatures(task, name=name, source=source, size=PUBLISHED_SIZE)


class Inception(Extractor):
    """torch-fidelity's Inception-v3, under which published FIDs are measured: 2048 features, 1008 classes.

    weights names its weights file; None has torch-fidelity download it.
    Raises UsageError where torch-fidelity is not installed, or the weights cannot be had.
    """

    name = "inception"
    knows_classes = True

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        network: Any = _inception()
        self.source = weights or "downloaded by torch-fidelity"
        if weights is not None:
            read_tensors(weights)  # refuses a file of more than tensors, which torch-fidelity would run
        try:
            self.net = network(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except (OSError, RuntimeError) as error:
            why = str(error).split("\n", maxsplit=1)[0]
            raise UsageError(
                f"Inception's weights cannot be had ({why}): type task.extractor=inception:FILE with torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth, or task.extractor=PATH with a run of yours."
            ) from error

    def look(self, images: Tensor) -> Seen:
        features, logits = self.net(images)
        return features, logits


def _inception() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(
            "task.extractor=inception wants torch-fidelity: pip install torch-fidelity, or type task.extractor=PATH "
            "with a run of yours."
        ) from error
    return FeatureExtractorInceptionV3
