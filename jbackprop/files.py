"""Files that are written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def check_place(path: str | os.PathLike[str]) -> Path:
    """Where a file of that name would be, links followed.

    Raises:
        OSError: there is no such folder, or something that is no file, or it may not be written.
    """
    file = Path(os.path.realpath(path))
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {file.parent}; make it first")
    if file.exists() and not file.is_file():
        raise IsADirectoryError(f"{path} is a folder or a device; give the name of a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{path} may not be written")
    return file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends, and is on the disk.

    Where the block ends with an error, or the disk is full, what was at `path` stays as it was.
    The mode of a file that was there is kept. A process that is killed leaves the temporary file,
    which may be deleted.

    Raises:
        OSError: as `check_place`; or not all of it could be written.
    """
    file = check_place(path)
    temporary = file.with_name(f".{file.name[:60]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere one cannot wait for a folder
        handle = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
