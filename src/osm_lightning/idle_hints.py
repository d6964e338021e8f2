"""Hints of Lightning and torch that do not apply here, so that a warning that is shown means something."""

from __future__ import annotations

import warnings

IDLE_HINTS = (
    # Batches are made whole in the workers, and the machine's cores are the user's choice.
    ".*does not have many workers.*",
    ".*Trying to infer the `batch_size`.*",
    ".*Your `IterableDataset` has `__len__` defined.*",
    ".*`srun` command is available.*",
    ".*your dataloader is not resumable.*",  # it is: OSMData keeps the place
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*in eval mode at the start of training.*",  # the frozen parts are to be
)
"""Lightning's and torch's, that do not apply."""


def hide_idle_hints() -> None:
    """Keeps them from being shown."""
    for hint in IDLE_HINTS:
        warnings.filterwarnings("ignore", message=hint)
