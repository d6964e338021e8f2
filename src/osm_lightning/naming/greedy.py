"""Greedy naming: every mask of a batch at once, in one or several modes, with a key-value cache.

Ids, text and probability come out together; no string is tokenised again to find its probability.
"""

# M masks  R rows (masks x modes)  X positions of the LLM  Z LLM width  V LLM vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osm_lightning.batch import Answer, MaskBatch, NamedMask, mode_index
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.osm import OSM, EncodedImages

MAX_NEW_TOKENS = 12
"""The protocol's limit (released code)."""


@dataclass(slots=True)
class Generated:
    """One row's ids as they grow."""

    token_ids: list[int]
    """Generated ids before EOS."""
    logprob: float = 0.0
    """Natural log of the probability of all generated ids, EOS included."""
    logprob_no_eos: float = 0.0
    """The same without EOS."""


@torch.no_grad()
def generate_greedy(
    language: LanguageModel,
    prefix_RXZ: Tensor,
    eos_ids: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    lockstep: Lockstep = ALONE,
) -> list[Generated]:
    """Continues every row with its most probable token until EOS.

    Rows that have ended leave the batch and the cache, since most names are two or three tokens long and a few are
    twelve.

    Args:
        language: the LLM.
        prefix_RXZ: float[R, X, Z], mask tokens, mode and prompt; no padding, all rows are equally long.
        eos_ids: ids that end a row.
        max_new_tokens: ids at most, EOS not counted as one of the name's.
        lockstep: how processes that share the LLM's weights stay together.

    Returns:
        One result per row, in order.
    """
    results = [Generated([]) for _ in range(len(prefix_RXZ))]
    cache = language.new_cache()
    ends = torch.tensor(list(eos_ids), device=prefix_RXZ.device)
    alive_R = torch.arange(len(results), device=prefix_RXZ.device)
    step_RXZ = prefix_RXZ
    for _ in range(max_new_tokens):
        if not lockstep.most(len(alive_R)):
            break
        if not len(alive_R):
            language.step_along()
            continue
        hidden_RZ = language.hidden(step_RXZ, cache)[:, -1]
        logprob_R, id_R = language.logits(hidden_RZ).log_softmax(-1).max(-1)
        going_R = ~torch.isin(id_R, ends)
        for row, token, logprob, going in zip(
            alive_R.tolist(), id_R.tolist(), logprob_R.tolist(), going_R.tolist(), strict=True
        ):
            results[row].logprob += logprob
            if going:
                results[row].token_ids.append(token)
                results[row].logprob_no_eos += logprob
        step_RXZ = language.embed(id_R).unsqueeze(1)
        if not going_R.all():
            kept = going_R.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            alive_R, step_RXZ = alive_R[kept], step_RXZ[kept]
    return results


@torch.no_grad()
def name_masks(
    model: OSM,
    images: EncodedImages,
    batch: MaskBatch,
    modes: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    eos_ids: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    rows_per_chunk: int = 64,
) -> list[NamedMask]:
    """Names every mask of a batch in every mode that is asked for.

    Args:
        model: in `eval`.
        images: what the model's `encode` made of the batch's images.
        batch: masks with one common prompt; answers in it are ignored.
        modes: names of modes.
        decode: from ids to text.
        eos_ids: ids that end a name.
        max_new_tokens: ids per name at most.
        rows_per_chunk: masks that go through the Q-Former and the LLM together; bounds their memory.

    Returns:
        One entry per mask, in order.

    Raises:
        ValueError: an unknown mode, or masks with different prompts.
    """
    answers: list[dict[str, Answer]] = [{} for _ in range(batch.num_masks)]
    chunks = [batch.part(slice(begin, begin + rows_per_chunk)) for begin in range(0, batch.num_masks, rows_per_chunk)]
    # A process with fewer chunks than others goes along with its first mask, of which nothing is kept.
    made_up = [batch.part(slice(0, 1))] * (model.lockstep.most(len(chunks)) - len(chunks))
    for mode in modes:
        index = mode_index(mode, model.modes.names)
        generated: list[Generated] = []
        for number, (chunk, which) in enumerate((*chunks, *made_up)):
            prefix_RXZ = prompt_embeddings(model, images.part(which), chunk.in_mode(index))
            rows_RXZ = prefix_RXZ if number < len(chunks) else prefix_RXZ[:0]
            generated += generate_greedy(model.language, rows_RXZ, eos_ids, max_new_tokens, model.lockstep)
        for answer, result in zip(answers, generated, strict=True):
            answer[mode] = Answer(
                decode(result.token_ids).strip(), tuple(result.token_ids), result.logprob, result.logprob_no_eos
            )
    index_M = batch.image_index_M.tolist()
    return [
        NamedMask(batch.keys[image], mask_id, answer)
        for image, mask_id, answer in zip(index_M, batch.mask_ids, answers, strict=True)
    ]


def prompt_embeddings(model: OSM, images: EncodedImages, batch: MaskBatch) -> Tensor:
    """[M, X, Z], mask tokens, mode and prompt of every mask, in the LLM's precision.

    Raises:
        ValueError: the masks' prompts differ.
    """
    length = int(batch.prompt_tokens_M[0]) if batch.num_masks else 0
    prompt_MT = batch.text_ids_ML[:, :length]
    if not bool((batch.prompt_tokens_M == length).all()) or not bool((prompt_MT == prompt_MT[:1]).all()):
        raise ValueError("masks that are named together must share one prompt; build the batch for evaluation.")
    text_MTZ = model.language.embed(prompt_MT)
    return torch.cat([model.mask_tokens(images, batch).to(text_MTZ.dtype), text_MTZ], dim=1)
