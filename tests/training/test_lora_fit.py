"""A fit with adapters: they learn and the LLM does not, checkpoints hold them, and a resumed fit is the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from engines import Job, run, work
from tiny_training import build, scenes_data, tiny_task, trainer
from torch._dynamo.utils import counters

from osm_lightning.model.config import LoraConfig
from osm_lightning.model.lora import is_adapter, plain_name
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask
from osm_lightning.weights.checkpoint import PREFIX, read_checkpoint

ON_LLM = LoraConfig(rank=4, dropout=0.2)
ON_QFORMER = LoraConfig(rank=4, targets=["query", "value"], dropout=0.2)
PARTS: dict[str, Any] = {"language": {"lora": ON_LLM}, "qformer": {"lora": ON_QFORMER}}
"""Adapters on both parts, and their dropout."""
STILL: dict[str, Any] = {part: {"lora": replace(of["lora"], dropout=0.0)} for part, of in PARTS.items()}
"""Without dropout."""
ON = {"language": {"language": STILL["language"]}, "both": STILL}
WHERE = [(ON_LLM, None, 8), (None, ON_QFORMER, 16), (ON_LLM, ON_QFORMER, 24)]
"""Adapters of the LLM, of the Q-Former, and how many tensors they are."""
LOSS_ATOL = 1e-3
"""As in test_strategies: of losses near 7."""
HALF_ATOL = 0.05
"""The same beside bfloat16, of which a step at 7 is 0.03."""
EVERY = ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def lora_task(language: LoraConfig | None = ON_LLM, qformer: LoraConfig | None = None, **settings: Any) -> OSMTask:
    torch.manual_seed(0)
    task = tiny_task(**{"optim": OptimConfig(lr=1e-2, warmup_steps=1), **settings})
    task.language.lora, task.qformer.lora = language, qformer
    return task


def save(task: OSMTask, path: Path, config: str = "model: {modes: [scenes]}\n") -> Path:
    """Keeps a built task's checkpoint, of no steps."""
    task.config_text = config
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


@pytest.mark.parametrize(("language", "qformer", "num_adapters"), WHERE, ids=["language", "qformer", "both"])
def test_adapters_are_trained_and_what_they_are_beside_stays_bit_for_bit(
    language: LoraConfig | None, qformer: LoraConfig | None, num_adapters: int, tmp_path: Path
) -> None:
    task = build(lora_task(language, qformer), tmp_path)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    loop = trainer(tmp_path)
    loop.fit(task, scenes_data(task, steps=4))
    trained = {PREFIX + name for name, _ in task.osm.trained()}
    moved = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in trained if is_adapter(name)}
    assert len(adapters) == num_adapters
    assert adapters <= moved <= trained
    of_qformer = {name for name in before if name.startswith("osm.qformer.") and not is_adapter(name)}
    queries = {"osm.qformer.mask_query_QD", "osm.qformer.context_query_QD"}
    assert of_qformer & trained == (queries if qformer else of_qformer)
    loop.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == trained | of_qformer, "a checkpoint holds all of the mask side"
    assert not any("llm." in name for name in saved if not is_adapter(name))


@pytest.mark.parametrize(("language", "qformer", "num_adapters"), WHERE, ids=["language", "qformer", "both"])
def test_adapters_alone_learn_the_names_of_a_batch_by_heart(
    language: LoraConfig | None, qformer: LoraConfig | None, num_adapters: int, tmp_path: Path
) -> None:
    del num_adapters
    task = build(lora_task(language, qformer), tmp_path)
    osm, batch = task.osm.eval(), next(iter(scenes_data(task).train_dataloader()))
    optimizer = torch.optim.AdamW([parameter for name, parameter in osm.trained() if is_adapter(name)], lr=1e-2)
    losses = []
    for _ in range(100):
        answers = osm(batch)
        losses.append(F.cross_entropy(answers.logits_PV, answers.target_P))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("still", ["language", "qformer"])
def test_a_resumed_fit_is_that_of_no_interruption_bit_for_bit(still: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "dropout": 0.1, **PARTS}
    whole_run = work(Job(tmp_path, save="last.ckpt", **settings))
    resumed = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **settings))
    assert resumed["losses"] == whole_run["losses"][3:]
    undropped = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **{**settings, still: STILL[still]}))
    assert undropped["losses"] != resumed["losses"], "the adapters' dropout is not felt"


