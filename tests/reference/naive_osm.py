"""OSM restated naively from the paper: one image, one mask, one mode, one token at a time.

Written to be read beside the paper (Sec. 3), not to be fast. Nothing is batched, padded, cached or shared; attention is
a softmax over scores with minus infinity where a query may not look. It takes an `OSM` for its weights only. The frozen
parts, the vision tower and the LLM, are black boxes that are given one window and one sequence at a time.
"""

# S image side, px  N image tokens (windows' CLS, then patches)  E vision width  X rows  D Q-Former width  Z LLM width
# V LLM vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from osm_lightning.model.osm import OSM
from osm_lightning.model.qformer import Attention, FeedForward


@dataclass(frozen=True)
class Example:
    """One mask of one image, and what is to be said of it."""

    image_3SS: Tensor
    """uint8[3, S, S]."""
    mask_SS: Tensor
    """bool[S, S]."""
    dataset: int
    mode: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The name's ids, then EOS."""
    instruction_ids: tuple[int, ...]


# --- Sec. 3.2: a high-resolution image through a frozen ViT --------------------------------------------------------


def image_tokens(model: OSM, image_3SS: Tensor) -> Tensor:
    """[N, E]: the CLS token of every window, then every patch of the image row by row, each with its position added."""
    config = model.vision.config
    tower = model.vision.tower
    image_side = config.image_size_px
    window_side = config.window_size_px if config.use_windows else image_side
    patches_per_window = window_side // config.patch_size_px
    patches_per_image = image_side // config.patch_size_px
    mean, std = torch.tensor(tower.mean).view(3, 1, 1), torch.tensor(tower.std).view(3, 1, 1)

    cls_tokens: list[Tensor] = []
    patch_at: dict[tuple[int, int], Tensor] = {}
    for top in range(0, image_side, window_side):
        for left in range(0, image_side, window_side):
            window = image_3SS[:, top : top + window_side, left : left + window_side]
            pixels = (window.float() / 255 - mean) / std
            cls, patches = tower(pixels.to(model.vision.position_NE.dtype).unsqueeze(0))
            cls_tokens.append(tower.final_norm(cls)[0])
            for index, patch in enumerate(tower.final_norm(patches)[0]):
                row = top // config.patch_size_px + index // patches_per_window
                column = left // config.patch_size_px + index % patches_per_window
                patch_at[row, column] = patch
    tokens = list(cls_tokens)
    for row in range(patches_per_image):
        for column in range(patches_per_image):
            tokens.append(patch_at[row, column])
    # Frozen features are handed on in single precision, whatever follows.
    return torch.stack([token.float() + model.vision.position_NE[n] for n, token in enumerate(tokens)])


# --- Sec. 3.3: what a query may look at ----------------------------------------------------------------------------


def context_box(mask_SS: Tensor, context: float | str) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1, both ends included: the mask's box enlarged by a share of its size on each side.

    Ints are cut off and the box is clipped to the image, as released. "global" is the whole image. With "none" there
    are no context queries, and the mode query keeps to the mask's own box.
    """
    side = mask_SS.shape[0]
    if context == "global":
        return 0, 0, side - 1, side - 1
    share = 0.0 if context == "none" else float(context)
    rows = [y for y in range(side) if bool(mask_SS[y].any())]
    columns = [x for x in range(side) if bool(mask_SS[:, x].any())]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return (
        max(0, int(columns[0] - share * width)),
        max(0, int(rows[0] - share * height)),
        min(side - 1, int(columns[-1] + share * width)),
        min(side - 1, int(rows[-1] + share * height)),
    )


def pixels_of_box(side_px: int, box: tuple[int, int, int, int]) -> Tensor:
    """bool[S, S], a box as a picture."""
    x0, y0, x1, y1 = box
    picture = torch.zeros(side_px, side_px, dtype=torch.bool)
    for y in range(y0, y1 + 1):
        for x in range(x0, x1 + 1):
            picture[y, x] = True
    return picture


def token_weights(region_SS: Tensor, num_windows: int, patch_side: int, rule: str = "touched") -> list[float]:
    """What every image token weighs: CLS tokens 1, patches 1 if the region touches them.

    By the rule "share" they weigh what the region covers, by "nearest" 1 if their first pixel is in the region.
    """
    weights = [1.0] * num_windows
    for top in range(0, region_SS.shape[0], patch_side):
        for left in range(0, region_SS.shape[1], patch_side):
            patch = region_SS[top : top + patch_side, left : left + patch_side]
            values = {"share": patch.double().mean(), "nearest": patch[0, 0], "touched": patch.any()}
            weights.append(float(values[rule]))
    return weights


# --- Sec. 3.3: MaskQ-Former ----------------------------------------------------------------------------------------


def linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    return rows @ layer.weight.T + layer.bias


def layer_norm(layer: nn.LayerNorm, rows: Tensor) -> Tensor:
    mean = rows.mean(-1, keepdim=True)
    variance = ((rows - mean) ** 2).mean(-1, keepdim=True)
    return (rows - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def gelu(rows: Tensor) -> Tensor:
    return rows * 0.5 * (1 + torch.erf(rows / sqrt(2)))


def attend(layer: Attention, rows_XD: Tensor, source: Tensor, weights: list[list[float]]) -> Tensor:
    """BERT's attention, residual and norm; `weights[x][n]`: what token n weighs for row x, 0 if unseen."""
    weights_XN = torch.tensor(weights, dtype=rows_XD.dtype)
    query, key, value = linear(layer.query, rows_XD), linear(layer.key, source), linear(layer.value, source)
    head_width = query.shape[1] // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        columns = slice(head * head_width, (head + 1) * head_width)
        scores = query[:, columns] @ key[:, columns].T / sqrt(head_width)
        attention = weights_XN * torch.exp(scores)
        heads.append(attention / attention.sum(dim=1, keepdim=True) @ value[:, columns])
    return layer_norm(layer.norm, linear(layer.output, torch.cat(heads, dim=1)) + rows_XD)


