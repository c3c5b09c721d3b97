"""Annotated objects as files state them, and what is wrong with them before any reaches a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontasks.contracts import UsageError
from visiontasks.data.images import BadFile

Policy = Literal["refuse", "repair"]
Outline = list[NDArray[np.float64]] | dict[str, Any]  # polygons, each (2 P,) of x, y in pixels; or COCO's run lengths
Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

ROUNDING = 1.0  # pixels by which a box may lie over the edge before it is a mistake
LEAST = 0.99  # side of the smallest box, a pixel that was rounded
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Finding(NamedTuple):
    """One bad annotation: its kind in a few words, where it is written, what is wrong, and how repair mends it."""

    kind: str
    place: str
    reason: str
    mended: str = "left out"

    def __str__(self) -> str:
        return f"{self.place} {self.reason}"


class Thing(NamedTuple):
    """One object as a file states it."""

    image: int  # position in the table
    box: Corners
    label: int  # index into the class names
    number: int  # what the file calls it, or its position there
    crowd: bool = False  # not to be learned, and not to be counted against a detector
    area: float | None = None  # in pixels; None: the box's
    outline: Outline | None = None


class Table:
    """What a set of files states, in the order read; readers note in `findings` what cannot be stated as an object.

    `unit` is what an object is in the files: a line, an annotation.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.files: list[str] = []
        self.sizes: list[tuple[int, int]] = []  # height, width
        self.written: list[str] = []  # the file that holds the annotations of each image
        self.ids: list[int | str] = []
        self.things: list[Thing] = []
        self.findings: list[Finding] = []

    def image(self, file: str, *, size: tuple[int, int], written: str, id: int | str) -> int:  # noqa: A002
        """Add an image of (height, width) and return its position."""
        self.files.append(file)
        self.sizes.append(size)
        self.written.append(written)
        self.ids.append(id)
        return len(self.files) - 1

    def place(self, thing: Thing) -> str:
        """Where a person finds the object."""
        return f"{self.written[thing.image]}, {self.unit} {thing.number},"

    def found(self, kind: str, place: str, reason: str) -> None:
        """Note what is left out because it is wrong."""
        self.findings.append(Finding(kind, place, reason))


class Objects:
    """Sound objects of many images, in a few arrays that worker processes share.

    Shapes: boxes (M, 4) float32, labels (M,) int64, crowd (M,) uint8, areas (M,) float64; starts (I + 1,): those of
    image i are starts[i] to starts[i + 1].
    """

    def __init__(self, table: Table, things: Sequence[Thing], boxes: NDArray[np.float64]) -> None:
        images = np.array([thing.image for thing in things], np.int64)
        order = np.argsort(images, kind="stable")
        plain = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        areas = [given if thing.area is None else thing.area for thing, given in zip(things, plain, strict=True)]
        self.files, self.sizes, self.ids = table.files, table.sizes, table.ids
        self.boxes = boxes[order].astype(np.float32)
        self.labels = np.array([thing.label for thing in things], np.int64)[order]
        self.crowd = np.array([thing.crowd for thing in things], np.uint8)[order]
        self.areas = np.array(areas, np.float64)[order]
        self.outlines = [things[position].outline for position in order]
        self.starts = np.searchsorted(images[order], np.arange(len(self.files) + 1))

    def rows(self, image: int, *, crowd: bool) -> NDArray[np.int64]:
        """Positions of the objects of one image, with or without its crowds."""
        rows = np.arange(self.starts[image], self.starts[image + 1])
        return rows if crowd else rows[self.crowd[rows] == 0]


