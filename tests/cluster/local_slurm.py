"""A real Slurm on this one machine, for tests: munge, one slurmctld and two slurmd, in a folder of their own.

    python tests/cluster/local_slurm.py start [FOLDER]    # prints the lines to export
    python tests/cluster/local_slurm.py stop FOLDER

It needs root and Debian's packages `slurm-wlm` and `munge`, but neither systemd nor cgroups, and leaves /etc alone. The
daemons are stopped by the process ids that they wrote down themselves.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 State=UP
"""


class LocalSlurm:
    """Starts and stops it; `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """Where its commands find it, and what processes of nodes that are one machine need to meet."""
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self) -> LocalSlurm:
        """Starts all daemons and waits until the nodes are idle.

        Raises:
            RuntimeError: a program is missing, or the nodes don't come up; the logs lie in the folder.
        """
        missing = [name for name in DAEMONS if shutil.which(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        self.folder.chmod(0o755)  # munged refuses a socket where others may write
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 "
            "SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        config = CONFIG.format(host=socket.gethostname(), port=ports[0], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(config, encoding="utf-8")
        files = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        files |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        self._run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self._run("slurmctld")
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)
            self._run("slurmd", "-N", name)
        self._await_nodes()
        return self

    def stop(self) -> None:
        """Ends what is still running of it: jobs first, then the daemons."""
        self._run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        self._run("scancel", "--user=root", check=False)
        for _ in range(600):  # KillWait, and some: a daemon that is ended before its jobs leaves their processes behind
            if not self._run("squeue", "--noheader", check=False).stdout:
                break
            time.sleep(0.1)
        for pid_file in sorted(self.folder.glob("*.pid"), key=lambda path: path.name == "munged.pid"):
            try:
                pid = int(pid_file.read_text())
                os.kill(pid, signal.SIGTERM)
            except (ValueError, ProcessLookupError):
                continue
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(0.1)

    def __enter__(self) -> LocalSlurm:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, *words: str | Path, **environment: str) -> str:
        """Runs a command of Slurm's, and returns what it prints.

        On a busy machine it may have outlived its credential when slurmctld reads it; then it is run again.
        """
        for _ in range(5):
            done = self._run(*map(str, words), check=False, **environment)
            if not done.returncode:
                return done.stdout
            time.sleep(1)
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr}")

    def _run(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def _await_nodes(self) -> None:
        states = ""
        for _ in range(100):
            states = self._run("sinfo", "--noheader", "--partition=batch", "--format=%t %D", check=False).stdout.strip()
            if states == f"idle {len(NODES)}":
                return
            time.sleep(0.1)
        raise RuntimeError(f"the nodes are not idle after 10 s but {states!r}: see the logs in {self.folder}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at, each another."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def main(words: list[str]) -> None:
    """The script."""
    match words:
        case ["start", *folder]:
            slurm = LocalSlurm(Path(folder[0]) if folder else Path(tempfile.mkdtemp(prefix="slurm-"))).start()
            for name, value in slurm.environment.items():
                print(f"export {name}={value}")
        case ["stop", folder]:
            LocalSlurm(Path(folder)).stop()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
