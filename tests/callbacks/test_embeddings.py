from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from tests.callbacks.watched import Watched, scenes, trainer_of
from visiontasks.callbacks import embeddings
from visiontasks.callbacks.embeddings import EmbeddingPictures, apart, flattened, palette, spread, thumbnail
from visiontasks.callbacks.features import Rows

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 2, 2, 2])


def test_thumbnails_on_the_map_do_not_overlap() -> None:
    places = np.random.default_rng(0).random((300, 2))
    chosen = apart(places, 0.1)
    gaps = [np.abs(places[a] - places[b]).max() for a in chosen for b in chosen if a != b]
    assert min(gaps) >= 0.1
    left = sorted(set(range(300)) - set(chosen))
    assert all(np.abs(places[chosen] - places[row]).max(axis=1).min() < 0.1 for row in left)


def test_neighbours_stay_neighbours_on_the_map() -> None:
    directions = torch.nn.functional.one_hot(torch.arange(60) % 3, 70).float()
    places = flattened(directions + 0.05 * torch.rand(60, 70, generator=torch.Generator().manual_seed(0)))
    assert places.shape == (60, 2)
    assert (places.min(), places.max()) == (0, 1)
    nearest = np.linalg.norm(places[:, None] - places, axis=2).argsort(axis=1)[:, 1]
    assert (nearest % 3 == np.arange(60) % 3).mean() > 0.95


def test_queries_are_spread_over_the_classes() -> None:
    rows = Rows(torch.zeros(12, 1), LABELS, torch.arange(12))
    assert sorted(LABELS[spread(rows, 3)].tolist()) == [0, 1, 2]
    assert sorted(spread(rows, 20)) == list(range(12))
    unlabelled = Rows(torch.zeros(12, 1), None, torch.arange(12))
    assert spread(unlabelled, 3) == spread(unlabelled, 3) == sorted(set(spread(unlabelled, 3)))
    assert len(spread(unlabelled, 3)) == 3


@pytest.mark.parametrize("classes", [3, 10, 11, 100])
def test_classes_have_colours_of_their_own(classes: int) -> None:
    assert len(set(palette(classes))) == classes


def test_a_thumbnail_is_the_middle_square() -> None:
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 2:10] = 200
    data: Any = type("Data", (), {"given": lambda *_: {"image": image}})()
    assert thumbnail(data, 0, 4).shape == (4, 4, 3)
    assert (thumbnail(data, 0, 4) == 200).all()


@pytest.mark.parametrize("options", [{}, {"digits": (1, 3)}, {"multi_label": True}])
def test_the_pictures_say_what_is_there(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    draw_map, draw_neighbours = embeddings.draw_map, embeddings.draw_neighbours
    monkeypatch.setattr(embeddings, "draw_map", lambda *given: (seen.update(map=given), draw_map(*given)))
    monkeypatch.setattr(
        embeddings, "draw_neighbours", lambda *given: (seen.update(tiles=given[0]), draw_neighbours(*given))
    )
    module, data = Watched(), scenes(**options)
    trainer = trainer_of(module, data, default_root_dir=tmp_path)
    EmbeddingPictures(images=20, queries=4, nearest=3).on_train_end(trainer, module)
    for name in ("embedding_map.png", "neighbours.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.02
    places, pictures, labels, classes, _ = seen["map"]
    assert (len(places), 0 < len(pictures) <= 20, len(classes)) == (20, True, 10)
    assert (labels is None) == bool(options)
    assert [len(row) for row in seen["tiles"]] == [4] * 4
    assert all((name is None) == bool(options) for row in seen["tiles"] for _, name, _ in row)
    assert all(1 >= row[1][2] >= row[2][2] >= row[3][2] for row in seen["tiles"])