def checked(table: Table) -> tuple[Objects, list[Finding]]:
    """The sound objects of a table, and all findings: the readers' and those about boxes and repetitions.

    A box inverted has its corners reordered, one partly outside is clipped (up to ROUNDING pixels without a finding);
    of what is not finite, has no extent, lies outside, shows less than a pixel or repeats another nothing is kept.
    """
    things = table.things
    boxes = np.array([thing.box for thing in things], np.float64).reshape(-1, 4)
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)[[thing.image for thing in things]]  # (M, 2)
    mended, faults = _faults(boxes, np.concatenate([sizes, sizes], axis=1)[:, [1, 0, 3, 2]])
    lost = np.zeros(len(things), bool)
    findings = list(table.findings)
    for kind, (rows, ending, remedy) in faults.items():
        lost |= rows & (remedy == "left out")
        findings += [_box_finding(table, things[row], kind, ending, remedy) for row in np.flatnonzero(rows)]
    unique, repeated = _once(things, mended, np.flatnonzero(~lost))
    findings += [Finding("duplicate object", table.place(things[row]), "repeats another object") for row in repeated]
    return Objects(table, [things[row] for row in unique], mended[unique]), findings


def settle(findings: Sequence[Finding], policy: Policy) -> tuple[str, ...]:
    """What was mended, one line for each finding.

    Raises UsageError where the policy is refuse and there is something, or the policy is another word.
    """
    if policy not in ("refuse", "repair"):
        raise UsageError(
            f"data.bad_annotations={policy} is neither refuse nor repair: type data.bad_annotations=repair"
        )
    if findings and policy == "refuse":
        kinds = Counter(finding.kind for finding in findings)
        counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        first = "; ".join(str(finding) for finding in findings[:5])
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        raise UsageError(
            f"Found {len(findings)} bad annotations ({counts}): {first}{more}. Mend the files, or type "
            "data.bad_annotations=repair to clip what is partly outside, reorder inverted corners, leave out the rest"
        )
    return tuple(f"{finding}: {finding.mended}" for finding in findings)