@pytest.mark.parametrize(("language", "qformer", "num_adapters"), WHERE, ids=["language", "qformer", "both"])
def test_a_checkpoint_without_adapters_starts_them_anew(
    without: tuple[OSMTask, Path],
    language: LoraConfig | None,
    qformer: LoraConfig | None,
    num_adapters: int,
    tmp_path: Path,
) -> None:
    old, path = without
    with pytest.warns(UserWarning, match="the checkpoint has no LoRA adapters of the .* start anew, without effect"):
        task = build(lora_task(language, qformer, weights=str(path)), tmp_path)
    assert task.osm.frozen_identity() == old.osm.frozen_identity()
    (loader,) = scenes_data(old).val_dataloader()
    batch = next(iter(loader))
    made = [one.eval().predict_step(batch, 0) for one in (old, task)]
    assert made[0]
    assert made[0] == made[1]
    assert sum(is_adapter(name) for name, _ in task.osm.trained()) == num_adapters
    held = {plain_name(name): parameter for name, parameter in task.osm.kept()}
    for name, parameter in old.osm.trained():
        assert torch.equal(held[name], parameter), name


def test_adapters_of_a_checkpoint_are_all_taken_over_or_none(without: tuple[OSMTask, Path], tmp_path: Path) -> None:
    task = with_felt_adapters(build(lora_task(ON_LLM, ON_QFORMER), tmp_path))
    path = save(task, tmp_path / "adapted.ckpt")
    other = build(lora_task(ON_LLM, ON_QFORMER, weights=str(path)), tmp_path)
    for name, parameter in task.osm.kept():
        assert torch.equal(other.osm.get_parameter(name), parameter), name
    with pytest.raises(ValueError, match=r"of another model \(8 unexpected: language\.llm\."):
        build(lora_task(None, ON_QFORMER, weights=str(path)), tmp_path)
    with pytest.raises(ValueError, match=r"of another model \(.*unexpected: qformer\.layers\."):
        build(lora_task(ON_LLM, None, weights=str(path)), tmp_path)
    with pytest.raises(ValueError, match=r"of another model \(8 of another shape"):
        build(lora_task(replace(ON_LLM, rank=2), ON_QFORMER, weights=str(path)), tmp_path)
    content = torch.load(path, weights_only=True)
    lost = next(name for name in content["state_dict"] if is_adapter(name) and "llm." in name)
    del content["state_dict"][lost]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"of another model \(1 missing: language\.llm\."):
        build(lora_task(ON_LLM, ON_QFORMER, weights=str(path)), tmp_path)


@torch.no_grad()
def with_felt_adapters(task: OSMTask) -> OSMTask:
    """Adapters as if they were trained."""
    for name, parameter in task.osm.trained():
        if is_adapter(name):
            parameter.normal_()
    return task


@pytest.mark.parametrize(("part", "place"), [("language", 0), ("qformer", 1)])
def test_adapters_are_not_made_stronger_without_a_word(part: str, place: int, tmp_path: Path) -> None:
    both = [ON_LLM, ON_QFORMER]
    task = build(lora_task(*both), tmp_path)
    config = {
        "model": {"modes": ["scenes"], "language": {"lora": asdict(ON_LLM)}, "qformer": {"lora": asdict(ON_QFORMER)}}
    }
    path = save(task, tmp_path / "adapted.ckpt", yaml.safe_dump(config))
    both[place] = replace(both[place], alpha=2 * both[place].alpha)
    refusal = rf"model\.{part}\.lora multiplies .* = 8, but .* with 4\. Set model\.{part}\.lora\.alpha to 16\."
    with pytest.raises(ValueError, match=refusal):
        build(lora_task(*both, weights=str(path)), tmp_path)
    with pytest.raises(ValueError, match=refusal):
        build(lora_task(*both), tmp_path).on_load_checkpoint(torch.load(path, weights_only=True))


def test_resuming_wants_the_adapters(without: tuple[OSMTask, Path], tmp_path: Path) -> None:
    """A run goes on with what it began with; only a new one may begin without."""
    task = build(lora_task(), tmp_path)
    with pytest.raises(ValueError, match="8 missing"):
        task.on_load_checkpoint(torch.load(without[1], weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_losses_of_others(recompute: bool, tmp_path: Path) -> None:
    compiled = {**STILL, "language": {**STILL["language"], "recompute_activations": recompute}}
    wanted = work(Job(tmp_path, steps=6, **STILL))["losses"]
    found = work(Job(tmp_path, steps=6, **compiled, task={"compile_blocks": True}))["losses"]
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch._dynamo.reset()
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_compiled_adapters_drop_and_a_resumed_fit_drops_the_same(tmp_path: Path) -> None:
    task = {"compile_blocks": True}
    language = {**PARTS["language"], "recompute_activations": True}
    settings: dict[str, Any] = {"steps": 6, **PARTS, "language": language, "task": task}
    whole_run = work(Job(tmp_path, save="last.ckpt", **settings))
    resumed = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **settings))
    undropped = work(Job(tmp_path, ckpt=str(tmp_path / "last.ckpt"), **{**settings, **STILL}))
    torch._dynamo.reset()
    assert resumed["losses"] == whole_run["losses"][3:]
    assert undropped["losses"] != resumed["losses"]


