"""Hints of libraries that do not apply here, so that a warning that is shown means something."""

from __future__ import annotations

import logging
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
    ".*Precision .* is not supported by the model summary.*",  # which counts parameters all the same
)
"""Lightning's and torch's warnings."""

IDLE_MESSAGES = {
    "lightning.pytorch.utilities.rank_zero": "Tip: For seamless cloud",  # wares
    "lightning.pytorch.trainer.connectors.checkpoint_connector": "`weights_only` was not set",  # of a save
    "DeepSpeed": "Setting accelerator to CPU",  # said when it is imported, wanted or not
}
"""What loggers need not say, by their names."""


class Without(logging.Filter):
    """Drops what a logger says with some words in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is said."""
        return self.name not in record.getMessage()


def hide_idle_hints() -> None:
    """Keeps them from being shown."""
    for hint in IDLE_HINTS:
        warnings.filterwarnings("ignore", message=hint)
    for name, words in IDLE_MESSAGES.items():
        logging.getLogger(name).addFilter(Without(words))
