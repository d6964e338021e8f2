"""What a classifier can do with the same frozen features: the yardstick for naming masks freely.

    python benchmarks/probe.py --shards data_shards/coco_mini --train train2017 --val val2017 \\
        --config configs/model/mini.yaml --ckpt runs/seed0/checkpoints/last.ckpt [more checkpoints]

Logistic regression, nearest neighbour and the majority class on mask-averaged tokens of the config's vision layer, on
the same shards and masks, scored with the same protocol. Regularisation is chosen by cross-validation over training
images. For each checkpoint: agnostic greedy Acc, and its difference to the regression with a paired bootstrap over
images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser as ConfigParser
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from osm_lightning.data.coverage import Masks
from osm_lightning.data.geometry import fit, place_image
from osm_lightning.data.sample import Labels
from osm_lightning.data.stream import ShardSet
from osm_lightning.datasets import ignored_ids
from osm_lightning.model.config import VisionConfig
from osm_lightning.model.vision import VisionEncoder
from osm_lightning.vocabulary import load_vocabulary

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse regularisation strengths that cross-validation chooses from."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shard folder")
    parser.add_argument("--train", default="train2017", help="split to learn from")
    parser.add_argument("--val", default="val2017", help="split to score on")
    parser.add_argument("--config", type=Path, default=Path("configs/model/mini.yaml"), help="model config")
    parser.add_argument("--ckpt", type=Path, nargs="*", default=[], help="checkpoints to compare with")
    args = parser.parse_args()

    encoder = VisionEncoder(vision_config(args.config))
    train = pooled(encoder, ShardSet(args.shards, args.train))
    val = pooled(encoder, ShardSet(args.shards, args.val))
    vocabulary = load_vocabulary(ShardSet(args.shards, args.val).index.vocabulary or "")
    truth = val["class"]

    def right(predicted: NDArray) -> NDArray[np.bool_]:
        names = [vocabulary.by_id[int(class_id)].names[0] for class_id in predicted]
        return np.array([vocabulary.is_right(n, int(c)) for n, c in zip(names, truth, strict=True)])

    majority = np.bincount(train["class"]).argmax()
    neighbour = make_pipeline(StandardScaler(), KNeighborsClassifier(1, metric="cosine"))
    results = {
        "majority": right(np.full_like(truth, majority)),
        "nearest neighbour": right(neighbour.fit(train["x"], train["class"]).predict(val["x"])),
        "linear probe": right(fitted_probe(train).predict(val["x"])),
    }
    for ckpt in args.ckpt:
        results[str(ckpt)] = named_right(ckpt, args.shards, args.val, vocabulary, val["key"])
    num_images = len(set(val["image"].tolist()))
    print(f"{'method':<44}{'Acc':>8}   difference to the probe, 95 % interval (bootstrap over {num_images} images)")
    for name, hits in results.items():
        low, high = bootstrap(hits, results["linear probe"], val["image"])
        difference = hits.mean() - results["linear probe"].mean()
        print(f"{name:<44}{hits.mean():8.4f}   {difference:+.4f} [{low:+.4f}, {high:+.4f}]")
    runs = [results[str(ckpt)] for ckpt in args.ckpt]
    if len(runs) > 1:
        mean = np.mean(runs, axis=0)
        low, high = bootstrap(mean, results["linear probe"], val["image"])
        print(
            f"{'mean of the checkpoints':<44}{mean.mean():8.4f}   "
            f"{mean.mean() - results['linear probe'].mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        )


def vision_config(path: Path) -> VisionConfig:
    """The vision part of a model config."""
    parser = ConfigParser()
    parser.add_argument("--vision", type=VisionConfig)
    import yaml

    part = yaml.safe_load(path.read_text())["model"]["vision"]
    return parser.instantiate(parser.parse_object({"vision": part})).vision


def pooled(encoder: VisionEncoder, shards: ShardSet) -> dict[str, NDArray]:
    """Mask-averaged patch tokens, weighted by the mask's share of every patch: x [masks, E], class, image, key."""
    config = encoder.config
    rows: dict[str, list] = {"x": [], "class": [], "image": [], "key": []}
    labels = Labels(shards.index.dataset, None, ignored_ids(shards.index.dataset))
    for number in range(len(shards)):
        record = shards[number]
        placement = fit(record.width_px, record.height_px, config.image_size_px)
        image = torch.from_numpy(place_image(record.image(), placement)).permute(2, 0, 1).unsqueeze(0)
        tokens = encoder.features(image)[0, config.num_windows :].numpy()
        masks = Masks(record)
        masks.place(placement, config.patch_size_px)
        for index, segment in enumerate(record.segments):
            mask = masks.patches(index)
            if not labels.counts(segment) or mask is None:
                continue
            share = mask.coverage_GG.astype(np.float32).ravel()
            rows["x"].append(share @ tokens / share.sum())
            rows["class"].append(segment.class_id)
            rows["image"].append(number)
            rows["key"].append(f"{record.key}/{segment.id}")
    return {name: np.array(values) for name, values in rows.items()}


