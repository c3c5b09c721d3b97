"""What figures of generated images cost beside their usual form, and how far they differ.

    python benchmarks/generation_metrics.py [--rounds 1] [--images 5000] [--dimensions 2048]

FID's root of the product of two covariances: ours beside scipy.linalg.sqrtm and beside the eigenvalues of the product,
of features like those behind Inception's last ReLU, on one thread. The times hold means and covariances, too; ratios
are medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from visiontasks.tasks.fidelity import frechet_distance


def features(images: int, dimensions: int, *, seed: int, shift: float) -> Tensor:
    """Correlated features that are never negative, (N, D) float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(9)) / dimensions**0.5
    spectrum = torch.linspace(1, 0.02, dimensions)
    return (torch.randn(images, dimensions, generator=generator) * spectrum @ mixing + shift).relu()


def parts(real: Tensor, generated: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """The squared distance of the means, and the covariances."""
    first, second = real.double().numpy(), generated.double().numpy()
    means = float(((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum())
    return means, np.cov(first, rowvar=False), np.cov(second, rowvar=False)


def by_matrix_root(real: Tensor, generated: Tensor) -> float:
    means, first, second = parts(real, generated)
    return means + float(np.trace(first + second) - 2 * np.trace(np.real(scipy.linalg.sqrtm(first @ second))))


def by_eigenvalues(real: Tensor, generated: Tensor) -> float:
    means, first, second = parts(real, generated)
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real
    return means + float(np.trace(first + second) - 2 * roots.sum())


def compare(name: str, ours: Callable[[], float], peers: dict[str, Callable[[], float]], rounds: int) -> None:
    """Prints seconds of ours and of each peer, the ratio and the relative difference of what they answer."""
    for peer, theirs in peers.items():
        rows = [(*timed(ours), *timed(theirs)) for _ in range(rounds)]
        mine, other = (statistics.median(row[at] for row in rows) for at in (0, 2))
        ratio = statistics.median(row[2] / row[0] for row in rows)
        apart = abs(rows[0][1] - rows[0][3]) / abs(rows[0][3])
        print(
            f"{name:10} {mine:7.2f} s, {peer:18} {other:7.2f} s: {ratio:6.1f} times, apart by {apart:.1e}", flush=True
        )


def timed(work: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    answer = work()
    return time.perf_counter() - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real, generated = (features(options.images, options.dimensions, seed=seed, shift=0.1 * seed) for seed in (0, 1))
    roots = {
        "scipy.linalg.sqrtm": lambda: by_matrix_root(real, generated),
        "numpy eigvals": lambda: by_eigenvalues(real, generated),
    }
    compare("FID", lambda: frechet_distance(real, generated).item(), roots, options.rounds)


if __name__ == "__main__":
    main()
