from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import build, scenes_data, tiny_task, trainer

from osm_lightning.model.osm import OSM
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask
from osm_lightning.weights.checkpoint import CONTENT_KEY


def trained_names(task: OSMTask) -> set[str]:
    return {f"osm.{name}" for name, _ in task.osm.trained()}


def config_text(*modes: str) -> str:
    """As much of a run's config as a checkpoint is asked for."""
    return yaml.safe_dump({"model": {"modes": list(modes)}})


def fit_and_save(folder: Path, **settings: object) -> tuple[OSMTask, Path]:
    """Trains for some steps and keeps a checkpoint."""
    task = tiny_task(optim=OptimConfig(lr=1e-2, warmup_steps=1), **settings)
    task.config_text = config_text(*task.modes)
    loop = trainer(folder, enable_checkpointing=True)
    loop.fit(task, scenes_data(task))
    loop.save_checkpoint(folder / "run.ckpt")
    return task, folder / "run.ckpt"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[OSMTask, Path]:
    return fit_and_save(tmp_path_factory.mktemp("fit"))


# What is trained, what is kept


def test_checkpoint_holds_exactly_what_is_trained(fitted: tuple[OSMTask, Path]) -> None:
    task, path = fitted
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == trained_names(task)
    for name, tensor in content["state_dict"].items():
        assert torch.equal(tensor, task.get_parameter(name)), name
    assert content[CONTENT_KEY] == {"config": task.config_text, "frozen": task.osm.frozen_identity()}


def test_training_moves_everything_that_is_trained_and_nothing_frozen(tmp_path: Path) -> None:
    task = build(tiny_task(optim=OptimConfig(lr=1e-2, warmup_steps=1)), tmp_path)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    trainer(tmp_path).fit(task, scenes_data(task, steps=6, quota=8))
    moved = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= trained_names(task), "something frozen moved"
    # Kept for InstructBLIP's weights, without effect: a key's bias shifts all scores of a row alike, and nobody reads
    # the instruction after the last layer.
    last = f".layers.{task.qformer.num_layers - 1}.text_ffn."
    assert {
        name for name in trained_names(task) - moved if not name.endswith(".key.bias") and last not in name
    } == set()
    assert all(parameter.grad is not None for _, parameter in task.osm.trained()), "DDP hangs on unused parameters"


def test_frozen_parts_have_no_gradients_and_stay_in_eval(fitted: tuple[OSMTask, Path]) -> None:
    task, _ = fitted
    frozen = {name: p for name, p in task.named_parameters() if name not in trained_names(task)}
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())
    task.train()
    assert task.osm.qformer.training
    assert not task.osm.language.llm.training


# Going on, and starting from


def test_resuming_refuses_other_modes_even_if_there_are_as_many(fitted: tuple[OSMTask, Path], tmp_path: Path) -> None:
    task = tiny_task(modes=["coco"])
    data = scenes_data(task)
    data.sources["scenes"].mode = "coco"
    with pytest.raises(ValueError, match=r"modes are agnostic, scenes.*agnostic, coco.*--model\.weights"):
        trainer(tmp_path, max_epochs=2).fit(task, data, ckpt_path=fitted[1], weights_only=True)


def test_resuming_refuses_another_model_size(fitted: tuple[OSMTask, Path], tmp_path: Path) -> None:
    task = tiny_task()
    task.qformer.width = 16
    with pytest.raises(ValueError, match=r"of another shape: .*\(4, 32\) for \(4, 16\)"):
        trainer(tmp_path, max_epochs=2).fit(task, scenes_data(task), ckpt_path=fitted[1], weights_only=True)


def test_resuming_refuses_other_frozen_weights(fitted: tuple[OSMTask, Path], tmp_path: Path) -> None:
    content = torch.load(fitted[1], weights_only=True)
    content[CONTENT_KEY]["frozen"]["language"] = "0" * 16
    torch.save(content, tmp_path / "other.ckpt")
    task = tiny_task()
    task.osm = fitted[0].osm
    with pytest.raises(ValueError, match="another frozen language part"):
        trainer(tmp_path, max_epochs=2).fit(task, scenes_data(task), ckpt_path=tmp_path / "other.ckpt")


