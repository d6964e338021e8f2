"""Stopping a fit without losing anything: after a signal all ranks save together at the same step, and end.

A handler only takes note. What is to be done is agreed on between two optimizer steps, where all ranks stand at the
same place and no collective is under way; saving inside a handler is what hangs sharded engines.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from osm_lightning.batch import MaskBatch
from osm_lightning.rank_label import rank_label
from osm_lightning.training.requeue import requeue_job

STOPS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What stops a fit; where ranks got different ones, the later in this row counts."""

REQUEUES = (signal.SIGUSR1, signal.SIGTERM)
"""Those after which a Slurm job is to run again: its time is nearly over, or it has to make room."""


class Interrupted(SystemExit):
    """Ends a fit that was stopped before its end. The exit code is the shell's: 128 and the signal's number."""

    def __init__(self, stop: signal.Signals) -> None:
        super().__init__(128 + stop)
        self.stop = stop


def do_not_listen(trainer: Trainer) -> None:
    """Keeps Lightning from listening for signals, before it runs anything.

    Its handler for SIGTERM calls a collective: where one rank gets the signal while it waits for its first batch, and
    another is within a collective, theirs meet, and both wait for ever. A prediction would go on as if nothing was; so
    it ends at once, as a validation does. On Slurm, Lightning's handler for SIGUSR1 saves within itself.
    """
    cast("Any", trainer)._signal_connector.register_signal_handlers = lambda: None


class Interrupt(Callback):
    """Saves, requeues and stops on SIGUSR1, SIGTERM and SIGINT; a second SIGINT stops at once.

    The trainer itself must not listen (`do_not_listen`).

    In training the checkpoint is written at the next optimizer step. Validation may take longer than there is time, and
    its ranks are not at the same batch: so it begins with a checkpoint, from which a resumed run validates anew, and a
    signal ends it at once, or at its end where rank 0 did not get it.
    """

    def __init__(self, last: Path) -> None:
        """Does not listen yet.

        Args:
            last: the run's last checkpoint, which it goes on from.
        """
        self.last = last
        self._received = 0  # place in STOPS, counted from 1
        self._step = -1
        self._validation_is_due = False

    def listen(self) -> None:
        """Takes the signals, with one that has waited since the command began (`__main__.py`)."""
        for stop in STOPS:
            signal.signal(stop, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        place = 1 + STOPS.index(signal.Signals(number))
        if number == signal.SIGINT and self._received == place:
            raise KeyboardInterrupt
        self._received = max(self._received, place)
        hint = " Once more stops at once." if number == signal.SIGINT else ""
        # Not print: it may be what was interrupted.
        os.write(2, f"{rank_label()}{signal.Signals(number).name}: saving at the next step.{hint}\n".encode())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes note of where it begins."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        """Stops after an optimizer step; the last one of an epoch waits for its validation, or its end."""
        accumulates = trainer.global_step == self._step
        self._step = trainer.global_step
        ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if not (accumulates or ends):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, as all ranks are at the same place here and not again before the end."""
        if trainer.state.fn is not TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validation_is_due = True
        self._stop_if_asked(trainer)
        trainer.save_checkpoint(self.last)
        self._validation_is_due = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: MaskBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops rank 0, with which the others end; what there is to save has been saved."""
        if trainer.state.fn is TrainerFn.FITTING and self._received and trainer.is_global_zero:
            stop = STOPS[self._received - 1]
            wait_for_writing(trainer)
            self._report(stop, trainer)
            raise Interrupted(stop)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between two epochs; after the last one there is nothing left to stop."""
        if trainer.fit_loop.epoch_progress.current.processed != trainer.max_epochs:
            self._stop_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A run that has come to its end has nothing to save, nor is its job to run again: it ends with code 0.

        Ignored and not only handled: at its end the interpreter takes handlers back, and a signal would kill it.
        """
        for stop in REQUEUES:
            signal.signal(stop, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Marks a checkpoint that is written before a validation as one from which to validate.

        Lightning goes back into a validation only from a checkpoint that was written within one of its batches.
        """
        if self._validation_is_due:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
            progress["ready"] += 1
            progress["started"] += 1

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Saves and raises `Interrupted` on all ranks if any of them was asked to stop."""
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        place = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not place:
            return
        trainer.save_checkpoint(self.last)
        wait_for_writing(trainer)
        if trainer.is_global_zero:
            self._report(STOPS[place - 1], trainer)
        # Whoever left before could have the launcher end rank 0 before it has requeued the job.
        trainer.strategy.barrier()
        raise Interrupted(STOPS[place - 1])

    def _report(self, stop: signal.Signals, trainer: Trainer) -> None:
        again = requeue_job() if stop in REQUEUES else f"go on with --ckpt {self.last}"
        print(f"{rank_label()}{stop.name}: saved {self.last} at step {trainer.global_step}; {again}", flush=True)


def wait_for_writing(trainer: Trainer) -> None:
    """Waits until a checkpoint that is written beside training is whole, before anybody is told that it is.

    Raises:
        ValueError: it could not be written.
    """
    trainer.strategy.checkpoint_io.teardown()
