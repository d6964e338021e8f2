"""Ranks watch each other: when one dies or falls silent, the others end soon, and say which one it was.

An engine notices a dead peer at its next collective, or only when that has timed out, half an hour later, and then
knows no reason. So every rank keeps a connection to rank 0 beside the engine's: the kernel closes it when a process
dies, and heartbeats tell a process that is stopped, or a node that is gone. A rank that is alive but waits for ever
within a collective is left to the engine's own timeout (`trainer.strategy`, `timeout`).
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from osm_lightning.rank_label import rank_label
from osm_lightning.training.interrupt import Interrupted

BEAT_S = 5.0
"""Time between two heartbeats."""

BEATS_MISSED = 8
"""Turns of a watch without a sign of life after which a rank counts as lost. Turns and not seconds: a job that is
suspended and resumed has missed none."""

ECHO_S = 2.0
"""How long a rank that is told of another one's error goes on: it may have the same one, and says so better itself."""

CONNECT_S = 60.0
"""How long ranks may take to connect once they have met, and the others wait for rank 0 to leave first."""

SAID = "Rank 0 has the same error."
"""Note of an exception that a further rank need not tell."""

PASSWORD_BYTES = 16

LOST = 1
"""Exit code of a rank that ends because another one has died."""


@dataclass
class Peer:
    """The other end of a connection."""

    connection: socket.socket
    name: str = "a rank that did not say its name"
    missed: int = 0
    done: bool = False
    """It said good-bye; nothing that follows is a failure."""
    unread: bytes = field(default=b"")

    def send(self, **message: Any) -> None:
        """Sends a message; the other side may be gone."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have come, or None if there will be no more."""
        try:
            chunk = self.connection.recv(1 << 16)
        except OSError:
            chunk = b""
        if not chunk:
            return None
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch(threading.Thread):
    """One rank's part: rank 0 watches all others, the others watch rank 0, which passes on what it learns."""

    def __init__(self, name: str, peers: list[Peer], is_hub: bool) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.own_name, self.peers, self.is_hub = name, peers, is_hub
        self.heard = ""
        """Why another rank has ended, once it has said so."""
        self._closed = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Beats and listens until all others have said good-bye, or one has ended without."""
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while any(not peer.done for peer in self.peers):
                self._tell(beat=self.own_name)
                turn_ends_s = time.monotonic() + BEAT_S
                while (left_s := turn_ends_s - time.monotonic()) > 0 and selector.get_map():
                    for key, _ in selector.select(left_s):
                        self._hear(key.data, selector)
                self._count_missed()

    def close(self, reason: str | None = None, exit_code: int = LOST) -> None:
        """Says good-bye: the others stop watching this rank, or end if there is a reason to."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._tell(**({"done": True} if reason is None else {"end": reason, "exit_code": exit_code}))

    def _hear(self, peer: Peer, selector: selectors.BaseSelector) -> None:
        messages = peer.receive()
        if messages is None:
            selector.unregister(peer.connection)
            if not peer.done:
                peer.done = True
                self._end(f"{peer.name} died without a word: killed, out of memory, or its node is gone", LOST)
            return
        peer.missed = 0
        for message in messages:
            peer.name = message.get("beat", peer.name)
            peer.done |= "done" in message
            if "end" in message:
                self.heard = message["end"]
                time.sleep(ECHO_S)
                self._end(message["end"], message["exit_code"])

    def _count_missed(self) -> None:
        for peer in self.peers:
            if not peer.done:
                peer.missed += 1
                if peer.missed > BEATS_MISSED:
                    silence_s = BEATS_MISSED * BEAT_S
                    self._end(f"{peer.name} gave no sign of life for {silence_s:.0f} s: stopped, or cut off", LOST)

    def _end(self, reason: str, exit_code: int) -> None:
        """Passes the reason on and ends this process, whatever its main thread waits for."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.is_hub:
            self._tell(end=reason, exit_code=exit_code)
        print(f"{rank_label()}stopped, because {reason}.", file=sys.stderr, flush=True)
        os._exit(exit_code)

    def _tell(self, **message: Any) -> None:
        for peer in self.peers:
            if not peer.done:
                peer.send(**message)


class WatchRanks(Callback):
    """Watches from when the ranks have met until they are done."""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connects all ranks to rank 0, at a port that it chooses, and starts to watch."""
        if trainer.world_size == 1 or self.watch is not None:
            return
        name = f"rank {trainer.global_rank} ({socket.gethostname()}, process {os.getpid()})"
        listening = socket.create_server(("", 0), backlog=trainer.world_size) if trainer.is_global_zero else None
        port = None if listening is None else listening.getsockname()[1]
        port, password = trainer.strategy.broadcast((port, secrets.token_bytes(PASSWORD_BYTES)))
        if listening is None:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_S)
            connection.sendall(password)
            peers = [Peer(connection, "rank 0")]
        else:
            peers = welcome(listening, trainer.world_size - 1, password)
        for peer in peers:
            # A loader's worker must not keep the connection of a process that died.
            os.register_at_fork(after_in_child=peer.connection.close)
        self.watch = Watch(name, peers, is_hub=trainer.is_global_zero)
        self.watch.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the others why this rank ends, for they would wait for it. A further rank lets rank 0 leave first."""
        if self.watch is None:
            end_started(trainer)
            return
        if isinstance(exception, RuntimeError) or isinstance(exception.__cause__, RuntimeError):
            time.sleep(2 * ECHO_S)  # an engine's error is mostly the echo of another rank's end
        ended = f" ended with {type(exception).__name__}: {exception}".splitlines()[0]
        if isinstance(exception, Interrupted) and not trainer.is_global_zero:
            self.watch.close()  # all stop together
        else:
            self.watch.close(self.watch.own_name + ended, exit_code_of(exception))
        if not trainer.is_global_zero:
            # Lightning's launcher kills rank 0 if it finds that another one has left before.
            self.watch.join(CONNECT_S)
            if self.watch.heard == self.watch.peers[0].name + ended:
                exception.add_note(SAID)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says good-bye."""
        if self.watch is not None:
            self.watch.close()


def welcome(listening: socket.socket, number: int, password: bytes) -> list[Peer]:
    """Takes in so many ranks, and nobody else who happens to try the port.

    Raises:
        TimeoutError: they don't come.
    """
    peers: list[Peer] = []
    listening.settimeout(CONNECT_S)
    with listening:
        while len(peers) < number:
            connection = listening.accept()[0]
            connection.settimeout(CONNECT_S)
            if connection.recv(len(password), socket.MSG_WAITALL) == password:
                peers.append(Peer(connection))
            else:
                connection.close()
    return peers


def end_started(trainer: Trainer) -> None:
    """Ends the ranks that this process has started and not met: torch would say at length that they lost it."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
        launcher.procs.clear()  # Lightning's observer of them would kill this process too


def exit_code_of(exception: BaseException) -> int:
    """What the command makes of an exception."""
    if isinstance(exception, Interrupted):
        return 128 + exception.stop
    return 130 if isinstance(exception, KeyboardInterrupt) else 2 if isinstance(exception, ValueError) else LOST