# Two processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(ON))
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor]:
    """Where adapters are, and the losses of one process that trains on both processes' batches."""
    (one,) = run(Job(tmp_path_factory.mktemp("alone"), steps=10, union_of=2, **ON[request.param]))
    return request.param, torch.tensor(one["losses"])


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_have_the_losses_of_one(strategy: str, alone: tuple[str, torch.Tensor], tmp_path: Path) -> None:
    where, wanted = alone
    ranks = run(Job(tmp_path, strategy, ranks=2, steps=10, **ON[where]))
    losses = torch.tensor([rank["losses"] for rank in ranks]).T.flatten()
    assert (losses - wanted).abs().max() < LOSS_ATOL


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_resume_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "steps": 6, "dropout": 0.1, **PARTS}
    path = str(tmp_path / "last.ckpt")
    whole_run = run(Job(tmp_path, save="last.ckpt", **settings))
    resumed = run(Job(tmp_path, ckpt=path, **settings))
    for before, after in zip(whole_run, resumed, strict=True):
        assert after["losses"] == before["losses"][3:]
    kept = read_checkpoint(path).tensors
    adapters = {name: tensor for name, tensor in kept.items() if is_adapter(name)}
    assert len(adapters) == 24
    assert all(tensor.ne(0).any() for tensor in adapters.values())
    # What nobody trains of the Q-Former is as it was drawn, and whole.
    drawn = dict(build(lora_task(ON_LLM, ON_QFORMER), tmp_path).osm.kept())
    assert kept.keys() == drawn.keys()
    untrained = {name for name, parameter in drawn.items() if not parameter.requires_grad}
    assert any("base_layer" in name for name in untrained)
    for name in untrained:
        assert torch.equal(kept[name], drawn[name]), name


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_checkpoints_with_adapters_are_opened_by_other_strategies(strategy: str, tmp_path: Path) -> None:
    """With all that the optimizer remembers: without dropout, they go on alike."""
    settings: dict[str, Any] = {"ranks": 2, "steps": 6, **STILL}
    whole_run = run(Job(tmp_path, strategy, save="last.ckpt", **settings))
    for reader in sorted({"ddp", "fsdp2", "deepspeed_zero3"} - {strategy}):
        resumed = run(Job(tmp_path, reader, ckpt=str(tmp_path / "last.ckpt"), **settings))
        for before, after in zip(whole_run, resumed, strict=True):
            assert after["losses"] == pytest.approx(before["losses"][3:], abs=LOSS_ATOL)


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_adapters_beside_half_precision_have_the_losses_of_one_process(strategy: str, tmp_path: Path) -> None:
    """The default: float32 adapters in blocks of bfloat16, which are shared out together."""
    half = {**STILL, "language": {**STILL["language"], "dtype": "bfloat16"}}
    (one,) = run(Job(tmp_path / "alone", steps=4, union_of=2, **half))
    ranks = run(Job(tmp_path / "two", strategy, ranks=2, steps=4, **half))
    losses = torch.tensor([rank["losses"] for rank in ranks]).T.flatten()
    assert (losses - torch.tensor(one["losses"])).abs().max() < HALF_ATOL


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_take_the_adapters_of_a_checkpoint_over(strategy: str, tmp_path: Path) -> None:
    """Which are shared out with their block before anything is read."""
    task = with_felt_adapters(build(lora_task(STILL["language"]["lora"], STILL["qformer"]["lora"]), tmp_path))
    bare, adapted = tmp_path / "bare.ckpt", tmp_path / "adapted.ckpt"
    content = torch.load(save(task, adapted), weights_only=True)
    content["state_dict"] = {
        plain_name(name): tensor for name, tensor in content["state_dict"].items() if not is_adapter(name)
    }
    torch.save(content, bare)

    def first_losses(path: Path, **settings: Any) -> list[float]:
        (one, *others) = run(Job(tmp_path / "fit", weights=str(path), steps=1, **STILL, **settings))
        return [*one["losses"], *(rank["losses"][0] for rank in others)]

    wanted = first_losses(adapted, union_of=2)
    assert first_losses(adapted, strategy=strategy, ranks=2) == pytest.approx(wanted, abs=LOSS_ATOL)
    assert abs(first_losses(bare, union_of=2)[0] - wanted[0]) > 100 * LOSS_ATOL, "the adapters are not felt"


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", EVERY)
def test_two_processes_compute_adapted_blocks_again(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "steps": 6, **PARTS}
    plain, again = (
        run(Job(tmp_path, **{**settings, "language": {**PARTS["language"], "recompute_activations": recompute}}))
        for recompute in (False, True)
    )
    for one, other in zip(plain, again, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-6)
