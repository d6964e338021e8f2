"""MaskQ-Former: queries that meet in self-attention and look at the image through their own mask (Sec. 3.3).

The layers are those of InstructBLIP's Q-Former (a BERT with post-norm), so that its weights fit. What is ours: three
kinds of queries, masked cross-attention, and image keys and values that are made once per image and layer and shared
by all masks of that image. What a query may see is given from outside (`visibility.py`).
"""

# I images  M masks  K most masks of one image  Q queries per set  A all queries of a mask  T instruction ids
# X A + T  N image tokens  D Q-Former width  E vision width  H heads  d width of a head

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osm_lightning.model.config import QFormerConfig
from osm_lightning.model.lora import add_adapters, check_targets


class KeysValues(NamedTuple):
    """Keys and values of the images' tokens for one layer."""

    keys_IHNd: Tensor
    values_IHNd: Tensor


class Slots(NamedTuple):
    """Where each mask stands when the masks of an image are laid side by side."""

    flat_M: Tensor
    """int64[M], image * K + position among the masks of that image."""
    num_images: int
    per_image: int
    """K, the most masks that an image has."""

    @classmethod
    def of(cls, image_index_M: Tensor, num_images: int) -> Slots:
        """Lays masks out by the image that each points at; any order will do."""
        counts_I = torch.bincount(image_index_M, minlength=num_images)
        order_M = torch.argsort(image_index_M, stable=True)
        starts_I = counts_I.cumsum(0) - counts_I
        rank_M = torch.empty_like(order_M)
        rank_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        per_image = int(counts_I.max())
        position_M = rank_M - starts_I[image_index_M]
        return cls(image_index_M * per_image + position_M, num_images, per_image)

    def scatter(self, rows_M: Tensor, fill: float | bool) -> Tensor:
        """[M, A, ...] -> [I, K * A, ...]; places without a mask get `fill`."""
        out = rows_M.new_full((self.num_images * self.per_image, *rows_M.shape[1:]), fill)
        out = out.index_copy(0, self.flat_M, rows_M)
        return out.view(self.num_images, self.per_image * rows_M.shape[1], *rows_M.shape[2:])

    def gather(self, packed: Tensor, num_rows: int) -> Tensor:
        """[I, K * A, ...] -> [M, A, ...]."""
        return packed.reshape(self.num_images * self.per_image, num_rows, *packed.shape[2:])[self.flat_M]


