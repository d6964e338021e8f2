"""Masks per second of a training step and of naming, with K = 1 and K = 8 masks per image, and where the time goes.

    python benchmarks/bench_model.py                      (make bench)
    python benchmarks/bench_model.py --config configs/model/mini.yaml

All variants are measured in turn in one process, `--rounds` times over, on masks of the shipped scenes; the table shows
medians. ViT, Q-Former and LLM shares are of a training step's forward and backward pass; backward runs through Q-Former
and LLM only. Ratios between rows hold on a noisy machine, absolute figures do not.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import cast

import torch
import yaml
from jsonargparse import ArgumentParser as ConfigParser

from osm_lightning.batch import MaskBatch
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.instructions import TEST_QUESTION
from osm_lightning.model.osm import OSM
from osm_lightning.model.qformer import Layer
from osm_lightning.naming.greedy import name_masks
from osm_lightning.training.loss import group_loss
from osm_lightning.training.task import OSMTask

MASKS = 32
"""Masks of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/model/mid.yaml"), help="model config")
    parser.add_argument("--shards", default="data_shards/scenes", help="shard folder with a train split")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one that is not")
    args = parser.parse_args()
    task = build(args.config)
    model = OSM(task.vision, task.qformer, task.language, ["scenes"])
    batches = {k: batch(task, args.shards, k) for k in (1, 8)}
    data = source(task, args.shards, 1)
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    for k, drawn in batches.items():
        runs[f"train, K = {k}"] = lambda drawn=drawn: train_step(model, drawn)
        runs[f"name,  K = {k}"] = lambda drawn=drawn: naming(model, drawn.to("cpu"), data)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            result = run()
            if number:
                times[name].append(result)
    report(args.config, times, batches)


def report(config: Path, times: dict[str, list[dict[str, float]]], batches: dict[int, MaskBatch]) -> None:
    """Prints the table."""
    print(f"{config}, {MASKS} masks per step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':14}{'images':>8}{'masks/s':>9}{'ViT':>7}{'Q-Former':>10}{'LLM':>7}{'other':>7}")
    rates = {}
    for name, rows in times.items():
        total = median(sum(row.values()) for row in rows)
        rates[name] = MASKS / total
        shares = [median(row[part] for row in rows) / total for part in ("vit", "qformer", "llm")]
        images = batches[int(name.split()[-1])].num_images
        cells = "".join(
            f"{share:>{width}.0%}" for share, width in zip([*shares, 1 - sum(shares)], (7, 10, 7, 7), strict=True)
        )
        print(f"{name:14}{images:8d}{rates[name]:9.2f}{cells}")
    print(f"K = 8 against K = 1: training {rates['train, K = 8'] / rates['train, K = 1']:.2f}x, ", end="")
    print(f"naming {rates['name,  K = 8'] / rates['name,  K = 1']:.2f}x")


def build(config: Path) -> OSMTask:
    """A task of a model config; nothing is loaded yet."""
    parser = ConfigParser()
    parser.add_class_arguments(OSMTask, "model")
    part = {**yaml.safe_load(config.read_text())["model"], "modes": ["scenes"]}
    return parser.instantiate(parser.parse_object({"model": part})).model


def source(task: OSMTask, shards: str, k: int) -> OSMData:
    """Data for a task, from one source."""
    return OSMData(
        {"scenes": SourceConfig(shards, quota=MASKS)},
        task.language.tokenizer or task.language.name,
        task.qformer.instruction_tokenizer,
        modes=["scenes"],
        image_size_px=task.vision.image_size_px,
        patch_size_px=task.vision.patch_size_px,
        context=task.qformer.context,
        masks_per_image=k,
        num_workers=0,
    )


def batch(task: OSMTask, shards: str, k: int) -> MaskBatch:
    """One training batch with up to k masks per image."""
    return next(iter(source(task, shards, k).train_dataloader()))


@contextmanager
def timed(times: dict[str, float], part: str) -> Iterator[None]:
    """Adds the block's seconds to a part."""
    start = time.perf_counter()
    yield
    times[part] = times.get(part, 0.0) + time.perf_counter() - start


@contextmanager
def parts_timed(model: OSM, times: dict[str, float]) -> Iterator[None]:
    """Times tower, Q-Former and LLM within the block, forward and backward."""
    handles = []
    modules = [("vit", model.vision), ("qformer", model.qformer), ("llm", model.language.llm.get_decoder())]
    # The images' keys and values are made outside of the Q-Former's own call, once for all of their masks.
    looks = [cast("Layer", layer).cross_attention for layer in model.qformer.layers]
    modules += [("qformer", module) for look in looks if look is not None for module in (look.key, look.value)]
    for part, module in modules:
        marks: list[float] = []

        def begin(*_: object, marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())

        def end(*_: object, part: str = part, marks: list[float] = marks) -> None:
            times[part] = times.get(part, 0.0) + time.perf_counter() - marks.pop()

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        handles += [module.register_full_backward_pre_hook(begin), module.register_full_backward_hook(end)]
    yield
    for handle in handles:
        handle.remove()


def train_step(model: OSM, drawn: MaskBatch) -> dict[str, float]:
    """Seconds of one forward and backward pass, by part."""
    model.train()
    model.zero_grad()
    times: dict[str, float] = {}
    start = time.perf_counter()
    with parts_timed(model, times):
        group_loss(model(drawn), drawn, torch.ones(1)).total.backward()
    times["other"] = time.perf_counter() - start - sum(times.values())
    return times


def naming(model: OSM, drawn: MaskBatch, data: OSMData) -> dict[str, float]:
    """Seconds of naming all masks in the agnostic mode, by part."""
    model.eval()
    prompt = data.codec.encode(TEST_QUESTION, None)
    same = torch.tensor(prompt.text_ids).expand(drawn.num_masks, -1)
    asked = replace(drawn, text_ids_ML=same, prompt_tokens_M=torch.full((drawn.num_masks,), len(prompt.text_ids)))
    times: dict[str, float] = {}
    start = time.perf_counter()
    with parts_timed(model, times), torch.no_grad():
        # No id ends a name, so that every model names for the full twelve tokens.
        name_masks(model, model.encode(asked.images_I3SS), asked, ["agnostic"], data.codec.decode, eos_ids=[-1])
    times["other"] = time.perf_counter() - start - sum(times.values())
    return times


if __name__ == "__main__":
    main()