def feed_forward(layer: FeedForward, rows_XD: Tensor) -> Tensor:
    return layer_norm(layer.norm, linear(layer.output, gelu(linear(layer.inner, rows_XD))) + rows_XD)


def mask_tokens(model: OSM, example: Example, image_NE: Tensor) -> Tensor:
    """[Q, Z] or [Q + 1, Z]: the projected mask queries, then the mode's embedding where there are modes."""
    qformer = model.qformer
    config = qformer.config
    side, patch_side = example.mask_SS.shape[0], model.vision.config.patch_size_px
    num_windows = len(image_NE) - (side // patch_side) ** 2
    box = context_box(example.mask_SS, config.context)
    in_mask = token_weights(example.mask_SS, num_windows, patch_side, config.mask_rule)
    context_rule = "nearest" if config.mask_rule == "nearest" else "touched"
    in_context = token_weights(pixels_of_box(side, box), num_windows, patch_side, context_rule)

    queries, sees = [], []
    for query in qformer.mask_query_QD:
        queries.append(query)
        sees.append(in_mask)
    if qformer.context_query_QD is not None:
        for query in qformer.context_query_QD:
            queries.append(query)
            sees.append(in_context)
    if config.mode_query:
        queries.append(model.modes.query[example.mode])
        sees.append(in_context)
    words = []
    if qformer.instruction is not None:
        for place, word in enumerate(example.instruction_ids):
            words.append(qformer.instruction.word.weight[word] + qformer.instruction.position.weight[place])

    rows = layer_norm(qformer.norm, torch.stack(queries + words))
    everyone = [[1.0] * len(rows)] * len(rows)
    for index, layer in enumerate(qformer.layers):
        rows = attend(layer.self_attention, rows, rows, everyone)
        of_queries, of_words = rows[: len(queries)], rows[len(queries) :]
        if index % config.cross_attention_every == 0:
            of_queries = attend(layer.cross_attention, of_queries, image_NE, sees)
        rows = feed_forward(layer.query_ffn, of_queries)
        if words:
            rows = torch.cat([rows, feed_forward(layer.text_ffn, of_words)])
    tokens = [linear(model.projection, row) for row in rows[: config.num_queries]]
    if config.mode_query:
        tokens.append(model.modes.embedding[example.mode])
    return torch.stack(tokens)


# --- Sec. 3.1 and 3.4: the LLM reads mask tokens, mode and text ----------------------------------------------------


def next_token_logits(model: OSM, prefix_XZ: Tensor, ids: Sequence[int]) -> Tensor:
    """[X + len(ids), V]: at every place, what the LLM says of the token after it."""
    table = model.language.llm.get_input_embeddings().weight
    rows = [*prefix_XZ, *(table[token] for token in ids)]
    return model.language.llm(inputs_embeds=torch.stack(rows).unsqueeze(0), use_cache=False).logits[0]


def answer_logits(model: OSM, example: Example, supervise_prompt: bool = False) -> tuple[list[Tensor], list[int]]:
    """The LLM's logits for every token that is to be predicted, each [V], and those tokens."""
    prefix = mask_tokens(model, example, image_tokens(model, example.image_3SS))
    text = [*example.prompt_ids, *example.answer_ids]
    logits = next_token_logits(model, prefix, text)
    first = 1 if supervise_prompt else len(example.prompt_ids)  # released: the first id, a BOS, carries no label
    places = range(first, len(text))
    return [logits[len(prefix) + place - 1] for place in places], [text[place] for place in places]


def loss(
    model: OSM,
    examples: Sequence[Example],
    weight_of_dataset: Sequence[float],
    supervise_prompt: bool = False,
) -> Tensor:
    """Mean over the tokens of each dataset in each of its modes, then the mean of these, weighted by dataset."""
    losses_of: dict[tuple[int, int], list[Tensor]] = {}
    for example in examples:
        for logits, token in zip(*answer_logits(model, example, supervise_prompt), strict=True):
            probability = torch.softmax(logits, dim=0)[token]
            losses_of.setdefault((example.dataset, example.mode), []).append(-torch.log(probability))
    total, weight = torch.zeros(()), 0.0
    for (dataset, _), losses in losses_of.items():
        total = total + weight_of_dataset[dataset] * torch.stack(losses).mean()
        weight += weight_of_dataset[dataset]
    return total / weight


@torch.no_grad()
def greedy_name(
    model: OSM, example: Example, mode: int, eos_ids: Sequence[int], max_new_tokens: int
) -> tuple[list[int], float, float]:
    """The most probable token, again and again until EOS; the whole sequence is read anew for each.

    Returns:
        Ids before EOS, and the log probability of all generated tokens with and without EOS.
    """
    in_mode = Example(**{**vars(example), "mode": mode})
    prefix = mask_tokens(model, in_mode, image_tokens(model, example.image_3SS))
    name: list[int] = []
    logprob = 0.0
    while len(name) < max_new_tokens:
        probabilities = torch.softmax(next_token_logits(model, prefix, [*example.prompt_ids, *name])[-1], dim=0)
        token = int(probabilities.argmax())
        step = float(torch.log(probabilities[token]))
        if token in eos_ids:
            return name, logprob + step, logprob
        name.append(token)
        logprob += step
    return name, logprob, logprob
