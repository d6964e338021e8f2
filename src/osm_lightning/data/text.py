"""Text to ids and back: prompts and answers for the LLM, instructions for the Q-Former.

The only place that knows tokenizers. A (question, name) pair is tokenised once and remembered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from osm_lightning.data.chat import ChatFormat
from osm_lightning.instructions import BOX_QUESTIONS, MASK_QUESTIONS, answer, prompt
from osm_lightning.vocabulary import load_vocabulary

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""Files of which every tokenizer has one."""

BUILTIN = "builtin:"
"""Prefix of the tokenizer that needs no file: byte-level BPE over the shipped names and questions."""

BUILTIN_CORPUS = ("coco", "ade20k", "cityscapes")
"""Vocabularies whose names the built-in tokenizer is trained on."""


class Text(NamedTuple):
    """One mask's text as ids."""

    text_ids: tuple[int, ...]
    """Prompt, answer and EOS."""
    prompt_tokens: int
    """How many of them are the prompt."""
    instruction_ids: tuple[int, ...]
    """The Q-Former's reading of the prompt; empty where it takes none."""


class TextCodec:
    """Both tokenizers, and the rules of how text is put together."""

    def __init__(
        self,
        tokenizer: str,
        instruction_tokenizer: str | None = None,
        max_text_tokens: int | None = None,
        chat_template: bool = False,
    ) -> None:
        """Loads the tokenizers.

        Args:
            tokenizer: the LLM's: a folder, a hub id, or `builtin:SIZE`.
            instruction_tokenizer: the Q-Former's, likewise; None where it reads no instruction.
            max_text_tokens: ids that a text and an instruction are cut to, the answer's EOS and end first (released
                behaviour); None cuts nothing.
            chat_template: write question and answer as turns of the tokenizer's chat template; the Q-Former reads the
                plain question all the same.

        Raises:
            ValueError: a tokenizer is missing, has no EOS, or no chat template where one is asked for; or the limit
                leaves nothing of an answer.
        """
        self._settings = (tokenizer, instruction_tokenizer, max_text_tokens, chat_template)
        self._limit = max_text_tokens
        self._language = load_tokenizer(tokenizer)
        self._instruction = None if instruction_tokenizer is None else load_tokenizer(instruction_tokenizer)
        if self._language.eos_token_id is None:
            raise ValueError(f"tokenizer {tokenizer!r} has no EOS token, so that no answer could ever end.")
        self.eos_ids: tuple[int, ...] = (int(self._language.eos_token_id),)
        self._chat = ChatFormat.of(self._language, tokenizer) if chat_template else None
        if self._chat is not None:  # the turn's end is what is learnt; EOS ends an answer as well
            self.eos_ids = tuple(dict.fromkeys((self._chat.end_id, *self.eos_ids)))
        # A tokenizer that puts BOS first by itself belongs to an LLM that was trained with one. Which id that is, its
        # settings say: InstructBLIP's is </s>, where newer classes put Llama's <s>.
        self._bos = self._leading_special_ids()
        if (self._bos or _wants_bos(tokenizer)) and self._language.bos_token_id is not None:
            self._bos = [int(self._language.bos_token_id)]
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        if self._chat is not None:  # whose own words may be more than the limit
            for question in (*MASK_QUESTIONS, *BOX_QUESTIONS):
                self._encode(question, None)

    def __reduce__(self) -> tuple[type[TextCodec], tuple[str, str | None, int | None, bool]]:
        # What is remembered of `encode` cannot be pickled, and workers that are spawned need not have it.
        return TextCodec, self._settings

    @property
    def instruction_vocabulary(self) -> int:
        """Number of ids of the Q-Former's tokenizer; 0 where there is none."""
        return 0 if self._instruction is None else len(self._instruction)

    @property
    def language_vocabulary(self) -> int:
        """Number of ids of the LLM's tokenizer."""
        return len(self._language)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return cast("str", self._language.decode(list(ids), skip_special_tokens=True))

    def _encode(self, question: str, name: str | None) -> Text:
        """Tokenises a question and its answer.

        Args:
            question: one of the templates.
            name: the answer; None where there is none to learn from.

        Raises:
            ValueError: the limit leaves nothing of an answer.
        """
        asked = prompt(question)
        prompt_ids = self._prompt_ids(question)
        ids = list(prompt_ids)
        if name is not None:
            whole, answer_ids = self._with_answer(question, name)
            # Tokenised in one piece where the prompt's ids stay what they are at test time, which holds for all
            # tokenizers that split at white space; otherwise in two.
            kept = whole[: len(prompt_ids)] == prompt_ids
            ids = [*(whole if kept else [*prompt_ids, *answer_ids]), self.eos_ids[0]]
        if self._limit is not None and len(prompt_ids) >= self._limit:
            raise ValueError(
                f"data.max_text_tokens is {self._limit}, but {asked!r} alone has {len(prompt_ids)} ids with this "
                f"tokenizer{' and its chat template' if self._chat else ''}, which leaves nothing of an answer. Raise "
                f"it, or set it to null{', or model.language.chat_template to false' if self._chat else ''}."
            )
        return Text(tuple(ids[: self._limit]), len(prompt_ids), self._instruction_ids(asked))

    def _prompt_ids(self, question: str) -> list[int]:
        """What the LLM is asked: the plain prompt after BOS, or the template's turns, which hold their own."""
        if self._chat is None:
            return [*self._bos, *self._ids(prompt(question))]
        return self._chat.ids(self._chat.prompt(question))

    def _with_answer(self, question: str, name: str) -> tuple[list[int], list[int]]:
        """Ids of prompt and answer in one piece, and of the answer alone, without what ends it."""
        if self._chat is None:
            return [*self._bos, *self._ids(prompt(question) + answer(name))], self._ids(answer(name))
        said = self._chat.lead + answer(name).strip()
        asked = self._chat.prompt(question)
        whole, alone = self._chat.ids(asked + said), self._ids(said)
        # A special token that is spelled in a name would become one beside the template's.
        spelled = len([i for i in whole if i in self._chat.reserved_ids])
        meant = len([i for i in self._chat.ids(asked) if i in self._chat.reserved_ids])
        return (whole if spelled == meant else []), alone

    def _instruction_ids(self, asked: str) -> tuple[int, ...]:
        if self._instruction is None:
            return ()
        limit = {} if self._limit is None else {"truncation": True, "max_length": self._limit}
        return tuple(self._instruction(asked, **limit)["input_ids"])

    def _ids(self, text: str) -> list[int]:
        # Split: "<eos>" in a free-text name is letters, not the end of the answer.
        encoded = self._language(text, add_special_tokens=False, split_special_tokens=True)
        return cast("list[int]", encoded["input_ids"])

    def _leading_special_ids(self) -> list[int]:
        plain = self._ids("a")
        full = cast("list[int]", self._language("a")["input_ids"])
        return full[: len(full) - len(plain)] if len(full) > len(plain) and full[-1] == plain[-1] else []


