"""A sample as bytes and back: an encoded image file, annotations, and a checksum over all; data, never code."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Container
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import Sample
from visiontasks.data.images import BadFile, decode_image

_MAGIC = b"VTR1"
_HEAD = struct.Struct("<4sII")  # magic, CRC-32 of what follows the head, bytes of the JSON
_DAMAGE = (struct.error, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, zlib.error)


class _Part(NamedTuple):
    """One entry of a sample in the order of the sample's keys."""

    key: str
    dtype: str
    shape: list[int]
    length: int  # of its bytes, deflated where it has two axes or more


def packed(name: str, sample: Sample, image: bytes) -> bytes:
    """A sample whose image is the encoded file `image`, as bytes."""
    parts, blobs = [], []
    for key, value in sample.items():
        blob = image if key == "image" else _blob(np.asarray(value))
        array = np.asarray(value)
        parts.append(_Part(key, array.dtype.str, list(array.shape), len(blob)))
        blobs.append(blob)
    return _sealed({"name": name, "parts": parts}, blobs)


def packed_bad(error: BadFile) -> bytes:
    """A file that gives no right pixels, as bytes that say so again."""
    return _sealed({"name": error.path, "bad": error.reason}, [])


def unpacked(record: bytes, *, place: str, keys: Container[str] | None = None) -> Sample:
    """The sample, with its image and, unless None, those of its annotations that are in `keys`.

    Raises BadFile where the record is damaged, or was made of a file that was bad.
    """
    header, body = _opened(record, place)
    if "bad" in header:
        raise BadFile(str(header["name"]), str(header["bad"]))
    sample: dict[str, Any] = {}
    try:
        for part in (_Part(*given) for given in header["parts"]):
            blob, body = body[: part.length], body[part.length :]
            if part.key == "image":
                sample["image"] = decode_image(str(header["name"]), bytes(blob))
            elif keys is None or part.key in keys:
                sample[part.key] = _value(part, blob)
    except BadFile:
        raise
    except _DAMAGE as error:
        raise BadFile(place, f"holds a damaged record ({' '.join(str(error).split())})") from error
    return cast(Sample, sample)


def name_of(record: bytes, *, place: str) -> str:
    """What a person called the sample; raises BadFile where the record is damaged."""
    return str(_opened(record, place)[0]["name"])


def lossless(image: NDArray[np.uint8]) -> bytes:
    """An image (H, W, 3) as a PNG file."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def _sealed(header: dict[str, Any], blobs: list[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join([text, *blobs])
    return _HEAD.pack(_MAGIC, zlib.crc32(body), len(text)) + body


def _opened(record: bytes, place: str) -> tuple[dict[str, Any], memoryview]:
    body = memoryview(record)[_HEAD.size :]
    magic, checksum, length = _HEAD.unpack_from(record) if len(record) >= _HEAD.size else (b"", 0, 0)
    if magic != _MAGIC or zlib.crc32(body) != checksum:
        raise BadFile(place, "holds a damaged record (its checksum is another): convert or copy the data again")
    return json.loads(bytes(body[:length])), body[length:]


def _blob(array: NDArray[Any]) -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    return zlib.compress(data, 1) if array.ndim > 1 else data


def _value(part: _Part, blob: memoryview) -> Any:
    dtype = np.dtype(part.dtype)
    size = int(np.prod(part.shape)) * dtype.itemsize
    data = zlib.decompressobj().decompress(blob, size + 1) if len(part.shape) > 1 else bytes(blob)
    if len(data) != size:
        raise ValueError(f"{part.key} has not the {size} bytes of its shape")
    array = np.frombuffer(data, dtype).reshape(part.shape).copy()
    return int(array) if array.ndim == 0 and array.dtype.kind == "i" else array
