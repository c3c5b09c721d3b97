from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from visiontasks.callbacks import pictures
from visiontasks.callbacks.pictures import ContactSheets, draw_curves

ERRORS = torch.tensor([0.0, 2, 1, 2, 0, 5, 1, 2, 2, 0, 3])  # of images named by the letters, ties among them
WORST = [(5.0, "f"), (3.0, "k"), (2.0, "i"), (2.0, "h")]


class Answers:
    """A task whose raw predictions are the images' positions, and that counts what it is asked to put into words."""

    def __init__(self, panels: int) -> None:
        self.panels = panels
        self.told = 0

    def errors(self, raw: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"mistakes": ERRORS[batch["index"]]}

    def predictions(self, raw: Any) -> list[dict[str, Any]]:
        self.told += len(raw)
        return [{"position": int(position)} for position in raw]

    def truths(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"position": int(boxes[0])} for boxes in batch["bboxes"]]


def after(sheets: ContactSheets, size: int, *, panels: int = 1, listed: bool = False) -> Answers:
    """Shows the callback the images in batches of a size."""
    module, batches = Answers(panels), torch.arange(len(ERRORS)).split(size)
    names = SimpleNamespace(test_name=lambda index: chr(ord("a") + index))
    trainer: Any = SimpleNamespace(datamodule=names, num_test_batches=[len(batches)])
    sheets.on_test_start(trainer, module)  # type: ignore[arg-type]
    for number, rows in enumerate(batches):
        batch = {"index": rows, "image": rows.view(-1, 1, 1, 1), "bboxes": list(rows.view(-1, 1))}
        sheets.on_test_batch_end(trainer, module, list(rows) if listed else rows, batch, number)
    return module


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_the_worst_images_are_the_same_in_batches_of_any_size(size: int, listed: bool) -> None:
    sheets = ContactSheets(images=8)
    after(sheets, size, panels=2, listed=listed)
    assert [(tile.error, tile.name) for tile in sheets.worst["mistakes"]] == WORST
    for tile in [*sheets.worst["mistakes"], *sheets.sample]:
        assert tile.truth == tile.prediction == {"position": int(tile.image)}
    assert all(ord(tile.name) - ord("a") == int(tile.image) for tile in sheets.worst["mistakes"])
    assert len(sheets.sample) == 4


def test_images_right_from_the_start_are_no_mistakes() -> None:
    sheets = ContactSheets(images=40)
    after(sheets, 4)
    assert len(sheets.worst["mistakes"]) == int((ERRORS > 0).sum())
    assert min(tile.error for tile in sheets.worst["mistakes"]) > 0


def test_only_what_is_shown_is_put_into_words() -> None:
    module = after(ContactSheets(images=2), 11)
    assert module.told == 4  # two of the sheet, and the two worst


@pytest.mark.parametrize(
    ("columns", "drawn"),
    [
        (["train/loss", "val/loss", "train/boxes_loss"], ["train/loss", "val/loss"]),
        (["train/critic_loss", "train/generator_loss", "val/fid"], ["train/critic_loss", "train/generator_loss"]),
    ],
)
def test_curves_show_the_whole_loss_or_each_of_several(
    columns: list[str], drawn: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    draw_curves({name: [(0, 2.0), (1, 1.0)] for name in columns}, "val/fid", tmp_path / "curves.png")
    (figure,) = figures
    assert [line.get_label() for line in figure.axes[0].get_lines()] == drawn
    assert (tmp_path / "curves.png").is_file()
