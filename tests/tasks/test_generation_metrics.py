import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.tasks.extractors import Extractor, RandomFeatures, Seen
from visiontasks.tasks.fidelity import frechet_distance, inception_score, neighbourhoods
from visiontasks.tasks.generation_metrics import SampleQuality, diversity, vendi

IMAGES = 61


class Knowing(RandomFeatures):
    """Takes the brightness of corners for classes."""

    name = "corners"
    knows_classes = True

    def look(self, images: Tensor) -> Seen:
        features, _ = super().look(images)
        return features[:, :9], features[:, 9:14] * 5


def images(seed: int, count: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(20, 20), mode="bilinear").byte()


def seen_by(quality: SampleQuality, *, rank: int = 0, world: int = 1, batch: int = 7) -> dict[str, float]:
    """The figures of every world-th image, in batches of a size."""
    real, generated = images(0), images(1)
    for rows in torch.arange(rank, IMAGES, world).split(batch):
        quality.update(real[rows], generated[rows], rows)
    figures, tables = quality.compute()
    assert not tables
    quality.reset()
    return {name: value.item() for name, value in figures.items()}


def test_figures_are_those_of_the_features_of_the_first_images() -> None:
    found = seen_by(SampleQuality(Knowing, samples=50, neighbours=3))
    (real, _), (generated, logits) = Knowing()(images(0)[:50]), Knowing()(images(1)[:50])
    assert logits is not None
    expected = {name: value.item() for name, value in neighbourhoods(real, generated, neighbours=3).items()}
    expected |= {
        "fid": frechet_distance(real, generated).item(),
        "inception_score": inception_score(logits).item(),
        "vendi": vendi(real, generated).item(),
    }
    named = {f"{name}_corners": value for name, value in expected.items()}
    assert {name: found[name] for name in named} == pytest.approx(named, rel=1e-5)
    assert found.keys() == named.keys() | {"fid", "diversity", "kid_corners"}
    assert found["fid"] == found["fid_corners"]


def test_what_is_not_asked_for_or_not_known_is_left_out() -> None:
    assert sorted(seen_by(SampleQuality(neighbours=0))) == [
        "diversity",
        "fid",
        "fid_random",
        "kid_random",
        "vendi_random",
    ]


def test_a_second_evaluation_starts_anew() -> None:
    quality = SampleQuality()
    assert seen_by(quality) == seen_by(quality)


def test_the_network_is_no_part_of_the_module() -> None:
    quality = SampleQuality()
    seen_by(quality)
    assert not quality.state_dict()
    assert not list(quality.parameters())


def test_the_network_is_made_once_and_not_before_it_is_needed() -> None:
    made: list[Extractor] = []

    def make() -> Extractor:
        made.append(RandomFeatures())
        return made[0]

    quality = SampleQuality(make)
    assert not made
    assert quality.prepare() is quality.prepare()
    assert len(made) == 1


def test_how_it_was_measured_is_said() -> None:
    quality = SampleQuality(samples=40)
    lines = quality.notes()
    assert "at most 40 images" in lines[0]
    assert "random (drawn by a fixed seed" in lines[0]
    assert "no inception_score" in lines[1]
    assert len(SampleQuality(Knowing).notes()) == 1
    seen_by(quality)
    facts = quality.facts()
    assert (facts["extractor"], facts["samples_compared"]) == ("random", 40)
    assert facts["extractor_digest"] == RandomFeatures().digest()


@pytest.mark.parametrize("options", [{"samples": 1}, {"neighbours": -1}])
def test_impossible_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give 2 images or more"):
        SampleQuality(**options)


def test_the_vendi_score_falls_with_what_is_left_of_the_data() -> None:
    features = RandomFeatures()(images(0, 240))[0]
    real, others = features[:120], features[120:]
    assert vendi(real, others).item() == pytest.approx(1, abs=0.15)
    found = [vendi(real, others[:count].repeat(120 // count, 1)).item() for count in (60, 12, 3, 1)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.3


def test_diversity_is_the_deviation_of_regions() -> None:
    real, generated = images(0), images(1) // 2
    found = SampleQuality()
    found.update(real, generated, torch.arange(IMAGES))
    regions = [
        part.numpy().reshape(IMAGES, 3, 10, 2, 10, 2).mean(axis=(3, 5)).reshape(IMAGES, -1)
        for part in (real, generated)
    ]
    spreads = [np.sqrt(part.var(axis=0).sum()) for part in regions]
    expected = spreads[1] / spreads[0]
    assert diversity(*(torch.from_numpy(part) for part in regions)).item() == pytest.approx(expected)
    assert found.compute()[0]["diversity"].item() == pytest.approx(expected, abs=0.03)  # of other regions
    assert diversity(torch.ones(4, 2), torch.rand(4, 2)) == 0


def one_of_several(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = seen_by(SampleQuality(Knowing, samples=50), rank=rank, world=world, batch=5)
    quality, (real, generated) = SampleQuality(), (images(0), images(1))
    if rank:  # the first has nothing
        rows = torch.arange(rank - 1, IMAGES, world - 1)
        quality.update(real[rows], generated[rows], rows)
    uneven = {name: value.item() for name, value in quality.compute()[0].items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps([found, uneven]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")  # a forked process must not wait for threads that it has not
def test_figures_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    make = partial(SampleQuality, Knowing, samples=50)
    alone = [seen_by(make()), seen_by(SampleQuality())]
    mp.start_processes(one_of_several, args=(3, str(tmp_path)), nprocs=3, start_method="fork")
    for process in range(3):
        for found, expected in zip(json.loads((tmp_path / f"{process}.json").read_text()), alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