def fitted_probe(train: dict[str, NDArray]) -> LogisticRegression:
    """Logistic regression, its regularisation chosen by cross-validation over training images."""
    scores = {}
    for strength in STRENGTHS:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        folds = GroupKFold(5)
        scores[strength] = cross_val_score(probe, train["x"], train["class"], groups=train["image"], cv=folds).mean()
    best = max(scores, key=lambda strength: scores[strength])
    print("cross-validation on training images:", ", ".join(f"C {c:g}: {s:.4f}" for c, s in scores.items()))
    return make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=2000)).fit(train["x"], train["class"])


def named_right(ckpt: Path, shards: Path, split: str, vocabulary, keys: NDArray) -> NDArray[np.bool_]:
    """Which masks a checkpoint names rightly in the agnostic mode, in the order of `keys`."""
    import yaml

    from osm_lightning.data.module import OSMData, SourceConfig
    from osm_lightning.model.osm import OSM
    from osm_lightning.naming.greedy import name_masks
    from osm_lightning.training.task import OSMTask
    from osm_lightning.weights.checkpoint import read_checkpoint
    from osm_lightning.weights.trained import load_trained

    checkpoint = read_checkpoint(ckpt)
    parser = ConfigParser()
    parser.add_class_arguments(OSMTask, "model")
    config = parser.parse_object({"model": yaml.safe_load(checkpoint.config)["model"]}).model
    task = parser.instantiate(parser.parse_object({"model": config})).model
    osm = OSM(task.vision, task.qformer, task.language, task.modes).eval()
    load_trained(osm, checkpoint)
    data = OSMData(
        {"val": SourceConfig(str(shards), val=split)},
        task.language.tokenizer or task.language.name,
        task.qformer.instruction_tokenizer,
        image_size_px=task.vision.image_size_px,
        patch_size_px=task.vision.patch_size_px,
        context=task.qformer.context,
        num_workers=0,
    )
    right = {}
    for batch in data.val_dataloader()[0]:
        images = osm.encode(batch.images_I3SS)
        named = name_masks(osm, images, batch, ["agnostic"], data.codec.decode, data.codec.eos_ids)
        for mask, class_id in zip(named, batch.class_id_M.tolist(), strict=True):
            right[f"{mask.image}/{mask.mask_id}"] = vocabulary.is_right(mask.answers["agnostic"].name, class_id)
    return np.array([right[key] for key in keys])


def bootstrap(a: NDArray, b: NDArray, image: NDArray, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean difference of paired results, images drawn with replacement."""
    rng = np.random.default_rng(0)
    ids = np.unique(image)
    totals = np.array([[(a[image == i] - b[image == i].astype(float)).sum(), (image == i).sum()] for i in ids])
    picks = rng.integers(len(ids), size=(rounds, len(ids)))
    sums = totals[picks].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
