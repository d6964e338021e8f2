"""A fit with adapters: they learn and the LLM does not, checkpoints hold them, and a resumed fit is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Job, Record, run, work
from tiny_training import build, scenes_data, tiny_task, trainer
from torch._dynamo.utils import counters

from osm_lightning.model.config import LoraConfig
from osm_lightning.model.lora import is_adapter
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask
from osm_lightning.weights.checkpoint import PREFIX, read_checkpoint

LORA = {"lora": LoraConfig(rank=4, dropout=0.2)}
STILL = {"lora": LoraConfig(rank=4, dropout=0.0)}
LOSS_ATOL = 1e-3
"""As in test_strategies: of losses near 7."""
EVERY = ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def lora_task(lora: LoraConfig | None = LORA["lora"], **settings: Any) -> OSMTask:
    torch.manual_seed(0)
    task = tiny_task(**{"optim": OptimConfig(lr=1e-2, warmup_steps=1), **settings})
    task.language.lora = lora
    return task


def save(task: OSMTask, path: Path) -> Path:
    """Keeps a built task's checkpoint, of no steps."""
    task.config_text = "model: {modes: [scenes]}\n"
    content: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[OSMTask, Path]:
    """A model that has no adapters, and its checkpoint."""
    folder = tmp_path_factory.mktemp("without")
    task = build(lora_task(None), folder)
    return task, save(task, folder / "run.ckpt")


def test_adapters_learn_with_the_mask_side_and_the_llm_stays_bit_for_bit(tmp_path: Path) -> None:
    task = build(lora_task(), tmp_path)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    record = Record(Job(tmp_path))
    loop = trainer(tmp_path, callbacks=[record])
    loop.fit(task, scenes_data(task, steps=30))
    first, last = record.losses[:5], record.losses[-5:]
    assert sum(last) < 0.9 * sum(first), (first, last)
    trained = {PREFIX + name for name, _ in task.osm.trained()}
    moved = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in trained if is_adapter(name)}
    assert len(adapters) == 2 * 2 * 2, "layers, targets, sides"
    assert adapters <= moved <= trained
    loop.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == trained
    assert "osm.language.llm.model.layers.0.self_attn.q_proj.lora_A.default.weight" in saved


def test_a_resumed_fit_is_that_of_no_interruption_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "dropout": 0.1, "language": LORA}
    whole_run = work(Job(tmp_path, save="last.ckpt", **settings))
    resumed = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **settings))
    assert resumed["losses"] == whole_run["losses"][3:]
    undropped = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **{**settings, "language": STILL}))
    assert undropped["losses"] != resumed["losses"], "the adapters' dropout is not felt"


def test_a_checkpoint_without_adapters_starts_them_anew(without: tuple[OSMTask, Path], tmp_path: Path) -> None:
    old, path = without
    with pytest.warns(UserWarning, match="the checkpoint has no LoRA adapters: they start anew, without effect"):
        task = build(lora_task(weights=str(path)), tmp_path)
    assert task.osm.frozen_identity() == old.osm.frozen_identity()
    (loader,) = scenes_data(old).val_dataloader()
    batch = next(iter(loader))
    made = [one.eval().predict_step(batch, 0) for one in (old, task)]
    assert made[0]
    assert made[0] == made[1]
    for name, parameter in old.osm.trained():
        assert torch.equal(task.osm.get_parameter(name), parameter), name


def test_adapters_of_a_checkpoint_are_all_taken_over_or_none(without: tuple[OSMTask, Path], tmp_path: Path) -> None:
    task = build(lora_task(), tmp_path)
    with torch.no_grad():
        for name, parameter in task.osm.trained():
            if is_adapter(name):
                parameter.normal_()
    path = save(task, tmp_path / "adapted.ckpt")
    other = build(lora_task(weights=str(path)), tmp_path)
    for name, parameter in task.osm.trained():
        assert torch.equal(other.osm.get_parameter(name), parameter), name
    with pytest.raises(ValueError, match=r"of another model \(8 unexpected: language\.llm\."):
        build(lora_task(None, weights=str(path)), tmp_path)
    with pytest.raises(ValueError, match=r"of another model \(8 of another shape"):
        build(lora_task(LoraConfig(rank=2), weights=str(path)), tmp_path)
    content = torch.load(path, weights_only=True)
    lost = next(name for name in content["state_dict"] if is_adapter(name))
    del content["state_dict"][lost]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"of another model \(1 missing: language\.llm\."):
        build(lora_task(weights=str(path)), tmp_path)


