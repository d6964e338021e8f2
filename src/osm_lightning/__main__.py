"""The `osm` command: looks at the first word and imports no more than that word needs.

`osm --help` and the offline commands answer without torch; fit, validate, test and predict hand over to `cli.py`.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from osm_lightning.idle_hints import hide_idle_hints
from osm_lightning.rank_label import rank_label

TRAINER_COMMANDS = {
    "fit": "Train MaskQ-Former on a mixture of masks.",
    "validate": "Name the masks of the validation splits and score the names (Acc, NIV).",
    "test": "The same as validate, through Lightning's test loop.",
    "predict": "Name the masks of your own images.",
}
OFFLINE_COMMANDS = ("shards", "weights")

EXAMPLES = """\
examples:
  osm weights fetch mini --out weights
  osm predict --ckpt models/mini-coco --images photo.jpg --masks masks.json --out named
  osm fit --config configs/joint.yaml --config configs/model/mini.yaml --config configs/data/scenes.yaml
  osm validate --ckpt last

`osm COMMAND --help` says more. OSM_TRACEBACK=1 shows where an error came from.
"""


def main(argv: list[str] | None = None) -> None:
    """Runs `osm ARGV`; exits with 0, 2 for what the user can mend, 130 when interrupted; docs/slurm.md has them all.

    Args:
        argv: words after `osm`; None takes the process's own.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in {"-h", "--help"}:
        print(usage())
        raise SystemExit(0)
    if words[0] == "--version":
        from osm_lightning import __version__

        print(f"osm {__version__}")
        raise SystemExit(0)
    command, rest = words[0], words[1:]
    try:
        raise SystemExit(run(command, rest))
    except KeyboardInterrupt:
        print(f"\n{rank_label()}osm {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        message = message_of(error)
        if message is None or os.environ.get("OSM_TRACEBACK"):
            raise
        print(f"{rank_label()}osm {command}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def run(command: str, rest: list[str]) -> int:
    """Runs one command and returns its exit code.

    Raises:
        ValueError: there is no such command.
    """
    hide_idle_hints()
    if command in OFFLINE_COMMANDS:
        module = importlib.import_module(f"osm_lightning.commands.{command}")
        return int(module.main(rest))
    if command in TRAINER_COMMANDS:
        if command == "fit" and "SLURM_JOB_ID" in os.environ:
            # It would end the process; so it waits until the run can save (training/interrupt.py).
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        from osm_lightning.cli import main as trainer_main

        return trainer_main([command, *rest])
    known = ", ".join([*TRAINER_COMMANDS, *OFFLINE_COMMANDS])
    raise ValueError(f"there is no such command; there are {known}. `osm --help` says what they do.")


def usage() -> str:
    """What `osm --help` prints."""
    rows = dict(TRAINER_COMMANDS)
    for name in OFFLINE_COMMANDS:
        rows[name] = importlib.import_module(f"osm_lightning.commands.{name}").HELP
    lines = [f"  {name:<10}{text}" for name, text in rows.items()]
    head = "usage: osm COMMAND [options]\n\nNames whatever is inside a segmentation mask, with no vocabulary given."
    return "\n".join([head, "", "commands:", *lines, "", EXAMPLES.rstrip()])


def message_of(error: BaseException) -> str | None:
    """What an error says, if it was raised by this package and so says all that a user needs; None for a library's.

    An error of a DataLoader's worker process arrives as text: the worker's traceback, then the message.
    """
    message, files = str(error), [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if "in DataLoader worker process" in message.partition("\n")[0]:
        frames, _, message = message.rpartition(f"\n{type(error).__name__}: ")
        files = re.findall(r'^  File "(.+)", line', frames, flags=re.MULTILINE)
    return message.rstrip() if files and Path(files[-1]).is_relative_to(Path(__file__).parent) else None


if __name__ == "__main__":
    main()
