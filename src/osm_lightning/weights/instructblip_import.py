"""InstructBLIP, and the authors' checkpoint over it, as a checkpoint of ours that refers to the frozen parts.

Sizes are read from the files. What is trained is renamed and written; vision tower and LLM stay where they are, and
only their identity is noted. Every tensor of every file is accounted for in a report.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from osm_lightning.batch import mode_names
from osm_lightning.data.text import TextCodec
from osm_lightning.datasets import DATASETS
from osm_lightning.instructions import TEST_QUESTION
from osm_lightning.model.config import Precision, QFormerConfig
from osm_lightning.model.instructblip import InstructBlip, open_instructblip
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.load_report import LoadReport, report_table
from osm_lightning.model.modes import Modes
from osm_lightning.model.qformer import MaskQFormer
from osm_lightning.model.vision import VisionEncoder
from osm_lightning.weights.checkpoint import Checkpoint, write_folder
from osm_lightning.weights.export import model_card
from osm_lightning.weights.imported_config import MAX_NEW_TOKENS, Settings, config_text, reference, settings_of
from osm_lightning.weights.qformer_names import match_qformer
from osm_lightning.weights.released import lay_over, read_released

PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True)
class Import:
    """What an import made."""

    checkpoint: Checkpoint
    reports: tuple[LoadReport, ...]


def import_model(
    instructblip: str,
    out: Path,
    released: Path | None = None,
    *,
    modes: Sequence[str] = tuple(DATASETS),
    dtype: Precision = "float16",
    allow: Sequence[str] = (),
    seed: int = 0,
) -> Import:
    """Makes a checkpoint folder.

    Args:
        instructblip: InstructBLIP's folder or hub id.
        out: the new folder.
        released: the authors' checkpoint; without it training starts from InstructBLIP.
        modes: modes beside the agnostic one; a released checkpoint brings its own.
        dtype: precision of the frozen parts when the model is used; the released code's is float16.
        allow: patterns of names that may be missing, unexpected or of another shape. What is then missing stays as it
            was before: InstructBLIP's, or random.
        seed: of what is random.

    Raises:
        ValueError: a file is missing, broken, of another model, or surprises; nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out} exists. Remove it, or give another --out.")
    theirs = None if released is None else read_released(released)
    folder = open_instructblip(instructblip, "--instructblip")
    settings = settings_of(folder, reference(instructblip), theirs, tuple(modes), dtype)
    _check_tokenizers(settings, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start, frozen, reports = _start(folder, settings)
    if theirs is not None:
        start, report = lay_over(start, mode_names(settings.modes), theirs, str(released))
        reports.append(report)
    _refuse_surprises(reports, allow)
    checkpoint = Checkpoint(start, config_text(settings, seed), frozen)
    card = _card(checkpoint, out, instructblip, released, reports, allow, seed)
    content = {"loads": [report.as_dict() for report in reports], "allowed": list(allow), "seed": seed}
    write_folder(checkpoint, out, card, {"load_report.json": json.dumps(content, indent=1) + "\n"})
    return Import(checkpoint, tuple(reports))


def _check_tokenizers(settings: Settings, folder: InstructBlip) -> None:
    codec = TextCodec(settings.language.name, settings.qformer.instruction_tokenizer)
    for part, ids, rows in (
        ("LLM", codec.language_vocabulary, folder.config.text_config.vocab_size),
        ("Q-Former", codec.instruction_vocabulary, settings.qformer.instruction_vocabulary),
    ):
        if ids > rows:
            raise ValueError(
                f"the {part}'s tokenizer in {folder.path} has {ids} ids, but its embedding {rows} by config.json: they "
                "don't belong together. Download the folder again."
            )


def _start(folder: InstructBlip, settings: Settings) -> tuple[dict[str, Tensor], dict[str, str], list[LoadReport]]:
    """What is trained before a released checkpoint comes, the frozen parts' identities, and a report of each part."""
    vision = VisionEncoder(replace(settings.vision, dtype=_precision(folder, "vision_model.")))
    language = LanguageModel(replace(settings.language, dtype=_precision(folder, "language_model.")))
    modes = Modes(settings.modes, settings.qformer.width, language.width)
    tensors: dict[str, Tensor] = {"vision.position_NE": vision.position_NE.detach()}
    tensors |= {f"modes.{name}": tensor for name, tensor in modes.state_dict().items()}
    parts, reports = _instructblip_parts(folder, settings.qformer, vision.width, language.width)
    frozen = {"vision": vision.identity, "language": language.identity}
    loads = [report for report in (vision.tower.report, language.report) if report is not None]
    return tensors | parts, frozen, [*loads, *reports]


def _instructblip_parts(
    folder: InstructBlip, config: QFormerConfig, vision_width: int, language_width: int
) -> tuple[dict[str, Tensor], list[LoadReport]]:
    """Q-Former, queries and projection: InstructBLIP's own tensors, and random ones for what it lacks."""
    origin = str(folder.path)
    with torch.device("meta"):
        skeleton = MaskQFormer(config, vision_width)
    qformer, qformer_report = match_qformer(folder.part("qformer."), skeleton, origin, "qformer.")
    wanted = {
        "query_tokens": (1, config.num_queries, config.width),
        "language_projection.weight": (language_width, config.width),
        "language_projection.bias": (language_width,),
    }
    source = {name: tensor for name, tensor in folder.tensors.items() if name.startswith(tuple(wanted))}
    strangers = [name for name in folder.strangers() if name not in wanted]
    report = LoadReport.compare("queries, projection", origin, source, wanted, unplaced=strangers)
    tensors = {f"qformer.{name}": tensor for name, tensor in qformer.items()}
    fits = {name: source[name] for name in wanted if name in source and name not in report.reshaped}
    if "query_tokens" in fits:
        # The mask queries start as a copy of InstructBLIP's, which become the context queries (released code).
        tensors["qformer.mask_query_QD"] = tensors["qformer.context_query_QD"] = fits.pop("query_tokens").squeeze(0)
    tensors |= {name.replace("language_projection", "projection"): tensor for name, tensor in fits.items()}
    if qformer_report.surprises or report.surprises:
        fresh = {f"qformer.{name}": tensor for name, tensor in MaskQFormer(config, vision_width).state_dict().items()}
        projection = torch.nn.Linear(config.width, language_width)
        fresh |= {f"projection.{name}": tensor for name, tensor in projection.state_dict().items()}
        tensors = fresh | tensors
    return tensors, [qformer_report, report]


def _precision(folder: InstructBlip, prefix: str) -> Precision:
    """That of the files, so that nothing is converted to be looked at."""
    dtypes = [tensor.dtype for tensor in folder.part(prefix).values() if tensor.is_floating_point()]
    return PRECISIONS.get(dtypes[0], "float32") if dtypes else "float32"


def _refuse_surprises(reports: Sequence[LoadReport], allow: Sequence[str]) -> None:
    """Gathers what no pattern allows.

    Raises:
        ValueError: there is something.
    """
    found = [f"{report.part} of {report.origin}: {said}" for report in reports if (said := report.problems(allow))]
    if found:
        raise ValueError(
            "what was read is not what the model consists of:\n  "
            + "\n  ".join(found)
            + "\nIs the checkpoint of another InstructBLIP? A name that you know about may be let through with --allow "
            "'NAME_PATTERN': it is left out, and what is missing stays as it was before."
        )
    names = [name for report in reports for name in report.surprises]
    for pattern in allow:
        if not any(fnmatchcase(name, pattern) for name in names):
            warnings.warn(f"--allow {pattern!r} names nothing that surprised.", stacklevel=3)


def _card(
    checkpoint: Checkpoint,
    out: Path,
    instructblip: str,
    released: Path | None,
    reports: Sequence[LoadReport],
    allow: Sequence[str],
    seed: int,
) -> str:
    if released is None:
        origin = (
            f"InstructBLIP `{instructblip}` as training starts from it: mask and context queries are\n"
            f"its query tokens, mode tables and global position are random (seed {seed}). Nothing was trained yet."
        )
    else:
        origin = (
            f"The released checkpoint `{released}` over InstructBLIP `{instructblip}`, with the rules that\n"
            "its outputs depend on: nearest-neighbour masks on the grid of patches, CLS columns always visible, the\n"
            f'question "{TEST_QUESTION}", at most {MAX_NEW_TOKENS} new tokens. Training on from here may change them.'
        )
    allowed = f"\nAllowed surprises: {', '.join(f'`{pattern}`' for pattern in allow)}.\n" if allow else ""
    trained_on = "nothing yet" if released is None else "what the authors trained on"
    table = report_table(reports)
    return f"""\
{model_card(checkpoint, out, trained_on)}
## Imported

{origin}

{table}
{allowed}
`load_report.json` names every tensor that was left out.
"""
