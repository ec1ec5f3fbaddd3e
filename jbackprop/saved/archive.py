"""A zip file of arrays and one JSON text, that is there whole or not at all.

Arrays are in NumPy's format, so that `numpy.load` reads the file too. What NumPy has no name for,
such as bfloat16, is in there as whole numbers of the same bits.

Nothing is compressed: the file is no larger than what comes of it, and every byte that counts is
one that a checksum of the zip format counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jbackprop.files import replacing
from jbackprop.saved.configuration import FormatError, Json

CONFIG = "config.json"
_CHUNK = 2**20


def write(path: str | os.PathLike[str], config: Json, arrays: Iterable[tuple[str, Any]]) -> None:
    """Write a file, or leave the old one as it is.

    Args:
        path: of the file; it is replaced if it is there.
        config: any JSON.
        arrays: the name of each entry, and a NumPy array.

    Raises:
        OSError: as `jbackprop.files.replacing`.
    """
    with replacing(path) as out, zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo(CONFIG), json.dumps(config, indent=1))
        for name, array in arrays:
            # without a date, so that equal networks make equal files
            info, large = zipfile.ZipInfo(name), array.nbytes >= 2**31 - 2**20
            with archive.open(info, "w", force_zip64=large) as part:
                np.lib.format.write_array(part, stored(array), (1, 0), allow_pickle=False)


def stored(array: np.ndarray) -> np.ndarray:
    """The array as it is in the file: in the order of C, and in numbers that NumPy has."""
    array = np.asarray(array, order="C")
    return array.view(stored_dtype(array.dtype))


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in the file, of as many bits: whole numbers for bfloat16 and the like."""
    return dtype if dtype.type.__module__ == "numpy" else np.dtype(f"u{dtype.itemsize}")


class Archive:
    """A file that is open for reading.

    Attributes:
        config: the JSON.
        entries: the names of the arrays.
    """

    def __init__(self, file: Any):
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise FormatError("the file is empty; it was not written by jb.save, or is lost")
        with _damages():
            self._zip = zipfile.ZipFile(file)
        names = [info.filename for info in self._zip.infolist()]
        for info in self._zip.infolist():
            if names.count(info.filename) > 1:
                raise FormatError(f"the entry {info.filename} is there twice; {_REMEDY}")
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ~0x800
            if info.file_size > size:
                raise FormatError(
                    f"the entry {info.filename} says that it has {info.file_size} bytes, more than "
                    f"the whole file; {_REMEDY}"
                )
            if not plain or info.file_size != info.compress_size:
                raise FormatError(
                    f"the entry {info.filename} is compressed or encrypted, as jb.save writes "
                    f"none: {_REMEDY}"
                )
        if CONFIG not in names:
            raise FormatError(
                f"it has no {CONFIG}, so that it is no network of jb.save but another archive; "
                "numpy.load reads arrays"
            )
        self.entries = [name for name in names if name != CONFIG]
        with _damages():
            text = self._zip.read(CONFIG)
        try:
            self.config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{CONFIG} is no JSON ({error}); {_REMEDY}") from error

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """One array, of this shape and dtype.

        Raises:
            FormatError: it is another, or damaged.
        """
        with _damages(), self._zip.open(name) as part:
            version = np.lib.format.read_magic(part)
            if version != (1, 0):
                raise ValueError(f"{name} is of version {version} of NumPy's format")
            found = np.lib.format.read_array_header_1_0(part)
            if found[2].hasobject:
                raise FormatError(
                    f"the entry {name} has Python objects in it, which are never read: unpickling "
                    "could run any program; it was not written by jb.save"
                )
            kept = stored_dtype(dtype)
            size = self._zip.getinfo(name).file_size - part.tell()
            expected = kept.itemsize * math.prod(shape)
            if found[::2] != (shape, kept) or (found[1] and len(shape) > 1) or size != expected:
                raise FormatError(
                    f"the entry {name} has {found[2]} of shape {found[0]} in {size} bytes, but "
                    f"{kept} of shape {shape} is needed; it was changed after jb.save"
                )
            array = np.empty(shape, kept)
            into = array.reshape(-1).view(np.uint8)
            for start in range(0, size, _CHUNK):
                data = part.read(min(_CHUNK, size - start))
                into[start : start + len(data)] = np.frombuffer(data, np.uint8)
            part.read(1)  # there is no more: now the checksum is compared, if it was not yet
        return array.view(dtype)


_REMEDY = "copy the file again, or save the network again"


@contextlib.contextmanager
def _damages() -> Iterator[None]:
    """What `zipfile` and `numpy` raise where a file is damaged."""
    try:
        yield
    except FormatError:
        raise
    except (
        zipfile.BadZipFile, ValueError, EOFError, struct.error, RuntimeError, NotImplementedError,
        MemoryError, OverflowError,
    ) as error:  # fmt: skip
        raise FormatError(
            f"it is damaged or cut off, or no file of jb.save ({error}); {_REMEDY}"
        ) from error


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """The file, open for reading; its name is put before what any FormatError says.

    Raises:
        FormatError: it is no such file.
        OSError: it is not there, or may not be read.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise FormatError("it is a folder or a device; give the name of a file in it")
        with open(path, "rb") as file:
            yield Archive(file)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error.__cause__
