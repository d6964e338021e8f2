"""Folders of weights as the hub has them, mapped into memory: a tensor is pages of its file until it is used.

Reading copies nothing. Whoever makes a tensor of another precision out of one gives its pages back, so that a process
never holds both. Files are safetensors, or pickles of which plain tensors are read and no code is run.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Single files and, with `.index.json` behind, indices of shards; the first that is there is read."""

MAPS = Path("/proc/self/maps")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of weights, by name.

    Raises:
        ValueError: there are none, a file is missing, broken, or holds code, or the index names what its files lack.
    """
    for stem, ending in STEMS:
        index, single = folder / f"{stem}{ending}.index.json", folder / f"{stem}{ending}"
        if index.is_file():
            return _read_shards(folder, index)
        if single.is_file():
            return read_file(single)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or with an index of shards "
        f"({there}). Download the folder again."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        ValueError: it is broken, holds code, or is no mapping of names to tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}. It is broken or cut off: download it again.") from error
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is no file of weights: it must be a mapping of names to tensors, and nothing else.")
    return content


def read_pickle(path: Path) -> object:
    """What torch.save wrote, if it is tensors, numbers and containers.

    Raises:
        ValueError: it is broken, or holds code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, numbers and containers ({_wanted(error)}). Reading it would run the code "
            "in it, which is never done. Where you trust its origin, open it there and save the tensors alone."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read: {str(error).splitlines()[0]} It is broken, cut off, or not written by torch.save "
            "(of torch 1.6 or later): download it again."
        ) from error


def give_back(tensors: Iterable[Tensor]) -> None:
    """Gives back the memory of tensors that are pages of a file and not needed any more.

    Another tensor of the same pages, and these themselves, read the file again when they are used. Memory that is no
    file's is left alone, and on systems without /proc nothing is done.
    """
    if not MAPS.is_file():
        return
    ranges = list(_file_ranges())
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and any(low <= start and end <= high for low, high in ranges):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _file_ranges() -> Iterator[tuple[int, int]]:
    """Addresses where files lie in this process's memory."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            low, _, high = addresses.partition("-")
            yield int(low, 16), int(high, 16)


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        shard_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}): download it again.") from error
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(shard_of.values()):
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}, which is not in its folder. Download it again.")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, but {folder} has no such file. Download it again.")
        tensors |= read_file(folder / name)
    lost = [name for name in shard_of if name not in tensors]
    if lost:
        raise ValueError(
            f"{index} names {len(lost)} tensors that its files lack, {lost[0]} among them. Download the folder again."
        )
    return tensors


def _wanted(error: pickle.UnpicklingError) -> str:
    """What the pickle wants to call, out of torch's long advice."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).splitlines())[0][:160]
