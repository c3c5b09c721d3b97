"""The Penn-Fudan photographs of people, with a mask of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import UsageError
from visiontasks.data.annotations import Finding, Outline, Table, Thing, tight_boxes, upright_size
from visiontasks.data.images import BadFile, read_mask
from visiontasks.data.object_files import Annotations, ObjectData, images_below

HELD_OUT = {"Fudan": 52, "Penn": 68}  # photographs with a higher number are the 50 to evaluate on


class PennFudan(ObjectData):
    """170 photographs with 423 people and their masks (Wang, Shi, Song, Shen 2007), cut into 120 and 50 by name.

    FudanPed00053 and later and PennPed00069 and later, 22 and 28 photographs, are both val and test: blocks, so that
    neighbouring photographs of one scene stay together. `root` holds PedMasks and PNGImages (or Images); the mask of
    a.png is a_mask.png, 0 where nobody is and one number a person.
    Raises UsageError where root has not these folders.
    """

    provides = frozenset({"bboxes", "labels", "masks"})

    def read_annotations(self) -> Annotations:
        """All masks, with the tight box of each person."""
        folder = next((self.root / name for name in ("PNGImages", "Images") if (self.root / name).is_dir()), None)
        if folder is None or not (self.root / "PedMasks").is_dir():
            raise UsageError(
                f"{self.root.absolute()} does not hold PNGImages and PedMasks: type data.root=FOLDER, the unpacked "
                "PennFudanPed"
            )
        images = {Path(name).stem: path for name, path in images_below(folder).items()}
        masks = {path.name.removesuffix("_mask.png"): path for path in (self.root / "PedMasks").glob("*_mask.png")}
        tables = {split: Table("person") for split in ("train", "val", "test")}
        for stem in sorted(images.keys() | masks.keys()):
            held = _is_held_out(stem)
            for split in ("val", "test") if held else ("train",):
                self._add(tables[split], stem, images.get(stem), masks.get(stem))
        tables["test"].findings.clear()  # those of val, whose images these are
        return Annotations(("person",), (1,), tables)

    def _add(self, table: Table, stem: str, image: str | None, mask: Path | None) -> None:
        if image is None or mask is None:
            table.found("missing file", image or str(mask), f"has no {'image' if image is None else 'mask'}")
            return
        try:
            size, numbers = upright_size(image), read_mask(mask)
        except BadFile as error:
            kind = "empty annotation file" if "0 bytes" in error.reason else "wrong mask values"
            table.found(kind, error.path, error.reason)
            return
        if numbers.shape != size:
            found, wanted = (f"{width} x {height}" for height, width in (numbers.shape, size))
            table.found("wrong mask size", str(mask), f"has {found} pixels and its image {wanted}")
            return
        position = table.image(image, size=size, written=str(mask), id=stem)
        self._people(table, position, numbers)

    def _people(self, table: Table, image: int, numbers: NDArray[np.uint8]) -> None:
        people = np.setdiff1d(np.unique(numbers), 0)
        if len(people) and people[-1] != len(people):
            listed = ", ".join(map(str, people.tolist()))
            reason = f"has the numbers {listed}: expected 1 to {len(people)}"
            table.findings.append(Finding("wrong mask values", table.written[image], reason, "taken as they are"))
        each = (numbers == people[:, None, None]).astype(np.uint8)  # (N, H, W)
        keep = "masks" in self.keys
        for person, mask, box in zip(people.tolist(), each, tight_boxes(each).tolist(), strict=True):
            outline = _run_lengths(mask) if keep else None
            table.things.append(Thing(image, tuple(box), 0, person, area=float(mask.sum()), outline=outline))


def _run_lengths(mask: NDArray[np.uint8]) -> Outline:
    from faster_coco_eval.core import mask as coco

    encoded: Outline = coco.encode(np.asfortranarray(mask))
    return encoded


def _is_held_out(stem: str) -> bool:
    city, _, number = stem.partition("Ped")
    return number.isdecimal() and int(number) > HELD_OUT.get(city, int(number))