class Attention(nn.Module):
    """Multi-head attention with its own output projection, residual and LayerNorm, as in BERT."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def keys_values(self, source: Tensor) -> KeysValues:
        """Keys and values [.., H, N, d] of [.., N, source width]."""
        return KeysValues(self._heads(self.key(source)), self._heads(self.value(source)))

    def forward(self, hidden: Tensor, source: KeysValues, visible: Tensor | None) -> Tensor:
        """Attends.

        Args:
            hidden: float[B, X, D].
            source: keys and values [B, H, N, d].
            visible: broadcastable to [B, H, X, N]; bool, True where a row may attend, or float, added to the logits.
                None: everywhere.

        Returns:
            float[B, X, D].
        """
        dropout = self.dropout if self.training else 0.0
        query = self._heads(self.query(hidden))
        if visible is not None and visible.dtype != torch.bool:
            # Given a float32 mask for float64 queries, torch's CPU kernel reads it wrongly and says nothing.
            visible = visible.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query, source.keys_IHNd, source.values_IHNd, attn_mask=visible, dropout_p=dropout
        )
        out = self.output(out.transpose(-3, -2).flatten(-2))
        return self.norm(F.dropout(out, self.dropout, self.training) + hidden)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class FeedForward(nn.Module):
    """Two linear layers with GELU, residual and LayerNorm, as in BERT."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.ffn_width)
        self.output = nn.Linear(config.ffn_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """float[.., D] -> float[.., D]."""
        out = self.output(F.gelu(self.inner(hidden)))
        return self.norm(F.dropout(out, self.dropout, self.training) + hidden)


class Layer(nn.Module):
    """Self-attention over queries and instruction, masked cross-attention of the queries, feed-forward of both."""

    def __init__(self, config: QFormerConfig, image_width: int, looks_at_image: bool) -> None:
        super().__init__()
        self.self_attention = Attention(config, config.width)
        self.cross_attention = Attention(config, image_width) if looks_at_image else None
        self.query_ffn = FeedForward(config)
        self.text_ffn = FeedForward(config) if config.instruction_tokenizer else None

    def forward(
        self,
        hidden_MXD: Tensor,
        valid_MX: Tensor | None,
        image: KeysValues | None,
        visible_I1KN: Tensor,
        slots: Slots,
        num_queries: int,
    ) -> Tensor:
        """float[M, X, D] -> float[M, X, D]; `valid_MX` hides the instruction's padding."""
        valid = None if valid_MX is None else valid_MX[:, None, None, :]
        hidden_MXD = self.self_attention(hidden_MXD, self.self_attention.keys_values(hidden_MXD), valid)
        queries, text = hidden_MXD[:, :num_queries], hidden_MXD[:, num_queries:]
        if self.cross_attention is not None and image is not None:
            packed = self.cross_attention(slots.scatter(queries, 0.0), image, visible_I1KN)
            queries = slots.gather(packed, num_queries)
        queries = self.query_ffn(queries)
        if self.text_ffn is None:
            return queries
        return torch.cat([queries, self.text_ffn(text)], dim=1)


class Instruction(nn.Module):
    """Embeds the instruction that the queries meet in self-attention."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.instruction_vocabulary, config.width, padding_idx=0)
        self.position = nn.Embedding(config.max_instruction_tokens, config.width)
        for table in (self.word, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids_MT: Tensor) -> Tensor:
        """int64[M, T] -> float[M, T, D].

        Raises:
            ValueError: the instruction is longer than the position table.
        """
        length, most = ids_MT.shape[1], self.position.num_embeddings
        if length > most:
            raise ValueError(
                f"an instruction has {length} tokens, but qformer.max_instruction_tokens is {most}. Shorten the one or "
                "raise the other."
            )
        return self.word(ids_MT) + self.position(torch.arange(length, device=ids_MT.device))


class MaskQFormer(nn.Module):
    """Mask tokens from image tokens, masks and an instruction."""

    def __init__(self, config: QFormerConfig, image_width: int) -> None:
        """Makes the layers and queries.

        Args:
            config: sizes and switches.
            image_width: E.

        Raises:
            ValueError: sizes don't fit, or adapters are for layers that there are not.
        """
        super().__init__()
        config.check()
        self.config = config
        self.layers = nn.ModuleList(
            Layer(config, image_width, looks_at_image=index % config.cross_attention_every == 0)
            for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.instruction = Instruction(config) if config.instruction_tokenizer else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Released code: the mask queries start as a copy of InstructBLIP's query tokens, which become the context
        # queries. From scratch both are drawn with BERT's deviation.
        context_QD = torch.empty(config.num_queries, config.width)
        nn.init.normal_(context_QD, std=0.02)
        self.mask_query_QD = nn.Parameter(context_QD.clone())
        self.context_query_QD = nn.Parameter(context_QD) if config.has_context else None
        if config.lora is not None:
            check_targets(self.layers, config.lora.targets, "model.qformer.lora")
            for part in (self.layers, self.norm, self.instruction):
                if part is not None:
                    part.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):  # what is drawn after them is the same as without
                for layer in self.layers:
                    add_adapters(layer, config.lora)

    def image_keys_values(self, image_tokens_INE: Tensor) -> list[KeysValues | None]:
        """Keys and values of every layer that looks at the image: once per image, whatever the number of its masks."""
        looks = [cast("Layer", layer).cross_attention for layer in self.layers]
        return [None if look is None else look.keys_values(image_tokens_INE) for look in looks]

    def queries(self, mode_query_MD: Tensor | None, num_masks: int) -> Tensor:
        """float[M, A, D], queries in the order mask, context, mode."""
        parts = [self.mask_query_QD.expand(num_masks, -1, -1)]
        if self.context_query_QD is not None:
            parts.append(self.context_query_QD.expand(num_masks, -1, -1))
        if mode_query_MD is not None:
            parts.append(mode_query_MD.unsqueeze(1))
        return torch.cat(parts, dim=1)

    def forward(
        self,
        mode_query_MD: Tensor | None,
        images: Sequence[KeysValues | None],
        image_index_M: Tensor,
        visible_MAN: Tensor,
        instruction_ids_MT: Tensor,
        instruction_tokens_M: Tensor,
    ) -> Tensor:
        """Runs its own queries and the modes' through all layers; see `attend`.

        The queries are made in here, since engines that share weights out gather a module's own for its forward only.
        """
        queries_MAD = self.queries(mode_query_MD, len(image_index_M))
        return self.attend(queries_MAD, images, image_index_M, visible_MAN, instruction_ids_MT, instruction_tokens_M)

    def attend(
        self,
        queries_MAD: Tensor,
        images: Sequence[KeysValues | None],
        image_index_M: Tensor,
        visible_MAN: Tensor,
        instruction_ids_MT: Tensor,
        instruction_tokens_M: Tensor,
    ) -> Tensor:
        """Runs queries through all layers.

        Args:
            queries_MAD: float[M, A, D].
            images: what `image_keys_values` made, one entry per layer.
            image_index_M: int64[M], the image of each mask.
            visible_MAN: bool or float[M, A, N], which image tokens each query may attend to, or what is added to its
                logits; no row may be empty.
            instruction_ids_MT: int64[M, T]; ignored where the config has no instruction.
            instruction_tokens_M: int64[M], ids of each instruction that are not padding.

        Returns:
            float[M, A, D], the queries after the last layer.
        """
        num_queries = queries_MAD.shape[1]
        first = next(image for image in images if image is not None)
        slots = Slots.of(image_index_M, first.keys_IHNd.shape[0])
        everything = visible_MAN.dtype == torch.bool  # as a bool True, as a logarithm of a weight 0
        visible_I1KN = slots.scatter(visible_MAN, everything).unsqueeze(1)
        hidden_MXD, valid_MX = queries_MAD, None
        if self.instruction is not None:
            text_MTD = self.instruction(instruction_ids_MT)
            positions = torch.arange(text_MTD.shape[1], device=text_MTD.device)
            valid_MT = positions < instruction_tokens_M[:, None]
            valid_MX = torch.cat([valid_MT.new_ones(len(valid_MT), num_queries), valid_MT], dim=1)
            hidden_MXD = torch.cat([queries_MAD, text_MTD], dim=1)
        hidden_MXD = F.dropout(self.norm(hidden_MXD), self.config.dropout, self.training)
        for layer, image in zip(self.layers, images, strict=True):
            hidden_MXD = layer(hidden_MXD, valid_MX, image, visible_I1KN, slots, num_queries)
        return hidden_MXD[:, :num_queries]