def upright_size(path: str) -> tuple[int, int]:
    """Height and width of an image file after its EXIF orientation, from the header alone.

    Raises BadFile where there is no readable image.
    """
    try:
        with Image.open(path) as picture:
            turned = picture.format == "JPEG" and picture.getexif().get(0x0112) in _TURNED
            return picture.size if turned else (picture.height, picture.width)
    except FileNotFoundError as error:
        raise BadFile(path, "does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile(path, "is no image that can be read") from error


def outline_fault(outline: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    """Kind and reason of what is wrong with COCO's `segmentation` for an image of (height, width), or None."""
    from faster_coco_eval.core import mask as coco

    if isinstance(outline, dict):
        if list(outline.get("size", [])) != list(size):
            return (
                "wrong mask size",
                f"has a mask of height and width {outline.get('size')} on an image of {list(size)}",
            )
        try:
            empty = not rasterised(outline, size).any()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            return "wrong mask values", f"has a mask that cannot be decoded ({str(error).rstrip('.')})"
        return ("wrong mask values", "has a mask without a pixel") if empty else None
    if not isinstance(outline, list) or not outline or any(not _is_polygon(part) for part in outline):
        return "wrong mask values", "has polygons that are not lists of three or more finite points"
    polygons = [np.asarray(part, np.float64) for part in outline]
    thin = all(_thickness(part) < 2 for part in polygons)
    if (thin or _beyond(polygons, size)) and not coco.area(coco.segmToRle(_plain(polygons), size[1], size[0])):
        return "wrong mask values", "has a mask without a pixel"
    return None


def rasterised(outline: Outline, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask (H, W) of an outline, the same pixels that COCO's evaluation sees."""
    from faster_coco_eval.core import mask as coco

    return coco.decode(coco.segmToRle(_plain(outline), size[1], size[0]))  # type: ignore[no-any-return]


def tight_boxes(masks: NDArray[Any]) -> NDArray[np.float32]:
    """Boxes (N, 4) around the pixels of masks (N, H, W); four zeros where a mask is empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


_Faults = dict[str, tuple[NDArray[np.bool_], str, str]]  # kind -> rows, end of the sentence, remedy


def _faults(boxes: NDArray[np.float64], limits: NDArray[np.float64]) -> tuple[NDArray[np.float64], _Faults]:
    """Boxes reordered and clipped to [0, limits], and which were at fault and how."""
    nan = np.asarray(np.isnan(boxes).any(1))
    infinite = np.asarray(np.isinf(boxes).any(1)) & ~nan
    finite = np.where(np.isfinite(boxes).all(1, keepdims=True), boxes, 0.0)
    low, high = np.minimum(finite[:, :2], finite[:, 2:]), np.maximum(finite[:, :2], finite[:, 2:])
    ordered = np.concatenate([low, high], axis=1)
    clipped = np.clip(ordered, 0, limits)
    sides = (clipped[:, 2:] - clipped[:, :2]).min(1, initial=np.inf)
    sound = ~nan & ~infinite
    zero = sound & ((high - low).min(1, initial=np.inf) == 0)
    outside = sound & ~zero & (sides <= 0)
    small = sound & ~zero & ~outside & (sides < LEAST)
    kept = sound & ~zero & ~outside & ~small
    over = np.abs(ordered - clipped).max(1, initial=0) > ROUNDING
    return clipped, {
        "NaN box": (nan, "is not a number", "left out"),
        "infinite box": (infinite, "is infinite", "left out"),
        "zero-size box": (zero, "has no extent", "left out"),
        "outside box": (outside, "lies outside the image", "left out"),
        "sub-pixel box": (small, "shows less than a pixel", "left out"),
        "inverted box": (kept & (finite != ordered).any(1), "has its corners in the wrong order", "reordered"),
        "partly outside box": (kept & over, "reaches over the image's edge", "clipped"),
    }


def _box_finding(table: Table, thing: Thing, kind: str, ending: str, remedy: str) -> Finding:
    height, width = table.sizes[thing.image]
    box = ", ".join(f"{side:g}" for side in thing.box)
    return Finding(
        kind, table.place(thing), f"has the box ({box}) in {width} x {height} pixels, which {ending}", remedy
    )


def _once(things: Sequence[Thing], boxes: NDArray[np.float64], rows: Iterable[int]) -> tuple[list[int], list[int]]:
    """Rows in order, split into first occurrences and repetitions."""
    seen: set[tuple[Any, ...]] = set()
    unique: list[int] = []
    repeated: list[int] = []
    for row in rows:
        thing = things[row]
        key = (thing.image, thing.label, thing.crowd, _outline_key(thing.outline), *boxes[row].tolist())
        (repeated if key in seen else unique).append(int(row))
        seen.add(key)
    return unique, repeated


def _outline_key(outline: Outline | None) -> Any:
    if isinstance(outline, list):
        return tuple(part.tobytes() for part in outline)
    return None if outline is None else str(outline["counts"])


def _is_polygon(part: Any) -> bool:
    try:
        numbers = np.asarray(part, np.float64)
    except (TypeError, ValueError):
        return False
    return numbers.ndim == 1 and len(numbers) >= 6 and len(numbers) % 2 == 0 and bool(np.isfinite(numbers).all())


def _thickness(polygon: NDArray[np.float64]) -> float:
    """Twice the area over the perimeter: near the width of what is long and thin."""
    points = polygon.reshape(-1, 2)
    after = np.roll(points, -1, axis=0)
    area = abs(float((points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]).sum())) / 2
    return 2 * area / max(float(np.linalg.norm(after - points, axis=1).sum()), 1e-9)


def _beyond(polygons: list[NDArray[np.float64]], size: tuple[int, int]) -> bool:
    """Whether a point lies outside the image."""
    points = np.concatenate(polygons).reshape(-1, 2)
    return bool((points < 0).any() or (points > (size[1], size[0])).any())


def _plain(outline: Outline) -> Any:
    return outline if isinstance(outline, dict) else [part.tolist() for part in outline]