def test_weights_with_other_modes_go_by_name_and_new_ones_start_as_agnostic(
    fitted: tuple[OSMTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, path = fitted
    task = tiny_task(modes=["coco", "scenes"], weights=str(path))
    # The frozen parts are random here, and drawn anew; here they pass for the old ones.
    identity = old.osm.frozen_identity()
    monkeypatch.setattr(OSM, "frozen_identity", lambda self: identity)
    with pytest.warns(UserWarning, match="mode 'coco' is not in the checkpoint: it starts as a copy of the agnostic"):
        build(task, tmp_path)
    for table in ("query", "embedding"):
        rows, old_rows = getattr(task.osm.modes, table), getattr(old.osm.modes, table)
        assert torch.equal(rows, old_rows[[0, 0, 1]])
    assert not torch.equal(old.osm.modes.query[0], old.osm.modes.query[1])
    for name, parameter in old.osm.trained():
        if not name.startswith("modes."):
            assert torch.equal(task.osm.get_parameter(name), parameter), name


# What goes wrong


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    task = tiny_task()
    with pytest.raises(ValueError, match=r"trainer\.max_epochs is -1 .* Set one of them"):
        trainer(tmp_path, max_epochs=-1, max_time="00:00:00:05").fit(task, scenes_data(task))


def test_a_source_without_a_vocabulary_cannot_be_validated(tmp_path: Path) -> None:
    task = build(tiny_task(), tmp_path)
    data = task.trainer.datamodule
    index = data.labels("scenes")
    object.__setattr__(index, "vocabulary", None)
    data.labels = lambda name: index
    with pytest.raises(ValueError, match=r"data\.sources\.scenes has no vocabulary.*set its `val` to null"):
        task.on_validation_epoch_start()


@pytest.mark.parametrize(
    ("part", "setting", "value", "message"),
    [
        ("qformer", "instruction_vocabulary", 10, r"model\.qformer\.instruction_vocabulary is 10, .* has 300 ids"),
        ("language", "tokenizer", "builtin:600", r"the tokenizer has 600 ids.*holds 512.*model\.language\.tokenizer"),
    ],
)
def test_tokenizers_must_fit_the_model(tmp_path: Path, part: str, setting: str, value: object, message: str) -> None:
    task = tiny_task()
    setattr(getattr(task, part), setting, value)
    with pytest.raises(ValueError, match=message):
        build(task, tmp_path)


def drawn(folder: Path, **settings: Any) -> OSMTask:
    """A built task whose random frozen parts are the same every time."""
    task = tiny_task(**settings)
    torch.manual_seed(0)
    return build(task, folder)


def kept_as(task: OSMTask, path: Path) -> dict[str, Any]:
    """Writes a built task's checkpoint, and returns its content."""
    task.config_text = "model: {modes: [scenes]}\n"
    content: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return content


def test_a_new_run_may_begin_without_what_is_named(tmp_path: Path) -> None:
    """The mask side of one model goes on with another LLM, of another width."""
    old = drawn(tmp_path)
    kept_as(old, tmp_path / "old.ckpt")

    def another(allow: list[str]) -> OSMTask:
        task = tiny_task(weights=str(tmp_path / "old.ckpt"), allow=allow)
        task.language.architecture = {**(task.language.architecture or {}), "hidden_size": 32, "head_dim": 8}
        torch.manual_seed(0)
        return build(task, tmp_path)

    changed = {"projection.weight", "projection.bias", "modes.embedding"}
    with pytest.raises(ValueError, match=r"of another model \(3 of another shape: .*named by model\.allow"):
        another([])
    with pytest.raises(ValueError, match="another frozen language part"):
        another(["projection.*", "modes.embedding"])
    with pytest.warns(UserWarning, match=r"another frozen language part .*, which model\.allow lets through"):
        new = another(["language", "projection.*", "modes.embedding"])
    for name, parameter in new.osm.trained():
        assert name in changed or torch.equal(parameter, old.osm.get_parameter(name)), name
    assert {name for name, p in new.osm.trained() if p.shape != old.osm.get_parameter(name).shape} == changed
    assert "3 of another shape" in new.osm.loads[-1].line()


def test_every_load_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = drawn(tmp_path)
    content = kept_as(old, tmp_path / "old.ckpt")
    with caplog.at_level("INFO"):
        task = drawn(tmp_path, weights=str(tmp_path / "old.ckpt"))
        task.on_load_checkpoint(content)
    number = len(list(old.osm.kept()))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("trained parts: ")]
    assert len(said) == 2
    assert all(line.startswith(f"trained parts: {number} tensors (float32, ") for line in said)
