"""The released OSM restated on transformers' own InstructBLIP: one image, one mask, one mode, one token at a time.

From the method's text and its pixel facts, and by nothing of this project: files in, ids and probabilities out. It
takes a folder of InstructBLIP and the released names of the trained tensors. Every rule on which the outputs depend can
be broken by name (`Rules`), so that whoever compares with it can see that the comparison notices.
"""

# S image side  w window side  p patch side  G patches a side  N image tokens (CLS of every window, then patches)
# Q queries per set  E vision width  D Q-Former width  Z LLM width

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, InstructBlipForConditionalGeneration

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
QUESTION = "What is in the segmentation mask? Assistant:"
BOS = EOS = 2
"""`</s>` is both in InstructBLIP."""


@dataclass(frozen=True)
class Rules:
    """The released rules; any other value is a fault."""

    context: float = 0.5
    mask_on_grid: str = "nearest"
    context_on_grid: str = "nearest"
    cls_is_visible: bool = True
    add_position: bool = True
    swap_modes: bool = False
    bos: int = BOS
    read_instruction: bool = True
    normalise_before_padding: bool = False
    max_new_tokens: int = 12


class NaiveReleased:
    """The released model."""

    def __init__(self, folder: Path, released: dict[str, Tensor], side: int, rules: Rules = Rules()) -> None:
        self.base = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.trained = {name: tensor.float() for name, tensor in released.items()}
        for part in ("qformer", "language_projection"):
            prefix = f"base_model.{part}."
            weights = {name.removeprefix(prefix): t for name, t in self.trained.items() if name.startswith(prefix)}
            getattr(self.base, part).load_state_dict(weights)
        self.side, self.rules = side, rules
        self.window = self.base.config.vision_config.image_size
        self.patch = self.base.config.vision_config.patch_size
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompt_ids = [rules.bos, *tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
        self.instruction_ids = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")(QUESTION)["input_ids"]

    # Pixels -------------------------------------------------------------------------------------------------------

    def scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height on the input."""
        short, long = min(size), max(size)
        if short == long:
            return self.side, self.side
        new_short, new_long = self.side - 1, int((self.side - 1) * long / short)
        if new_long > self.side:
            new_short, new_long = int(self.side * new_short / new_long), self.side
        return (new_short, new_long) if size[0] < size[1] else (new_long, new_short)

    def pixels(self, image: Path) -> Tensor:
        """float[3, S, S], normalised."""
        picture = Image.open(image).convert("RGB")
        picture = picture.resize(self.scaled_size(picture.size), Image.Resampling.BICUBIC)
        seen = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        if self.rules.normalise_before_padding:
            seen = (seen - CLIP_MEAN) / CLIP_STD
        padded = torch.zeros(3, self.side, self.side)
        padded[:, : seen.shape[1], : seen.shape[2]] = seen
        return padded if self.rules.normalise_before_padding else (padded - CLIP_MEAN) / CLIP_STD

    def mask_on_input(self, mask: Path) -> Tensor:
        """bool[S, S]."""
        picture = Image.fromarray((np.array(Image.open(mask)) > 0).astype(np.uint8))
        picture = picture.resize(self.scaled_size(picture.size), Image.Resampling.NEAREST)
        seen = torch.from_numpy(np.array(picture)) > 0
        padded = torch.zeros(self.side, self.side, dtype=torch.bool)
        padded[: seen.shape[0], : seen.shape[1]] = seen
        return padded

    def context_on_input(self, mask_SS: Tensor) -> Tensor:
        """bool[S, S], the enlarged box."""
        ys, xs = torch.where(mask_SS)
        top, bottom, left, right = int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())
        height, width = bottom - top + 1, right - left + 1
        ratio, last = self.rules.context, self.side - 1
        top, bottom = max(0, int(top - ratio * height)), min(last, int(bottom + ratio * height))
        left, right = max(0, int(left - ratio * width)), min(last, int(right + ratio * width))
        box = torch.zeros_like(mask_SS)
        box[top : bottom + 1, left : right + 1] = True
        return box

    def on_grid(self, region_SS: Tensor, how: str) -> Tensor:
        """bool[N], which image tokens a region shows."""
        grid = self.side // self.patch
        if how == "nearest":
            small = torch.nn.functional.interpolate(region_SS[None, None].float(), size=(grid, grid), mode="nearest")
        else:
            small = torch.nn.functional.adaptive_max_pool2d(region_SS[None, None].float(), (grid, grid))
        cls = torch.full(((self.side // self.window) ** 2,), self.rules.cls_is_visible)
        return torch.cat([cls, small.flatten() > 0])

    # The model ----------------------------------------------------------------------------------------------------

    def image_tokens(self, pixels_3SS: Tensor) -> Tensor:
        """float[N, E]."""
        of_window = self.window // self.patch
        grid = self.side // self.patch
        cls, patches = [], torch.zeros(grid, grid, self.base.config.vision_config.hidden_size)
        for row in range(self.side // self.window):
            for column in range(self.side // self.window):
                top, left = row * self.window, column * self.window
                window = pixels_3SS[:, top : top + self.window, left : left + self.window]
                tokens = self.base.vision_model(window.unsqueeze(0)).last_hidden_state[0]
                cls.append(tokens[0])
                y, x = row * of_window, column * of_window
                patches[y : y + of_window, x : x + of_window] = tokens[1:].view(of_window, of_window, -1)
        tokens = torch.cat([torch.stack(cls), patches.view(grid * grid, -1)])
        return tokens + self.trained["window_pos_embed"][0] if self.rules.add_position else tokens

    def llm_input(self, image_NE: Tensor, mask_SS: Tensor, mode: str) -> Tensor:
        """float[Q + 1 + prompt, Z]."""
        if self.rules.swap_modes:
            mode = {"any": "coco", "coco": "any"}[mode]
        queries = torch.cat(
            [self.trained["mask_query"], self.trained["context_query"], self.trained[f"qformer_mode_query.{mode}"]], 1
        )
        in_mask = self.on_grid(mask_SS, self.rules.mask_on_grid)
        in_context = self.on_grid(self.context_on_input(mask_SS), self.rules.context_on_grid)
        num_queries = self.trained["mask_query"].shape[1]
        sees = torch.stack([in_mask] * num_queries + [in_context] * (num_queries + 1))
        ids = torch.tensor([self.instruction_ids])
        everyone = torch.ones(1, queries.shape[1] + ids.shape[1], dtype=torch.long)
        out = self.base.qformer(
            input_ids=ids if self.rules.read_instruction else None,
            attention_mask=everyone if self.rules.read_instruction else everyone[:, : queries.shape[1]],
            query_embeds=queries,
            encoder_hidden_states=image_NE.unsqueeze(0),
            encoder_attention_mask=sees[None, None],
        ).last_hidden_state[:, :num_queries]
        words = self.base.language_model.get_input_embeddings()(torch.tensor([self.prompt_ids]))
        return torch.cat([self.base.language_projection(out), self.trained[f"mode_query.{mode}"], words], 1)[0]

    @torch.no_grad()
    def name(self, image: Path, mask: Path, mode: str) -> tuple[list[int], float]:
        """Ids before EOS, and the log probability of all that was generated, EOS included."""
        embeds = self.llm_input(self.image_tokens(self.pixels(image)), self.mask_on_input(mask), mode)
        ids: list[int] = []
        logprob = 0.0
        for _ in range(self.rules.max_new_tokens):
            logits = self.base.language_model(inputs_embeds=embeds.unsqueeze(0), use_cache=False).logits[0, -1]
            probabilities = torch.softmax(logits.double(), 0)
            token = int(probabilities.argmax())
            logprob += float(torch.log(probabilities[token]))
            if token == EOS:
                break
            ids.append(token)
            embeds = torch.cat([embeds, self.base.language_model.get_input_embeddings()(torch.tensor([token]))])
        return ids, logprob