def load_tokenizer(name: str) -> Any:
    """Loads a tokenizer by folder or hub id, or makes the built-in one.

    Raises:
        ValueError: it is not there, or a built-in size is no number or too small.
    """
    from transformers import AutoTokenizer

    if name.startswith(BUILTIN):
        size = name.removeprefix(BUILTIN)
        if not size.isdecimal():
            raise ValueError(f"tokenizer {name!r}: {BUILTIN!r} must be followed by a number of ids, as in builtin:512.")
        return builtin_tokenizer(int(size))
    if name.startswith((".", "/", "weights/")) and not Path(name).exists():
        raise ValueError(f"tokenizer {name!r}: there is no such folder.")
    if Path(name).is_dir():
        _check_vocabulary(Path(name))
    repository, subfolder = name, ""
    if not Path(name).exists() and name.count("/") > 1:  # a folder within a hub's repository
        owner, repository, subfolder = name.split("/", 2)
        repository = f"{owner}/{repository}"
    try:
        return AutoTokenizer.from_pretrained(repository, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} is neither a folder of a tokenizer nor a hub id ({error}).") from error


def _check_vocabulary(folder: Path) -> None:
    """Refuses a folder whose vocabulary is missing, of which transformers makes an empty one.

    Raises:
        ValueError: it is such a folder.
    """
    if not any(file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
        raise ValueError(
            f"tokenizer '{folder}' has no vocabulary: there is none of {', '.join(VOCABULARY_FILES)} in it. It is no "
            "tokenizer's folder, or an incomplete one: download it again."
        )


def _wants_bos(name: str) -> bool:
    """Whether a folder is an InstructBLIP's, whose prompts begin with BOS, also where a newer class adds none."""
    try:
        config = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
        return bool(config["model_type"] == "instructblip")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache(maxsize=4)
def builtin_tokenizer(size: int) -> Any:
    """Byte-level BPE of a given number of ids, made in about a second from what the package carries.

    For models with random weights and for short instructions: it can write every text, needs no file, and is the same
    on every machine.

    Raises:
        ValueError: the size leaves no room for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 258:
        raise ValueError(
            f"tokenizer builtin:{size} is too small: 256 bytes and 2 special tokens need 258 ids. Use at least 300."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def _corpus() -> Iterator[str]:
    for question in (*MASK_QUESTIONS, *BOX_QUESTIONS):
        yield from [prompt(question)] * 10
    for key in BUILTIN_CORPUS:
        for entry in load_vocabulary(key):
            yield from (answer(name) for name in entry.names)
