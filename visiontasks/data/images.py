"""The one decoder: image and mask files to arrays with the right pixels, or an error that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # a quarter of a gigabyte in RGB, Pillow's own first limit
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

_FAST = frozenset({("JPEG", "RGB"), ("JPEG", "L"), ("MPO", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"),
                   ("PNG", "I;16"), ("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "I;16"), ("TIFF", "I;16B")})  # fmt: skip
_PLAIN = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_INDEX = frozenset({"1", "L", "P", "I", "I;16"})
_ORIENTATION = 0x0112  # the EXIF tag
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may keep an orientation
_DAMAGE = (  # what Pillow's readers raise on damaged files
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

cv2.setNumThreads(0)  # a forked worker that meets a thread pool of its parent waits for ever
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a bad file is reported once, by its name


class BadFile(ValueError):
    """A file that gives no right pixels; `str` is "PATH: reason", printable whatever the bytes of the name."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = printable(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def printable(path: str | os.PathLike[str]) -> str:
    """A path as one line that every stream can print: bytes that are not UTF-8 stand as \\xNN, newlines as \\n."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode an image file, turned upright by its EXIF orientation.

    Shapes: returns (H, W, 3) uint8 RGB. 16-bit samples keep their high byte, grey is repeated, CMYK is converted
    without a colour profile, and what is transparent is composited over white, as a viewer shows it.
    Raises BadFile, with the reason: unreadable, no image, damaged, truncated, more than MAX_PIXELS, floating point or
    32-bit samples, or several frames. Damage inside a JPEG's compressed data that leaves it well-formed is not seen.
    """
    return decode_image(path, _read(path))


def decode_image(path: str | os.PathLike[str], data: bytes) -> NDArray[np.uint8]:
    """Decode the bytes of an image file as read_image does; `path` is what an error calls it."""
    picture = _open(path, data)
    if (picture.format, picture.mode) in _FAST and "transparency" not in picture.info:
        return _oriented(_decode(path, data), _orientation(path, picture, data))
    return _converted(path, picture)


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a mask of class indices, upright as its image is.

    Shapes: returns (H, W) uint8: the raw indices of a palette file, never its colours; the values of a grey file of
    1, 2, 4, 8 or 16 bits as they were written.
    Raises BadFile as read_image does, and where the file is in colour, is a JPEG or holds an index above 255.
    """
    data = _read(path)
    picture = _open(path, data)
    if picture.mode not in _INDEX:
        raise BadFile(path, f"holds colours (mode {picture.mode}), not one class index a pixel (a palette or grey PNG)")
    if picture.format in ("JPEG", "MPO"):
        raise BadFile(path, "is a JPEG, which blurs class indices: save masks as PNG")
    values = np.asarray(_upright(path, picture))  # (H, W)
    if values.min() < 0 or values.max() > 255:
        raise BadFile(path, f"holds indices {values.min()} to {values.max()}, which do not fit into 0 to 255")
    return values.astype(np.uint8) // np.uint8(_grey_step(data))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        if not Path(path).is_file():
            raise BadFile(path, _absence(path))
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror})") from error
    if not data:
        raise BadFile(path, "is empty (0 bytes)")
    return data


def _absence(path: str | os.PathLike[str]) -> str:
    if Path(path).is_dir():
        return "is a folder"
    if Path(path).is_symlink() and not Path(path).exists():
        return f"is a link to nothing ({printable(Path(path).readlink())})"
    return "is no regular file" if os.path.lexists(path) else "does not exist"


def _open(path: str | os.PathLike[str], data: bytes) -> Image.Image:
    """Read the header alone, and refuse what should not be decoded."""
    try:
        picture = Image.open(io.BytesIO(data))
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # an MPO adds previews to a JPEG
    except UnidentifiedImageError as error:
        raise BadFile(path, f"is no image that can be read; it begins with {data[:12]!r}") from error
    except _DAMAGE as error:
        raise BadFile(path, f"has a damaged header ({_words(error)})") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise BadFile(path, f"has {picture.width} x {picture.height} pixels, above the limit of {MAX_PIXELS}")
    if frames > 1:
        raise BadFile(path, f"holds {frames} frames: export the one that is meant")
    return picture


def _decode(path: str | os.PathLike[str], data: bytes) -> NDArray[np.uint8]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise BadFile(path, f"is damaged ({error.err})") from error
    if image is None:
        raise BadFile(path, "is truncated or damaged")
    return image  # type: ignore[no-any-return]  # (H, W, 3)


def _converted(path: str | os.PathLike[str], picture: Image.Image) -> NDArray[np.uint8]:
    """The slower road for everything rare: Pillow decodes, turns and converts."""
    picture = _upright(path, picture)
    if picture.mode not in _PLAIN | _ALPHA:
        raise BadFile(
            path, f"holds samples of mode {picture.mode}, whose range is not known: save it with 8 or 16 bits"
        )
    try:
        return np.array(_over_white(picture))
    except _DAMAGE as error:
        raise BadFile(path, f"cannot be converted to RGB ({_words(error)})") from error


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _upright(path: str | os.PathLike[str], picture: Image.Image) -> Image.Image:
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except _DAMAGE as error:
        raise BadFile(path, f"is truncated or damaged ({_words(error)})") from error


def _orientation(path: str | os.PathLike[str], picture: Image.Image, data: bytes) -> int:
    if picture.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        return 1  # asking Pillow would decode the whole file
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except _DAMAGE as error:
        raise BadFile(path, f"has damaged EXIF data ({_words(error)})") from error


def _oriented(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror as EXIF 2.32, section 4.6.4 A, defines 1 to 8; other values mean 1."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _grey_step(data: bytes) -> int:
    """What Pillow multiplied the samples of a 2- or 4-bit grey PNG by; 1 for every other file."""
    depth, colour_type = data[24:26]
    grey = data.startswith(b"\x89PNG") and colour_type == 0
    return {2: 85, 4: 17}.get(depth, 1) if grey else 1


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
