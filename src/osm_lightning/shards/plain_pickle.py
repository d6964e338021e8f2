"""Pickles of foreign origin, read without running anything that they ask for.

A pickle is a program: it may call whatever it can import. Here it may build Python's plain data, and instead of numpy's
arrays it gets stand-ins, which keep an array's texts and forget its numbers. No numpy object is made, for a pickled
dtype can pass off any bytes as pointers.
"""

from __future__ import annotations

import mmap
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np


class PickledArray:
    """Stands for what a pickle asks numpy for: an array, or one of its parts."""

    def __init__(self, *args: object) -> None:
        self._args = args
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: object) -> None:
        self._state = state if isinstance(state, tuple) else ()

    def texts(self) -> list[object]:
        """The elements of an array of texts or objects.

        Raises:
            ValueError: it is no such array.
        """
        match self._state:
            case (_, _, _, _, list() as elements):  # version, shape, dtype, order, data
                return elements
            case (_, _, PickledArray(_args=(str() as kind, *_)), _, bytes() as data) if re.fullmatch(r"U\d{1,5}", kind):
                return np.frombuffer(data, dtype=f"<{kind}").tolist()
        raise ValueError("it is no array of texts")


_STANDS_FOR = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _PlainUnpickler(pickle._Unpickler):  # its memo is a dict; that of pickle.Unpickler can be blown up to any size
    def find_class(self, module_name: str, global_name: str) -> type[PickledArray]:
        if (module_name, global_name) in _STANDS_FOR:
            return PickledArray
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is no plain data")


def load_plain(path: Path, max_bytes: int) -> object:
    """Reads a pickle of dicts, lists, tuples, texts, bytes and numbers; numpy arrays are `PickledArray`s.

    Args:
        path: the file.
        max_bytes: largest size that is read.

    Raises:
        ValueError: it asks for anything else, is broken, or too large.
        OSError: it can't be opened.
    """
    size = path.stat().st_size
    if not 0 < size <= max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; it must have 1 to {max_bytes:,}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _PlainUnpickler(data).load()  # a mapped file answers a read of any length with what there is
        except Exception as error:  # broken pickles raise whatever their steps lead to
            raise ValueError(f"{path} is not read as a pickle: {str(error) or type(error).__name__}") from error