def test_resuming_wants_the_adapters(without: tuple[OSMTask, Path], tmp_path: Path) -> None:
    """A run goes on with what it began with; only a new one may begin without."""
    task = build(lora_task(), tmp_path)
    with pytest.raises(ValueError, match="8 missing"):
        task.on_load_checkpoint(torch.load(without[1], weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_losses_of_others(recompute: bool, tmp_path: Path) -> None:
    language = {**STILL, "recompute_activations": recompute}
    wanted = work(Job(tmp_path, steps=6, language=STILL))["losses"]
    found = work(Job(tmp_path, steps=6, language=language, task={"compile_blocks": True}))["losses"]
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch._dynamo.reset()
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_compiled_adapters_drop_and_a_resumed_fit_drops_the_same(tmp_path: Path) -> None:
    task = {"compile_blocks": True}
    settings: dict[str, Any] = {"steps": 6, "language": {**LORA, "recompute_activations": True}, "task": task}
    whole_run = work(Job(tmp_path, save="last.ckpt", **settings))
    resumed = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **settings))
    undropped = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **{**settings, "language": STILL}))
    torch._dynamo.reset()
    assert resumed["losses"] == whole_run["losses"][3:]
    assert undropped["losses"] != resumed["losses"]


# Two processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Losses of one process that trains on both processes' batches."""
    (one,) = run(Job(tmp_path_factory.mktemp("alone"), steps=10, union_of=2, language=STILL))
    return torch.tensor(one["losses"])


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_have_the_losses_of_one(strategy: str, alone: torch.Tensor, tmp_path: Path) -> None:
    ranks = run(Job(tmp_path, strategy, ranks=2, steps=10, language=STILL))
    losses = torch.tensor([rank["losses"] for rank in ranks]).T.flatten()
    assert (losses - alone).abs().max() < LOSS_ATOL


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_resume_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "steps": 6, "dropout": 0.1, "language": LORA}
    path = str(tmp_path / "last.ckpt")
    whole_run = run(Job(tmp_path, save="last.ckpt", **settings))
    resumed = run(Job(tmp_path, ckpt=path, **settings))
    for before, after in zip(whole_run, resumed, strict=True):
        assert after["losses"] == before["losses"][3:]
    adapters = {name: tensor for name, tensor in read_checkpoint(path).tensors.items() if is_adapter(name)}
    assert len(adapters) == 8
    assert all(tensor.ne(0).any() for tensor in adapters.values())


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_take_the_adapters_of_a_checkpoint_over(strategy: str, tmp_path: Path) -> None:
    """Which are shared out with their block before anything is read."""
    task = build(lora_task(STILL["lora"]), tmp_path)
    bare, adapted = tmp_path / "bare.ckpt", tmp_path / "adapted.ckpt"
    with torch.no_grad():
        for name, parameter in task.osm.trained():
            if is_adapter(name):
                parameter.normal_()
    content = torch.load(save(task, adapted), weights_only=True)
    content["state_dict"] = {name: tensor for name, tensor in content["state_dict"].items() if not is_adapter(name)}
    torch.save(content, bare)

    def first_losses(path: Path, **settings: Any) -> list[float]:
        (one, *others) = run(Job(tmp_path / "fit", weights=str(path), steps=1, language=STILL, **settings))
        return [*one["losses"], *(rank["losses"][0] for rank in others)]

    wanted = first_losses(adapted, union_of=2)
    assert first_losses(adapted, strategy=strategy, ranks=2) == pytest.approx(wanted, abs=LOSS_ATOL)
    assert abs(first_losses(bare, union_of=2)[0] - wanted[0]) > 100 * LOSS_ATOL, "the adapters are not felt"


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_compute_adapted_blocks_again(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "steps": 6}
    plain, again = (
        run(Job(tmp_path, language={**LORA, "recompute_activations": recompute}, **settings))
        for recompute in (False, True)
    )
    for one, other in zip(plain, again, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-6)
