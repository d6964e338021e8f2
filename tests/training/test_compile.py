"""A compiled run: the losses, checkpoints and names of any other, and graphs that are made once for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_training import build, scenes_data, tiny_task, trainer
from torch._dynamo.utils import counters

from osm_lightning.batch import MaskBatch
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask

pytestmark = pytest.mark.slow

LOSS_ATOL = 1e-4
"""Of losses near 7, in float32, whose sums are taken in another order: set before measuring."""


class Steps(Callback):
    """Losses, lengths of the texts, and how many graphs there were after each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.lengths: list[int] = []
        self.graphs: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.lengths.append(batch.text_ids_ML.shape[1])
        self.graphs.append(counters["stats"]["unique_graphs"])


def fit(folder: Path, compiled: bool, recompute: bool = False) -> tuple[Steps, OSMTask]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    task = tiny_task(optim=OptimConfig(lr=2e-3, warmup_steps=4), compile_blocks=compiled)
    task.config_text = "model: {modes: [scenes]}\n"
    task.qformer.dropout, task.language.recompute_activations = 0.0, recompute
    steps = Steps()
    loop = trainer(folder, callbacks=[steps], limit_val_batches=1.0)
    loop.fit(task, scenes_data(task, steps=12, masks_per_image=2))
    loop.save_checkpoint(folder / "run.ckpt")
    return steps, task


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return fit(folder, compiled=False)[0], folder / "run.ckpt"


@pytest.fixture(scope="module", params=[False, True], ids=["", "computed again"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Steps, OSMTask, Path]]:
    folder = tmp_path_factory.mktemp("compiled")
    yield *fit(folder, compiled=True, recompute=request.param), folder / "run.ckpt"
    torch._dynamo.reset()


def test_losses_are_those_of_an_uncompiled_run(
    plain: tuple[Steps, Path], compiled: tuple[Steps, OSMTask, Path]
) -> None:
    assert plain[0].graphs[-1] == 0
    wanted = torch.tensor(plain[0].losses)
    torch.testing.assert_close(torch.tensor(compiled[0].losses), wanted, atol=LOSS_ATOL, rtol=0)


def test_after_the_first_steps_no_length_needs_a_graph_of_its_own(compiled: tuple[Steps, OSMTask, Path]) -> None:
    steps = compiled[0]
    assert set(steps.lengths[3:]) - set(steps.lengths[:3]), "no new length comes later"
    # Blocks of the tower and of the LLM, Q-Former layers that look at the image and, in other models, ones that don't.
    assert 3 <= steps.graphs[2] <= 8
    assert steps.graphs[-1] == steps.graphs[2]


def test_checkpoints_have_the_same_names_and_open_in_an_uncompiled_run(
    plain: tuple[Steps, Path], compiled: tuple[Steps, OSMTask, Path], tmp_path: Path
) -> None:
    contents = [torch.load(path, weights_only=True)["state_dict"] for path in (plain[1], compiled[2])]
    assert contents[0].keys() == contents[1].keys()
    torch.manual_seed(0)  # the frozen parts are drawn anew
    opened = build(tiny_task(weights=str(compiled[2])), tmp_path)
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, compiled[1].state_dict()[name]), name


def test_names_are_those_of_an_uncompiled_model(compiled: tuple[Steps, OSMTask, Path], tmp_path: Path) -> None:
    task = compiled[1].eval()
    (loader,) = scenes_data(task).val_dataloader()
    batch = next(iter(loader))
    other = build(tiny_task(), tmp_path).eval()
    other.load_state_dict(task.state_dict())
    made = [one.predict_step(batch, 0) for one in (task, other)]
    assert made[0]
    for one, another in zip(*made, strict=True):
        assert one.answers["agnostic"].token_ids == another.answers["agnostic"].token_ids
