"""Sizes and switches of the model. Defaults are the paper's; everything smaller is a config overlay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class VisionConfig:
    """The frozen vision tower and how a high-resolution image goes through it (Sec. 3.2)."""

    tower: Literal["open_clip", "dinov2", "dinov2_with_registers", "dinov3", "clip", "siglip", "instructblip"] = (
        "open_clip"
    )
    """Library and family of the tower: any ViT of open_clip, or one of transformers' families. "siglip" reads SigLIP
    and SigLIP 2 of a fixed size. docs/towers.md lists them."""
    name: str = "EVA01-g-14"
    """open_clip's model name, or the folder or hub id of one of transformers'."""
    pretrained: str | None = None
    """open_clip's pretrained tag, or a local weight file. None leaves the weights random."""
    architecture: dict[str, Any] | None = None
    """Arguments of the config class that transformers has for the family: random weights of these sizes in place of
    `name`."""
    image_size_px: int = 1120
    """Side of the square input. A multiple of the window size."""
    window_size_px: int = 224
    """Side of a window; the size at which the tower was pre-trained."""
    use_windows: bool = True
    """False feeds the whole image at once, with interpolated positions: the paper's ablation."""
    patch_size_px: int = 14
    """Side of the tower's patches. Checked against the tower."""
    hidden_layer: int | None = None
    """Blocks to run; the output of the last of them is used. None runs all."""
    norm: Literal["final", "plain", "none"] = "final"
    """On the tower's output: its own final LayerNorm, one without learnt weights, or none."""
    position_std: float = 1.0
    """Standard deviation of the learnt global position at the start (released: 1)."""
    dtype: Precision = "float32"
    """Precision of the frozen weights."""
    windows_per_chunk: int = 32
    """Windows that go through the tower together; bounds its memory."""
    allow: list[str] = field(default_factory=list)
    """Tensors of its folder, as patterns with * and ?, that may be missing (they stay random), unknown or of another
    shape; all others that are end the command. open_clip's and InstructBLIP's are loaded whole
    or not at all."""

    @property
    def grid_side(self) -> int:
        """Patches along a side of the image (G)."""
        return self.image_size_px // self.patch_size_px

    @property
    def num_windows(self) -> int:
        """Windows of an image (W), each with a CLS token."""
        return (self.image_size_px // self.window_size_px) ** 2 if self.use_windows else 1

    def check(self) -> None:
        """Checks what must divide what.

        Raises:
            ValueError: a size does not fit another.
        """
        if self.window_size_px % self.patch_size_px:
            raise ValueError(
                f"vision.window_size_px is {self.window_size_px}, but must be a multiple of patch_size_px "
                f"({self.patch_size_px}), so that windows hold whole patches."
            )
        unit = self.window_size_px if self.use_windows else self.patch_size_px
        if self.image_size_px < unit or self.image_size_px % unit:
            raise ValueError(
                f"vision.image_size_px is {self.image_size_px}, but must be a multiple of {unit}, so that the image is "
                f"covered exactly. Use {max(1, round(self.image_size_px / unit)) * unit}."
            )


@dataclass
class LoraConfig:
    """Low-rank adapters beside linear layers: what is trained of an otherwise frozen LLM or Q-Former."""

    rank: int = 8
    """Inner width of the adapters."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers, in every block, that get one. The defaults are those of Llama's family; the
    Q-Former's are query, key, value, output and inner."""
    dropout: float = 0.05
    """Dropout of what an adapter reads, in training."""

    def check(self, setting: str) -> None:
        """Checks what can be checked without the layers.

        Args:
            setting: the config's name for it.

        Raises:
            ValueError: a value means nothing.
        """
        if self.rank < 1:
            raise ValueError(
                f"{setting}.rank is {self.rank}, but must be at least 1. For no adapters set {setting} to null."
            )
        if self.alpha <= 0:
            raise ValueError(f"{setting}.alpha is {self.alpha}, but must be above 0, or adapters would add nothing.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{setting}.dropout is {self.dropout}, but must be at least 0 and below 1.")
        if not self.targets:
            raise ValueError(f"{setting}.targets is empty. Name linear layers, or set {setting} to null.")


@dataclass
class QFormerConfig:
    """MaskQ-Former (Sec. 3.3). The defaults are InstructBLIP's Q-Former with mask and mode queries added."""

    num_layers: int = 12
    """Layers."""
    width: int = 768
    """Hidden width (D)."""
    num_heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Inner width of the feed-forward parts."""
    num_queries: int = 32
    """Mask queries, and as many context queries (Q)."""
    cross_attention_every: int = 2
    """Every n-th layer, from the first, looks at the image."""
    context: float | Literal["global", "none"] = 0.5
    """What context queries see: the mask's box enlarged by this share of its size on each side, the whole image, or no
    context queries at all."""
    mask_rule: Literal["touched", "share", "nearest"] = "touched"
    """What a patch weighs that the mask covers in part: as much as any other, or its covered share. "nearest" sees a
    patch if its first pixel is in the mask, or in the context box (released code): small masks may see none."""
    mode_query: bool = True
    """False leaves out the mode, in the Q-Former and in the LLM's input."""
    instruction_tokenizer: str | None = None
    """Tokenizer of the instruction that the Q-Former reads: folder, hub id or `builtin:SIZE`. None: it reads none."""
    instruction_vocabulary: int = 30523
    """Rows of the instruction's embedding. Checked against the tokenizer."""
    max_instruction_tokens: int = 512
    """Positions of the instruction's embedding."""
    dropout: float = 0.1
    """Dropout after embeddings, attention and feed-forward parts, and of attention weights."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    lora: LoraConfig | None = None
    """Adapters in its layers, trained in their place; queries are trained as ever. None: all of it is trained."""

    @property
    def has_context(self) -> bool:
        """Whether there are context queries."""
        return self.context != "none"

    def check(self) -> None:
        """Checks what must divide what.

        Raises:
            ValueError: a size does not fit another, or a value means nothing.
        """
        if self.lora is not None:
            self.lora.check("model.qformer.lora")
        for name in ("num_layers", "num_queries", "cross_attention_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"qformer.{name} is {getattr(self, name)}, but must be at least 1.")
        if self.width % self.num_heads:
            raise ValueError(f"qformer.width is {self.width}, but must be a multiple of num_heads ({self.num_heads}).")
        if self.context not in {"global", "none"} and not (isinstance(self.context, float | int) and self.context >= 0):
            raise ValueError(
                f"qformer.context is {self.context!r}; give a share of at least 0 (0.5 in the paper), 'global' for the "
                "whole image, or 'none' for no context queries."
            )


@dataclass
class LanguageConfig:
    """The frozen LLM: any decoder-only causal LM of transformers (Sec. 3.1)."""

    name: str = "weights/vicuna-7b-v1.1"
    """Folder or hub id; an InstructBLIP's gives its LLM."""
    tokenizer: str | None = None
    """Folder, hub id or `builtin:SIZE`; None takes the LLM's own."""
    architecture: dict[str, Any] | None = None
    """Arguments of transformers' LlamaConfig: random weights of these sizes in place of `name`."""
    chat_template: bool = False
    """Write question and answer as turns of the tokenizer's chat template: [mask tokens, mode, user's turn, assistant's
    turn]. The paper and the released code don't."""
    dtype: Precision = "bfloat16"
    """Precision of the frozen weights."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Hold the weights of its blocks in 8 or 4 bits by bitsandbytes; they are computed with in `dtype`."""
    length_groups: int = 1
    """Groups of like length that the texts of a training batch go through the LLM in, one after the other. More waste
    less on padding: a sixth of the LLM's work on a CPU. A GPU is better served by one."""
    recompute_activations: bool = False
    """Keep no activations of the LLM's blocks between forward and backward, but compute them again: less memory, for
    up to half as much work of the LLM again."""
    allow: list[str] = field(default_factory=list)
    """Tensors of its folder, as patterns with * and ?, that may be missing (they stay random), unknown or of another
    shape; all others that are end the command."""
    lora: LoraConfig | None = None
    """Adapters in its blocks, which are then trained beside the mask side. None: it stays as it is."""
