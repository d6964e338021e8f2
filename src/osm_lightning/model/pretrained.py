"""Folders and hub ids as transformers loads them, strictly: it fills what a folder lacks with random numbers.

transformers knows how names have changed since a folder was written, so that it reads; what it says of missing,
unexpected and differing tensors becomes a load report, and any surprise an error.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from osm_lightning.model.frozen import first_line, missing_weights
from osm_lightning.model.load_report import LoadReport, is_known_extra


def load_pretrained(
    kind: Any,
    name: str,
    setting: str,
    part: str,
    besides: Sequence[str] = (),
    allow: Sequence[str] = (),
    **options: Any,
) -> tuple[Any, LoadReport]:
    """Loads a model of transformers.

    Args:
        kind: a class with `from_pretrained`.
        name: folder or hub id.
        setting: what a message calls the place where the name was given.
        part: part of the model.
        besides: patterns of names that a folder may hold and that are another part's.
        allow: patterns of names that are let through although they don't fit.
        options: for `from_pretrained`.

    Raises:
        ValueError: it is not there, its files are broken or hold code, or its tensors don't fit its config.
    """
    from safetensors import SafetensorError

    missing_weights(setting, name)
    options = {"dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True, **options}
    try:
        model, info = kind.from_pretrained(name, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{setting} is {name!r}, a pickle of which holds more than tensors, numbers and containers. Reading it "
            "would run the code in it, which is never done. Use a folder of safetensors."
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{setting} is {name!r}, which cannot be loaded ({first_line(error)}). {_advice(name)}"
        ) from error
    report = _report(model, info, name, part, besides)
    problems = report.problems(allow)
    if problems:
        raise ValueError(
            f"{setting} is {name!r}, whose tensors do not fit its config.json ({problems}). What is missing would be "
            "random: the folder is incomplete, or of two models. Download it again. A name that you know about may be "
            f"let through by model.{setting.partition('.')[0]}.allow."
        )
    return model, report


def model_type(name: str, setting: str) -> str:
    """What a folder or hub id is by its config.json.

    Raises:
        ValueError: it is not there, or has no config.json that says so.
    """
    from transformers import PreTrainedConfig

    missing_weights(setting, name)
    try:
        return str(PreTrainedConfig.get_config_dict(name)[0]["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{setting} is {name!r}, of which no config.json says what it is ({first_line(error)}). {_advice(name)}"
        ) from error


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of normalised pixels by a folder's own settings; None where it has none."""
    from transformers.utils.hub import cached_file

    file = "preprocessor_config.json"
    try:
        path = Path(name) / file if Path(name).is_dir() else cached_file(name, file)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, content[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, std) if len(mean) == len(std) == 3 else None


def _report(model: Any, info: dict[str, Any], name: str, part: str, besides: Sequence[str]) -> LoadReport:
    reshaped = {key: f"{tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]}
    missing = sorted(info["missing_keys"])
    held = {key: t for key, t in model.state_dict(keep_vars=True).items() if key not in reshaped and key not in missing}
    loaded = {id(tensor): tensor for tensor in held.values()}  # tied ones once
    known = {
        key
        for key in info["unexpected_keys"]
        if is_known_extra(key) or any(fnmatchcase(key, pattern) for pattern in besides)
    }
    return LoadReport(
        part,
        name,
        num_loaded=len(loaded),
        num_bytes=sum(tensor.nbytes for tensor in loaded.values()),
        dtypes=Counter(str(tensor.dtype).removeprefix("torch.") for tensor in loaded.values()),
        missing=missing,
        unexpected=sorted(set(info["unexpected_keys"]) - known),
        reshaped=reshaped,
        extras=sorted(known),
    )


def _advice(name: str) -> str:
    if Path(name).is_dir():
        return "Is the folder broken or incomplete, or of a model that transformers does not have?"
    return "Give a folder as the hub has it, or a hub id where there is a network."
