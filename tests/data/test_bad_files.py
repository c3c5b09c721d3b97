"""Four files of each kind of trouble: the right pixels where there are any, else the file's name and the reason."""

import multiprocessing
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.test_images import bomb, encoded, mutated
from visiontasks.contracts import UsageError
from visiontasks.data.image_folder import ImageFolder, find_images
from visiontasks.data.images import BadFile, printable, read_image, read_mask

Pixels = NDArray[np.uint8]
Expected = tuple[Path, Pixels | str, float]  # a file, its pixels or why it has none, and the mean error that is allowed
Kind = Callable[[Path, Pixels, int], Expected]
PRINTED = ("jpg", "png", "bmp", "webp")


def picture(number: int) -> Pixels:
    """Smooth, different in every corner, and of another size for each number."""
    y, x = np.mgrid[0 : 17 + 3 * number, 0 : 29 + 2 * number]
    return np.stack([x * 7, y * 9, (x + y) * 4], axis=-1).astype(np.uint8)


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def chunk(kind: bytes, data: bytes, *, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def png(rows: bytes, width: int, height: int, depth: int, colour: int, *, interlaced: int = 0, wrong: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = chunk(b"IDAT", zlib.compress(rows), wrong=wrong)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def unfiltered(image: NDArray[Any]) -> bytes:
    """The rows of a PNG, each behind the number of no filter."""
    return b"".join(b"\0" + row.tobytes() for row in image)


def cut(kind: str) -> Kind:
    def make(path: Path, image: Pixels, number: int) -> Expected:
        data = encoded(Image.fromarray(image), kind)
        return put(path, data[: len(data) * (number + 1) // 5]), "truncated|damaged", 0

    return make


def cut_header(path: Path, image: Pixels, number: int) -> Expected:
    kind = ("JPEG", "PNG", "WEBP", "BMP")[number]
    return put(path, encoded(Image.fromarray(image), kind)[:11]), "no image|damaged|truncated", 0


def empty(path: Path, image: Pixels, number: int) -> Expected:
    return put(path, b""), r"empty \(0 bytes\)", 0


def page(path: Path, image: Pixels, number: int) -> Expected:
    text = ("<!DOCTYPE html>", "<html>", "<?xml version='1.0'?><svg/>", '{"error": 404}')[number]
    return put(path, text.encode() * 20), "no image", 0


def misnamed(path: Path, image: Pixels, number: int) -> Expected:
    kind = ("PNG", "BMP", "TIFF", "GIF")[number]
    image = image if number < 3 else np.repeat(image[..., :1], 3, axis=2)  # a GIF keeps greys as they are
    return put(path, encoded(Image.fromarray(image if number < 3 else image[..., 0]), kind)), image, 0


def cmyk(path: Path, image: Pixels, number: int) -> Expected:
    return put(path, encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=99)), image, 8


def deep_grey(path: Path, image: Pixels, number: int) -> Expected:
    values = np.random.default_rng(number).integers(0, 65536, image.shape[:2]).astype(np.uint16)
    data = png(unfiltered(values.astype(">u2")), values.shape[1], values.shape[0], 16, 0)
    return put(path, data), np.stack([values >> 8] * 3, axis=-1).astype(np.uint8), 0


def deep_colour(path: Path, image: Pixels, number: int) -> Expected:
    values = np.random.default_rng(number).integers(0, 65536, image.shape).astype(np.uint16)
    data = png(unfiltered(values.astype(">u2").reshape(len(values), -1)), values.shape[1], values.shape[0], 16, 2)
    return put(path, data), (values >> 8).astype(np.uint8), 0


def over_white(colours: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.asarray((share * colours + (1 - share) * 255).round(), np.uint8)


def alpha(path: Path, image: Pixels, number: int) -> Expected:
    seen = np.random.default_rng(number).integers(0, 256, image.shape[:2]).astype(np.uint8)
    kind = "PNG" if number % 2 else "TIFF"
    return put(path, encoded(Image.fromarray(np.dstack([image, seen])), kind)), over_white(image, seen), 1


def grey_alpha(path: Path, image: Pixels, number: int) -> Expected:
    seen = np.random.default_rng(number).integers(0, 256, image.shape[:2]).astype(np.uint8)
    rows = unfiltered(np.dstack([image[..., 0], seen]).reshape(len(image), -1))
    expected = over_white(np.repeat(image[..., :1], 3, axis=2), seen)
    return put(path, png(rows, image.shape[1], image.shape[0], 8, 4)), expected, 1


def palette(path: Path, image: Pixels, number: int) -> Expected:
    generator = np.random.default_rng(number)
    indices, colours = generator.integers(0, 16, image.shape[:2]), generator.integers(0, 256, (16, 3))
    drawn = Image.fromarray(indices.astype(np.uint8), "P")
    drawn.putpalette(colours.reshape(-1).tolist())
    return put(path, encoded(drawn, ("PNG", "GIF", "BMP", "TIFF")[number])), colours[indices].astype(np.uint8), 0


def one_bit(path: Path, image: Pixels, number: int) -> Expected:
    black = image[..., 0] > 90
    kind = ("PNG", "BMP", "TIFF", "PPM")[number]
    return put(path, encoded(Image.fromarray(black), kind)), np.repeat(black[..., None], 3, axis=2) * np.uint8(255), 0


def animated(path: Path, image: Pixels, number: int) -> Expected:
    first, kind = Image.fromarray(image), ("GIF", "PNG", "WEBP", "TIFF")[number]
    return put(path, encoded(first, kind, save_all=True, append_images=[first.rotate(180)])), "2 frames", 0


def turned(path: Path, image: Pixels, orientation: int) -> Expected:
    exif = Image.Exif()
    exif[0x0112] = orientation
    swapped = image.transpose(1, 0, 2)
    upright = {1: image, 2: np.fliplr(image), 3: np.rot90(image, 2), 4: np.flipud(image), 5: swapped,
               6: np.rot90(image, -1), 7: np.rot90(swapped, 2), 8: np.rot90(image)}  # fmt: skip
    kind, exact = ("JPEG", False) if orientation % 2 else ("WEBP", True)
    options: dict[str, Any] = {"lossless": True} if exact else {"quality": 99, "subsampling": 0}
    data = encoded(Image.fromarray(image), kind, exif=exif, **options)
    return put(path, data), upright[orientation], 0 if exact else 2


def huge(path: Path, image: Pixels, number: int) -> Expected:
    wide, high = ((9460, 9460), (89_478_486, 1), (1, 89_478_486), (20_000, 4_474))[number]
    return put(path, png(bytes(1000), wide, high, 1, 0)), "above the limit|exceeds limit", 0


def bombs(path: Path, image: Pixels, number: int) -> Expected:
    side = (14_000, 40_000, 100_000, 2_000_000)[number]
    return put(path, bomb(side, side)), "above the limit|exceeds limit|damaged header", 0


def unreadable(path: Path, image: Pixels, number: int) -> Expected:
    return put(path, b"nobody may read this"), "cannot be read .Permission denied", 0


def folder(path: Path, image: Pixels, number: int) -> Expected:
    path.mkdir()
    return path, "is a folder", 0


def dangling(path: Path, image: Pixels, number: int) -> Expected:
    path.symlink_to(("/no/such/file.jpg", "gone.jpg", path.name, "../../gone")[number])
    return path, "link to nothing|no regular file", 0


def odd_name(path: Path, image: Pixels, number: int) -> Expected:
    name = ("a b  c.png", "line\nfeed\t.png", "größe 图像 \U0001f408.png", "[x]{y}*?'\"$(z)#%.png")[number]
    return put(path.with_name(name), encoded(Image.fromarray(image), "PNG")), image, 0


def not_utf8(path: Path, image: Pixels, number: int) -> Expected:
    name = (b"caf\xe9.png", b"\xff\xfe.png", b"\x80 \xc3.png", b"\xed\xa0\x80.png")[number]
    return put(path.with_name(os.fsdecode(name)), encoded(Image.fromarray(image), "PNG")), image, 0


def checksum(path: Path, image: Pixels, number: int) -> Expected:
    rows = unfiltered(image.reshape(len(image), -1))
    return put(path, png(rows, image.shape[1], image.shape[0], 8, 2, wrong=1 << 7 * number)), "truncated|damaged", 0


def progressive(path: Path, image: Pixels, number: int) -> Expected:
    data = encoded(
        Image.fromarray(image), "JPEG", progressive=True, quality=99, subsampling=0, optimize=number % 2 == 1
    )
    return put(path, data), image, 2


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def interlaced(path: Path, image: Pixels, number: int) -> Expected:
    parts = [image[top::down, left::right] for top, left, down, right in ADAM7]
    rows = b"".join(unfiltered(part.reshape(len(part), -1)) for part in parts if part.size)
    return put(path, png(rows, image.shape[1], image.shape[0], 8, 2, interlaced=1)), image, 0


def tiny(path: Path, image: Pixels, number: int) -> Expected:
    dot = image[5:6, 5:6]
    return put(path, encoded(Image.fromarray(dot), ("PNG", "BMP", "TIFF", "JPEG")[number], quality=99)), dot, 4


def extreme(path: Path, image: Pixels, number: int) -> Expected:
    sides = ((1, 5000), (5000, 1), (2, 9000), (60_000, 1))[number]
    line = np.random.default_rng(number).integers(0, 256, (*sides, 3)).astype(np.uint8)
    return put(path, encoded(Image.fromarray(line), "PNG")), line, 0


def floating(path: Path, image: Pixels, number: int) -> Expected:
    kind = image[..., 0].astype(np.float32 if number % 2 else np.int32)
    return put(path, encoded(Image.fromarray(kind), "TIFF")), "whose range is not known", 0


KINDS: dict[str, Kind] = {
    "truncated JPEG": cut("JPEG"),
    "truncated PNG": cut("PNG"),
    "truncated WebP": cut("WEBP"),
    "truncated header": cut_header,
    "zero bytes": empty,
    "a page of the web": page,
    "wrong extension": misnamed,
    "CMYK": cmyk,
    "16-bit grey": deep_grey,
    "16-bit colour": deep_colour,
    "transparent": alpha,
    "grey and transparent": grey_alpha,
    "palette": palette,
    "1 bit": one_bit,
    "animated": animated,
    "EXIF 1 to 4": lambda path, image, number: turned(path, image, number + 1),
    "EXIF 5 to 8": lambda path, image, number: turned(path, image, number + 5),
    "huge": huge,
    "bombs": bombs,
    "unreadable": unreadable,
    "folders": folder,
    "links to nothing": dangling,
    "odd names": odd_name,
    "not UTF-8": not_utf8,
    "corrupt checksum": checksum,
    "progressive": progressive,
    "interlaced": interlaced,
    "1 x 1": tiny,
    "extreme aspect": extreme,
    "floating point": floating,
}


@pytest.fixture(autouse=True)
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What chmod would do, for root as well."""
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        data = read(path)
        if data.startswith(b"nobody"):
            raise PermissionError(13, "Permission denied", str(path))
        return data

    monkeypatch.setattr(Path, "read_bytes", denied)


def made(place: Path, kind: str) -> list[Expected]:
    place.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "_", kind)
    return [KINDS[kind](place / f"{stem}_{number}.jpg", picture(number), number) for number in range(4)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_right_pixels_or_a_name_and_a_reason(tmp_path: Path, kind: str) -> None:
    for path, expected, error in made(tmp_path, kind):
        if isinstance(expected, str):
            with pytest.raises(BadFile, match=expected) as refused:
                read_image(path)
            assert str(refused.value).startswith(f"{printable(path)}: ")
            assert len(str(refused.value).splitlines()) == 1
            continue
        found = read_image(path)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected.astype(int)).mean() <= error, path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_module_loses_none_of_them(tmp_path: Path, workers: int) -> None:
    assert len(KINDS) >= 25
    files = [
        each for label in ("cat", "dog") for kind in KINDS for each in made(tmp_path / "train" / label / kind, kind)
    ]
    for split in ("val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(picture(0)).save(tmp_path / split / label / "a.png")
    data = ImageFolder(tmp_path, image_size=8, batch_size=8, num_workers=workers, max_bad_fraction=1.0)
    data.setup()
    bad = {printable(path) for path, expected, _ in files if isinstance(expected, str)}
    assert data.sizes()["train"] == len(files) == 8 * len(KINDS)
    seen: list[str] = []
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)
        seen += [data.train_name(index) for index in batch["index"].tolist()]
    assert set(data.bad_files) == bad
    assert sorted(seen) == sorted(printable(path) for path, expected, _ in files if not isinstance(expected, str))
    assert all(reason for reason in data.bad_files.values())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_too_many_ends_the_training_by_name(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(picture(0)).save(tmp_path / split / label / "a.png")
    made(tmp_path / "train" / "dog", "links to nothing")
    data = ImageFolder(tmp_path, image_size=8, batch_size=6, num_workers=0, max_bad_fraction=0.5)
    (batch,) = data.train_dataloader()
    with pytest.raises(UsageError, match=r"4 of 6 train files are bad: .*links_to_nothing_\d.jpg"):
        data.on_before_batch_transfer(batch, 0)


def test_all_that_a_pattern_names_is_looked_at(tmp_path: Path) -> None:
    expected = [path for kind in ("links to nothing", "odd names", "not UTF-8") for path, _, _ in made(tmp_path, kind)]
    assert sorted(find_images(f"{tmp_path}/*")) == sorted(expected)
    assert sorted(find_images(tmp_path)) == sorted(expected)
    (tmp_path / "more").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "more")
    assert len(find_images(tmp_path)) == len(expected)


SEEDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def swapped(data: bytes, generator: np.random.Generator) -> bytes:
    """Two blocks of a file in each other's place."""
    size = int(generator.integers(4, 40))
    first, second = sorted(generator.integers(0, max(1, len(data) - 2 * size), 2).tolist())
    second = max(second, first + size)
    parts = (data[:first], data[second : second + size], data[first + size : second], data[first : first + size])
    return b"".join([*parts, data[second + size :]])


def is_refused(read: Callable[[Path], Pixels], path: Path) -> bool:
    try:
        return read(path).dtype != np.uint8
    except BadFile as error:
        return len(str(error).splitlines()) == 1


def survive(place: Path, count: int) -> None:
    """Reads mutated files as image and as mask; counts what was read and what was refused."""
    generator, image = (
        np.random.default_rng(1),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)),
    )
    originals = [encoded(image, kind) for kind in SEEDS]
    originals += [
        encoded(image, "JPEG", progressive=True, exif=b"Exif\0\0" + bytes(40)),
        encoded(image.quantize(16), "PNG"),
    ]
    done = {"read": 0, "refused": 0}
    for number in range(count):
        change = swapped if number // len(originals) % 3 == 0 else mutated
        path = put(place / "mutated", change(originals[number % len(originals)], generator))
        for read in (read_image, read_mask):
            done["refused" if is_refused(read, path) else "read"] += 1
    (place / "done").write_text(f"{done['read']} {done['refused']}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", SEEDS)
def test_a_file_cut_anywhere_is_whole_or_refused(tmp_path: Path, kind: str, step: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8))
    data = encoded(image, kind)
    whole = read_image(put(tmp_path / "whole", data))
    for end in [*range(0, len(data), step), *range(len(data) - 12, len(data))]:
        path = put(tmp_path / "cut", data[:end])
        assert is_refused(read_image, path) or np.array_equal(read_image(path), whole), end


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [160, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_no_process_dies_of_a_mutated_file(tmp_path: Path, count: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=survive, args=(tmp_path, count))
    process.start()
    process.join()
    assert process.exitcode == 0
    read, refused = map(int, (tmp_path / "done").read_text().split())
    assert read + refused == 2 * count
    assert min(read, refused) > count // 10
