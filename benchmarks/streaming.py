"""Samples per CPU second out of chunks beside the same files in an image folder, each read in order and shuffled.

    python benchmarks/streaming.py [FOLDER_OF_CLASS_FOLDERS] [--images 600] [--rounds 7] [--chunk-mb 4]

One process, one thread, process time, decoding included: every way reads all samples of train once a round, the ways
take turns, and what is printed are medians over the rounds, ratios to the image folder in order being taken within a
round. "store" reads the chunks through the cache that an object store's have, from a folder that stands for the store;
its first round fetches them. Without a folder the files are crops of scikit-learn's two photographs, 500 x 375, JPEG
quality 90. What is measured is the reader: all files are in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from visiontasks.data import ImageFolder, Streaming
from visiontasks.data.conversion import convert
from visiontasks.data.source import Source


def photographs(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    images = load_sample_images().images
    for number in range(count):
        top, left = generator.integers(0, [427 - 375 + 1, 640 - 500 + 1])
        path = folder / ("a", "b")[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number % 2][top : top + 375, left : left + 500]).save(path, quality=90)


def ways(root: Path, chunks: Path, cache: Path) -> dict[str, Callable[[], float]]:
    """Each reads the train split once and returns samples per CPU second."""
    folder = ImageFolder(root)
    near, far = Streaming(chunks), Streaming(f"local:{chunks}", folder=cache)
    for data in (folder, near, far):
        data.setup()
    sources = {"folder": folder.source("train"), "chunks": near.source("train"), "store": far.source("train")}
    size = len(sources["folder"])
    order: list[int] = near.source("train").order(0, 0).tolist()  # type: ignore[attr-defined]
    anyhow = np.random.default_rng(0).permutation(size).tolist()
    orders = {"in order": list(range(size)), "shuffled by chunks": order, "shuffled": anyhow}
    return {
        f"{name}, {words}": lambda source=source, indices=indices: rate(source, indices)  # type: ignore[misc]
        for name, source in sources.items()
        for words, indices in orders.items()
    }


def rate(source: Source, indices: list[int]) -> float:
    begin = time.process_time()
    for index in indices:
        source[index]
    return len(indices) / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk-mb", type=float, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, chunks = given.folder or Path(temporary) / "files", Path(temporary) / "chunks"
        if given.folder is None:
            photographs(root, given.images)
        data = ImageFolder(root)
        data.setup()
        begin = time.perf_counter()
        convert(data, chunks, chunk_mb=given.chunk_mb, progress=False)
        print(f"converted {sum(data.sizes().values()) / (time.perf_counter() - begin):,.0f} images a second")
        table = ways(root, chunks, Path(temporary) / "cache")
        rounds = [{name: way() for name, way in table.items()} for _ in range(given.rounds)]
    for name in table:
        ratio = statistics.median(each[name] / each["folder, in order"] for each in rounds)
        print(f"{name:<30} {statistics.median(each[name] for each in rounds):8,.0f} a second   {ratio:5.2f}")


if __name__ == "__main__":
    main()
