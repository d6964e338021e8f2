"""What all tests share: one thread, no network, and an account of what could not run here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Several processes that each take all cores wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that OSM_SHARED_DATA names; tests that need it are not run without it."""
    folder = os.environ.get("OSM_SHARED_DATA")
    if not folder:
        pytest.skip(
            "OSM_SHARED_DATA is not set: it names a folder with coco_mini/, real images that the project may not carry"
        )
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many threads here as subprocesses have, so that sums are added in one order: for `usefixtures`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of drawn shapes, for fits of seconds; nobody writes into them."""
    from shapes_run import write_shapes

    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the end what was not run, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] = reasons.get(reason.removeprefix("Skipped: "), 0) + 1
    terminalreporter.section("not run here")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count:4d}  {reason}")
