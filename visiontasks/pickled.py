"""Files of torch.save from elsewhere, read as data: nothing is called, and no more comes out than lies in them."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.serialization import safe_globals

from visiontasks.errors import UsageError

DEEPEST = 64  # containers within containers
MOST = 200_000  # values in all containers
_DAMAGE = (  # what torch.load and its unpickler raise on files that are no good
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RecursionError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
    zlib.error, SafetensorError,
)  # fmt: skip


def read_pickled(file: Path, *, mmap: bool = False, idle: Collection[tuple[Any, str]] = ()) -> Any:
    """What torch.load finds with weights_only=True: tensors, numbers, strings and containers of them.

    Args:
        idle: classes to put in the place of others, by the names that a file calls those.

    Raises:
        UsageError: where a file is none of torch.save's, asks for anything to be called, is compressed, or holds
            tensors that are larger than their storage, containers without end, or more than MOST values.
    """
    try:
        _check_archive(file)
        with safe_globals(list(idle)):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(file))
    except _DAMAGE as error:
        raise UsageError(f"{file} cannot be read as weights ({_reason(error)}): {_WANTED}") from error
    for name, value in values(found, of=str(file)):
        if isinstance(value, Tensor) and not _is_whole(value):
            raise UsageError(f"{file} cannot be read as weights ({name[:99]} is no dense tensor of its own): {_WANTED}")
    return found


def values(node: Any, *, of: str) -> Iterator[tuple[str, Any]]:
    """All that lies in dicts, lists, tuples and sets, containers included, each with its dotted name.

    Raises UsageError, which says what the values are `of`, where containers never end or hold more than MOST values.
    """
    waiting, count = [("", node, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        count += 1
        yield name, value
        inside = _inside(value)
        if inside and (depth == DEEPEST or count + len(waiting) + len(inside) > MOST):
            raise UsageError(f"{of} holds containers within containers without end: {_WANTED}")
        waiting += [(f"{name}.{key}" if name else str(key), entry, depth + 1) for key, entry in inside]


_WANTED = "give a .pth, .safetensors or .ckpt file, from somebody whom you trust."


def _inside(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple | set | frozenset) else []


def _check_archive(file: Path) -> None:
    """Refuses what torch.save never writes, and what would grow when it is read."""
    if not zipfile.is_zipfile(file):
        if file.open("rb").read(2) == b"PK":
            raise ValueError("it is half an archive")
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise ValueError("its entries are larger than the file")


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor lies dense in memory that is at least as large as it says."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _reason(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "not tensors alone"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
