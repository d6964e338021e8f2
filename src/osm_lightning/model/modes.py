"""The mode: a learnt vector per vocabulary and a shared one for none, on both sides of the projection (Sec. 3.4)."""

# M masks  D Q-Former width  Z LLM width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from osm_lightning.batch import mode_names


class Modes(nn.Module):
    """Two tables over the same modes: queries for the Q-Former, and embeddings for the LLM's input."""

    def __init__(self, names: Sequence[str], qformer_width: int, language_width: int) -> None:
        """Makes the tables.

        Args:
            names: modes of the vocabularies; the agnostic one stands before them by itself.
            qformer_width: D.
            language_width: Z.
        """
        super().__init__()
        self.names = mode_names(names)
        self.query = nn.Parameter(torch.empty(len(self.names), qformer_width))
        self.embedding = nn.Parameter(torch.empty(len(self.names), language_width))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.embedding, std=0.02)

    def forward(self, mode_M: Tensor) -> tuple[Tensor, Tensor]:
        """From int64[M] to the Q-Former's queries float[M, D] and the LLM's embeddings float[M, Z]."""
        return self.query[mode_M], self.embedding[mode_M]
