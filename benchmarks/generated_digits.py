"""How many generated digits a classifier, trained by this project on the real ones, recognises for sure.

python benchmarks/generated_digits.py RUN                    a run of task=generation on digit scenes
python benchmarks/generated_digits.py RUN --samples 2000 --classifier RUN_OF_A_CLASSIFIER
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from visiontasks.cli.build import build_data, find_checkpoint, load_task, read_checkpoint
from visiontasks.tasks import Classification, Generation

ROOT = Path(__file__).parents[1]
SURE = 0.9
BATCH = 250
SETTINGS = ("backbone=resnet20", "augment=light_geometry", "task.label_smoothing=0", "data.batch_size=64")
KEPT = ("digits", "digit_size", "plain", "image_size", "train_size")  # of the data that the generator has learnt from


def learn(data: dict[str, object], epochs: int, folder: Path) -> Path:
    """Trains a classifier on the same digits."""
    same = [f"data.{key}={data[key]}".replace(" ", "") for key in KEPT]
    words = [*SETTINGS, *same, f"trainer.max_epochs={epochs}", "trainer.enable_progress_bar=false"]
    command = [sys.executable, "train.py", "data=digit_scenes", *words, f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@torch.inference_mode()
def probabilities(task: Classification, images: Tensor) -> Tensor:
    """What the classifier says of images (N, 3, H, W), (N, K)."""
    parts = [task(task.images({"image": part})) for part in images.split(BATCH)]
    return task.probabilities(torch.cat(parts))


def judged(name: str, given: Tensor) -> None:
    scores, chosen = given.max(dim=1)
    shares = torch.bincount(chosen, minlength=given.shape[1]) / len(chosen)
    listed = " ".join(f"{share:.1%}" for share in shares.tolist())
    print(
        f"{name:<10} {len(given)} images, {(scores > SURE).float().mean():.1%} with more than {SURE}; classes {listed}"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run")
    arguments.add_argument("--samples", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--epochs", type=int, default=8, help="of the classifier")
    arguments.add_argument("--classifier", help="a run of task=classification on the same digits")
    given = arguments.parse_args()
    checkpoint = find_checkpoint(given.run)
    config = read_checkpoint(checkpoint)["config"]
    with tempfile.TemporaryDirectory() as folder:
        place = given.classifier or learn(config["data"], given.epochs, Path(folder) / "classifier")
        classifier = load_task(find_checkpoint(str(place)))
    generator = load_task(checkpoint)
    assert isinstance(classifier, Classification)
    assert isinstance(generator, Generation)
    data = build_data(config)
    data.select(frozenset({"label"}))
    data.setup()
    batches = list(data.test_dataloader())
    real, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    said = probabilities(classifier, real)
    print(f"classifier {(said.argmax(dim=1) == labels).float().mean():.1%} of the real test images right")
    latents = generator.latents(given.samples, seed=given.seed)
    told = torch.arange(given.samples) % len(generator.classes) if generator.conditional else None
    parts = zip(latents.split(BATCH), told.split(BATCH) if told is not None else [None] * len(latents), strict=False)
    judged("real", said)
    judged("generated", probabilities(classifier, torch.cat([generator.sample(*part) for part in parts])))


if __name__ == "__main__":
    main()
