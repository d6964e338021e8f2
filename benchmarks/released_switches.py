"""What single switches of configs/overlay/as_released.yaml change on a trained mini model, without training it anew.

    python benchmarks/released_switches.py --ckpt models/mini-coco --shards data_shards/coco_mini [--batches 4]

Names all masks of the val split with masks on the grid as touched and as nearest, and ranks the names by their
probability with and without EOS (area under the ROC curve: how often a right name is ahead of a wrong one). Then takes
the gradients of some training batches: how far apart those with and without the prompt's ids point, how long they are
beside the clipping limit, and how far apart clipping after every batch and clipping once point.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from osm_lightning.batch import MaskBatch
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.model.language import quiet_loading
from osm_lightning.model.osm import OSM, EncodedImages
from osm_lightning.model_settings import settings_of
from osm_lightning.naming.greedy import name_masks
from osm_lightning.training.loss import group_loss
from osm_lightning.training.optim import parameter_groups
from osm_lightning.weights.checkpoint import read_checkpoint

MODES = ("coco", "agnostic")
RULES = ("touched", "nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="exported folder of a model with the mode coco")
    parser.add_argument("--shards", required=True, help="shard folder with train2017 and val2017")
    parser.add_argument("--batches", type=int, default=4, help="training batches that are accumulated")
    args = parser.parse_args()
    quiet_loading()
    torch.manual_seed(0)
    checkpoint = read_checkpoint(args.ckpt)
    settings = settings_of(checkpoint, {})
    model = settings.build(settings.codec(), checkpoint)
    name_all(model.eval(), args.shards)
    compare_gradients(model, args.shards, args.batches)


def data_of(model: OSM, shards: str, rule: str = "touched") -> OSMData:
    """The model's data, with masks on the grid by a rule."""
    vision, qformer, language = model.vision.config, model.qformer.config, model.language.config
    source = SourceConfig(shards, train="train2017", val="val2017", quota=32)
    return OSMData(
        {"coco": source},
        tokenizer=language.tokenizer or language.name,
        instruction_tokenizer=qformer.instruction_tokenizer,
        modes=model.modes.names[1:],
        image_size_px=vision.image_size_px,
        patch_size_px=vision.patch_size_px,
        context=qformer.context,
        mask_rule=rule,  # type: ignore[arg-type]
        masks_per_image=8,
        masks_per_epoch=11_200,
        min_mask_px=16,
        num_workers=0,
    )


# Naming


@torch.no_grad()
def name_all(model: OSM, shards: str) -> None:
    """Prints Acc by rule and mode, and how well names are ranked."""
    data = {rule: data_of(model, shards, rule) for rule in RULES}
    vocabulary = data["touched"].labels("coco").vocabulary
    assert vocabulary is not None
    answers: dict[tuple[str, str], list[tuple[bool, float, float]]] = {}
    changed = dict.fromkeys(MODES, 0)
    unseen = num_masks = 0
    loaders = [data[rule].val_dataloader()[0] for rule in RULES]
    for batches in zip(*loaders, strict=True):
        images = model.encode(batches[0].images_I3SS)
        names = {}
        for rule, batch in zip(RULES, batches, strict=True):
            names[rule] = named(model, images, batch, rule, data[rule])
            for mode in MODES:
                for class_id, mask in zip(batch.class_id_M.tolist(), names[rule], strict=True):
                    given = mask.answers[mode]
                    right = vocabulary.is_right(given.name, class_id)
                    answers.setdefault((rule, mode), []).append((right, given.logprob, given.logprob_no_eos))
        num_masks += batches[0].num_masks
        unseen += int((batches[1].coverage_MGG.flatten(1).amax(1) == 0).sum())
        for mode in MODES:
            pairs = zip(names["touched"], names["nearest"], strict=True)
            changed[mode] += sum(a.answers[mode].name != b.answers[mode].name for a, b in pairs)
    print(f"{num_masks} masks, {unseen} of which no patch's first pixel is in")
    for (rule, mode), rows in answers.items():
        right = [row[0] for row in rows]
        with_eos, without = (roc_auc_score(right, [row[place] for row in rows]) for place in (1, 2))
        print(
            f"{rule:8} {mode:9} right {sum(right)} = {100 * sum(right) / len(right):.2f} %   "
            f"ROC area with EOS {with_eos:.4f}, without {without:.4f}"
        )
    print(f"names that differ between the rules: {changed}")


def named(model: OSM, images: EncodedImages, batch: MaskBatch, rule: str, data: OSMData) -> list[Any]:
    model.qformer.config.mask_rule = rule  # type: ignore[assignment]
    return name_masks(model, images, batch, MODES, data.codec.decode, data.codec.eos_ids)


# Gradients


def compare_gradients(model: OSM, shards: str, num_batches: int) -> None:
    """Prints what prompt labels, clipping and decay do to a step, without dropout."""
    model.qformer.config.mask_rule = "touched"
    data = data_of(model, shards)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(num_batches), strict=False)]
    answer, prompt = ([gradient(model, batch, whole) for batch in batches] for whole in (False, True))
    for label, found in (("answer", answer), ("prompt too", prompt)):
        norms = ", ".join(f"{float(g.norm()):.2f}" for g, _ in found)
        losses = ", ".join(f"{loss:.2f}" for _, loss in found)
        print(f"loss on {label}: {losses}   gradient norms of single batches: {norms}")
    cosines = ", ".join(f"{cosine(a, p):.2f}" for (a, _), (p, _) in zip(answer, prompt, strict=True))
    print(f"cosine of the gradients with and without the prompt: {cosines}")
    for label, found in (("answer", answer), ("prompt too", prompt)):
        once = per_batch = torch.zeros_like(found[0][0])
        for g, _ in found:
            once, per_batch = once + g / num_batches, clipped(per_batch + g / num_batches)
        print(
            f"{num_batches} batches, loss on {label}: norm {float(once.norm()):.2f} before clipping at 1; "
            f"cosine of clipping once and after every batch {cosine(once, per_batch):.4f}"
        )
    sizes = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 1.0)]
    print(f"of {sum(sizes)} trained parameters {100 * sizes[0] / sum(sizes):.1f} % decay; as released all do")


def gradient(model: OSM, batch: MaskBatch, supervise_prompt: bool) -> tuple[Tensor, float]:
    """The whole gradient as one row, and the loss."""
    loss = group_loss(model(batch, supervise_prompt), batch, torch.ones(1)).total
    trained = [parameter for _, parameter in model.trained()]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    rows = [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(trained, found, strict=True)]
    return torch.cat(rows), float(loss)


def clipped(row: Tensor) -> Tensor:
    return row / max(1.0, float(row.norm()))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


if __name__ == "__main__":
    main()
