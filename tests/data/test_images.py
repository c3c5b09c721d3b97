"""The decoder: right pixels for what can be read, a named reason for what cannot, and no crash for anything."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from visiontasks.data.images import MAX_PIXELS, BadFile, printable, read_image, read_mask

HEIGHT, WIDTH = 9, 14


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, and different in every corner."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    array = np.stack([x * 18, y * 28, (x + y) * 11], axis=-1).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.gif"])
def test_formats_give_the_pixels_that_pillow_gives(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, picture("P" if name == "a.gif" else "RGB"), name)
    expected = np.asarray(Image.open(path).convert("RGB"))
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)  # two builds of the JPEG library


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_turns_images_and_masks_alike(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, picture(), f"a.{suffix}", exif=exif, **exact)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    found = read_image(path)
    assert found.shape == ((WIDTH, HEIGHT, 3) if orientation > 4 else (HEIGHT, WIDTH, 3))
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)
    mask = saved(tmp_path, picture().quantize(8), "mask.png", exif=exif)
    np.testing.assert_array_equal(read_mask(mask), np.asarray(ImageOps.exif_transpose(Image.open(mask))))


def test_sixteen_bit_grey_is_scaled_not_cut_off(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for name in ("a.png", "a.tiff"):
        path = saved(tmp_path, Image.fromarray(values), name)
        np.testing.assert_array_equal(read_image(path), np.stack([values >> 8] * 3, axis=-1))


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), values >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_white(tmp_path: Path, mode: str) -> None:
    image = picture(mode)
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image.putalpha(Image.fromarray(alpha))
    found = read_image(saved(tmp_path, image, "a.png")).astype(float)
    share = alpha[..., None] / 255
    expected = share * np.asarray(image.convert("RGB")) + (1 - share) * 255
    np.testing.assert_allclose(found, expected, atol=1)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = picture().quantize(8)
    found = read_image(saved(tmp_path, image, "a.png", transparency=3))
    np.testing.assert_array_equal(found[np.asarray(image) == 3], 255)


def test_cmyk_is_converted_and_not_inverted(tmp_path: Path) -> None:
    found = read_image(saved(tmp_path, picture("CMYK"), "a.jpg", quality=98))
    assert np.abs(found.astype(int) - np.asarray(picture()).astype(int)).mean() < 8


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    assert set(np.unique(read_image(saved(tmp_path, picture("1"), "a.png")))) == {0, 255}


def test_a_phone_photograph_with_a_preview_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, picture(), "a.mpo", format="MPO", save_all=True, append_images=[picture().resize((4, 3))])
    assert Image.open(path).n_frames == 2
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    picture().save(path)
    np.testing.assert_array_equal(read_image(path), np.asarray(picture()))
    path.write_bytes(b"")
    with pytest.raises(BadFile) as refused:
        read_image(path)
    assert str(refused.value).encode() == os.fsencode(tmp_path) + rb"/caf\xe9.png: is empty (0 bytes)"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


LARGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8))
BAD = {
    "zero_bytes.jpg": (b"", "empty"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "no image"),
    "text.png": (b"hello", "no image"),
    "header_only.png": (b"\x89PNG\r\n\x1a\n", "no image|damaged"),
    "half.jpg": (encoded(LARGE, "JPEG")[:-500], "truncated or damaged"),
    "last_bytes_gone.jpg": (encoded(LARGE, "JPEG")[:-3], "truncated or damaged"),
    "half.png": (encoded(LARGE, "PNG")[:-400], "truncated or damaged"),
    "half.webp": (encoded(LARGE, "WEBP")[:-200], "damaged"),
    "half.gif": (encoded(picture("P"), "GIF")[:-60], "damaged"),
    "half.bmp": (encoded(picture(), "BMP")[:-40], "truncated or damaged"),
    "bomb.png": (bomb(9500, 9500), f"above the limit of {MAX_PIXELS}"),
    "greater_bomb.png": (bomb(40000, 40000), "exceeds limit"),
    "moving.gif": (encoded(picture("P"), "GIF", save_all=True, append_images=[picture("P").rotate(180)]), "2 frames"),
    "moving.png": (encoded(picture(), "PNG", save_all=True, append_images=[picture().rotate(180)]), "2 frames"),
    "pages.tif": (encoded(picture(), "TIFF", save_all=True, append_images=[picture()]), "2 frames"),
    "float.tif": (encoded(picture("F"), "TIFF"), "mode F"),
    "integer.tif": (encoded(picture("I"), "TIFF"), "mode I"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadFile, match=reason) as refused:
        read_image(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: ")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, reason in (
        (tmp_path / "gone.jpg", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.jpg", "is no regular"),
    ):
        with pytest.raises(BadFile, match=reason):
            read_image(path)


def test_a_bad_file_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadFile("a.png", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.png", "is empty", "a.png: is empty")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_masks_keep_the_indices_of_a_palette(tmp_path: Path, depth: int) -> None:
    indices = np.random.default_rng(depth).integers(0, 2**depth, (HEIGHT, WIDTH)).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(list(np.random.default_rng(1).integers(0, 256, 3 * 2**depth)))
    path = saved(tmp_path, image, "a.png", bits=depth)
    np.testing.assert_array_equal(read_mask(path), indices)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_masks_keep_the_values_of_grey_files_of_any_depth(tmp_path: Path, depth: int) -> None:
    values = np.random.default_rng(depth).integers(0, min(2**depth, 256), (8, 16))
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1  # (H, W, depth), the highest first
    rows = [b"\0" + np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, 8, depth, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), values)


def test_masks_that_hold_no_indices(tmp_path: Path) -> None:
    wide = np.full((4, 4), 256, np.uint16)
    cases = {"colours": saved(tmp_path, picture(), "a.png"), "JPEG": saved(tmp_path, picture("L"), "a.jpg"),
             "do not fit": saved(tmp_path, Image.fromarray(wide), "b.png")}  # fmt: skip
    for reason, path in cases.items():
        with pytest.raises(BadFile, match=reason):
            read_mask(path)


def test_printable_keeps_what_is_utf8() -> None:
    assert printable("größe.png") == "größe.png"


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """A few flipped bits, a cut, or a block overwritten or repeated."""
    changed, kind = bytearray(data), int(generator.integers(4))
    start = int(generator.integers(len(data)))
    if kind == 0:
        for position in generator.integers(0, len(data), 4):
            changed[position] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        changed[start : start + 16] = generator.bytes(16)
    else:
        changed[start:start] = changed[start : start + 64]
    return bytes(changed)


def survive(folder: Path, count: int) -> int:
    """Read `count` mutated files as image and as mask; returns how many were refused."""
    generator, refused = np.random.default_rng(0), 0
    originals = [encoded(LARGE, "JPEG"), encoded(LARGE, "PNG"), encoded(LARGE.quantize(16), "PNG"),
                 encoded(LARGE, "JPEG", progressive=True, exif=b"Exif\0\0" + bytes(40))]  # fmt: skip
    for number in range(count):
        path = folder / "mutated"
        path.write_bytes(mutated(originals[number % len(originals)], generator))
        for read, shape in ((read_image, 3), (read_mask, 2)):
            try:
                assert read(path).ndim == shape
            except BadFile:
                refused += 1
    return refused


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    assert survive(tmp_path, 200) > 200  # masks of the JPEGs among them


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    assert survive(tmp_path, 2000) > 2000


def test_damaged_files_of_others(shared_data: Path) -> None:
    damaged = {"TensorFlow-LICENSE", "corrupt34_2.jpg", "corrupt34_3.jpg", "corrupt34_4.jpg", "sigsegv.png"}
    unseen = {"corrupt.jpg", "bad_huffman.jpg"}  # well-formed around wrong data: readable, the pixels partly wrong
    transparent = {"rgbalpha_pytorch.png", "rgbalpha_pytorch16.png", "grayalpha_pytorch.png", "palette_pytorch.png"}
    for path in [*sorted((shared_data / "edge_cases").rglob("*.*")), *(shared_data / "edge_cases").rglob("*LICENSE")]:
        if path.name in damaged:
            with pytest.raises(BadFile):
                read_image(path)
            continue
        found = read_image(path)
        if path.name not in unseen | transparent:
            expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
            np.testing.assert_allclose(found.astype(int), expected, atol=2)


def test_opencv_starts_no_threads_that_forked_workers_would_wait_for() -> None:
    assert cv2.getNumThreads() == 1
