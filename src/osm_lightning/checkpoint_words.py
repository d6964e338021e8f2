"""The words of a command line that name a checkpoint, and what they stand for: its config, and where it is.

`--ckpt X` brings the config that X was trained with, so it is opened before the settings are parsed; `last` and `auto`
are looked up in run folders.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

from osm_lightning.weights.checkpoint import config_of, find_checkpoint, found_checkpoints
from osm_lightning.weights.sharded import is_sharded


def with_checkpoint(argv: list[str]) -> list[str]:
    """Lets `--ckpt X` bring its own config: given ones come after it, and win.

    For fit the checkpoint is resumed by Lightning; elsewhere its trained parts are what the model starts from, and so
    they are for fit where it is an exported folder, which has no optimizer state: a new run begins then.

    Raises:
        ValueError: the checkpoint does not exist or is not one of ours.
    """
    command, rest = argv[0], [word.replace("--trust-checkpoint", "--trust_checkpoint=true") for word in argv[1:]]
    argv = [command, *rest]
    trusted = "--trust_checkpoint=true" in rest
    if not any(word.split("=")[0] in {"--config", "-c", "--ckpt", "-h", "--help"} for word in rest):
        raise ValueError(
            "neither --config nor --ckpt is given, so there is no model: `osm --help` shows both. "
            + found_checkpoints()
        )
    for place, word in enumerate(rest):
        if word == "--ckpt" and place + 1 < len(rest):
            path, length = rest[place + 1], 2
        elif word.startswith("--ckpt="):
            path, length = word.removeprefix("--ckpt="), 1
        else:
            continue
        if path == "auto":
            own = own_checkpoint(rest)
            if own is None:
                return [command, *rest[:place], *rest[place + length :]]
            path = own
        path = str(find_checkpoint(path))
        checkpoint = config_of(Path(path), trusted)
        config = checkpoint.config if command == "fit" else checkpoint.config_elsewhere()
        if command == "fit" and Path(path).is_dir() and not is_sharded(Path(path)):
            print(f"{path} has no optimizer state: a new run begins, with its weights and config.")
            rest[place : place + length] = []
            return [command, "--config", config, *rest, "--model.weights", path]
        rest[place : place + length] = ["--ckpt", path]
        weights = ["--model.weights", "null" if command == "fit" else path]
        return [command, "--config", config, *rest, *weights]
    return argv


def own_checkpoint(words: list[str]) -> str | None:
    """The last checkpoint in the folder of the run that the words are about, where there is one."""
    given = [word.removeprefix("--run=") for word in words if word.startswith("--run=")]
    given += [value for option, value in pairwise(words) if option == "--run"]
    run = Path(given[-1] if given else default_run())
    try:
        return str(find_checkpoint("last", run))
    except ValueError:
        return None


def default_run() -> str:
    """A new folder under `runs/`, the same for all processes of a run."""
    job = os.environ.get("SLURM_JOB_ID")
    stamp = f"slurm-{job}" if job else time.strftime("%Y%m%d-%H%M%S")
    # Lightning starts the processes of other ranks with this environment.
    return os.environ.setdefault("OSM_RUN", f"runs/{stamp}")
