"""The memory of a process that loads stays flat, however long it runs."""

import multiprocessing
import os
from pathlib import Path

import pytest
from tiny_training import scenes_data, tiny_task

from osm_lightning.data.worker import keep_freed_memory

IMAGES = 20_000
WARM_UP = 4_000
"""Images after which every text has been met and the heap has its size."""
BYTES_PER_IMAGE = 1024
"""What would be a leak: the smallest thing that could be kept of an image."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(sizes: multiprocessing.SimpleQueue) -> None:
    """Draws batches as a worker does; says how large the process is after every thousand images."""
    keep_freed_memory()
    data = scenes_data(tiny_task(), steps=IMAGES, quota=8, masks_per_image=8)
    batches = iter(data.train_dataloader())
    for _ in range(IMAGES // 1000):
        seen = 0
        while seen < 1000:
            seen += next(batches).num_images
        sizes.put(resident_bytes())


@pytest.mark.slow
def test_twenty_thousand_images_leave_no_trace() -> None:
    context = multiprocessing.get_context("spawn")
    sizes = context.SimpleQueue()
    process = context.Process(target=load, args=(sizes,))
    process.start()
    seen = [sizes.get() for _ in range(IMAGES // 1000)]
    process.join()
    assert process.exitcode == 0
    print("MB after every thousand images:", ", ".join(f"{size / 1e6:.0f}" for size in seen))
    assert seen[-1] - seen[WARM_UP // 1000 - 1] < BYTES_PER_IMAGE * (IMAGES - WARM_UP)
