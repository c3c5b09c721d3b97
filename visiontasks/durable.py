"""Archives that are whole or not there: written beside their place, synced, renamed, and known by a digest.

The digest stands in the comment that the zip format has room for at the end of what torch.save writes. It is moved and
copied in one piece with what it vouches for, and torch.load, memory-mapped or not, takes no notice of it.
"""

import os
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch

from visiontasks.errors import UsageError

_MARK = b"visiontasks sha256 "
_COMMENT = len(_MARK) + 2 * sha256().digest_size  # bytes
_START, _END = b"PK\3\4", b"PK\5\6"  # of a zip archive's first file and of its last record
_END_SIZE = 22  # bytes, without the comment, whose length is the last two
_CHUNK = 1 << 24


def save_archive(content: Any, file: Path, *, keep_as: Path | None = None) -> None:
    """Writes what torch.load reads, with its digest; whatever happens, the old file or the new one is there, whole.

    With keep_as the file that was there before moves to that place.
    Raises UsageError where the disk does not take it; the old file is then untouched.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(content, part)
    except OSError as error:
        part.unlink(missing_ok=True)
        kept = f"; the one before it, {file}, is untouched" if file.exists() else ""
        raise UsageError(
            f"{file} could not be written ({error.strerror}){kept}: make room and go on with resume=auto."
        ) from error
    if keep_as is not None and file.exists():
        file.replace(keep_as)
    part.replace(file)
    _sync(file.parent)


def verify(file: Path, *, foreign: bool = False) -> bool:
    """Whether a digest vouches for a file; without one, an archive that ends as torch.save ends it gives False.

    So does what is no archive at all, where the file may be foreign.
    Raises UsageError where the file is damaged.
    """
    with file.open("rb") as stored:
        size = stored.seek(0, os.SEEK_END)
        stored.seek(max(0, size - _COMMENT))
        tail = stored.read()
        stored.seek(0)
        zipped = stored.read(len(_START)) == _START
        if tail.startswith(_MARK):
            if _comment(stored, size - _COMMENT) == tail:
                return True
        elif zipped and tail[-_END_SIZE:].startswith(_END) and tail.endswith(b"\0\0"):
            return False
    if foreign and not zipped and not tail.startswith(_MARK):
        return False
    raise UsageError(f"{file} is damaged: its {size:,} bytes are not those that were written.")


def _write(content: Any, part: Path) -> None:
    with part.open("wb") as file:
        signed = _Signed(file)
        torch.save(content, signed)  # type: ignore[arg-type]
        signed.finish()
        file.flush()
        os.fsync(file.fileno())


class _Signed:
    """Passes an archive on to a file and adds the digest at the end.

    An error of the disk waits for `finish`: raised within torch's writer it would end the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = sha256()
        self.held = b""  # the last two bytes so far, which say how long the comment is
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        whole = view if len(view) > 1 else memoryview(self.held + bytes(view))
        if len(view) > 1:
            self._pass_on(self.held)
        self._pass_on(whole[:-2])
        self.held = bytes(whole[-2:])
        return len(view)

    def flush(self) -> None:
        """Does nothing: `finish` and the file's owner do."""

    def finish(self) -> None:
        self._pass_on(_COMMENT.to_bytes(2, "little"))
        self._pass_on(_MARK + self.digest.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _pass_on(self, data: bytes | memoryview) -> None:
        if self.error is not None:
            return
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
        self.digest.update(data)


def _comment(file: BinaryIO, size: int) -> bytes:
    """The comment that belongs to the first so many bytes of a file."""
    digest = sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return _MARK + digest.hexdigest().encode()


def _sync(folder: Path) -> None:
    """Has the disk keep the names in a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
