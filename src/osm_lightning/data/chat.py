"""A tokenizer's chat template: how it writes a question as the user's turn, and a name as the assistant's.

What a template says is read off what it writes, so that no family of LLMs is known by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Put before a template. Some (Llama 3, SmolLM3) write the day's date: a prompt would be another one tomorrow."""
NAME = "osmname"
"""Stands for a name while the template is read; a word that no template changes."""


class ChatFormat(NamedTuple):
    """What a template puts around an answer."""

    tokenizer: Any
    lead: str
    """White space between what precedes the assistant's turn and the name."""
    opening: str
    """What else precedes the name and is not in the generation prompt."""
    end_id: int
    """Ends the assistant's turn."""
    reserved_ids: frozenset[int]
    """Ids of the tokens that no name may hold."""

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> ChatFormat:
        """Reads a tokenizer's template.

        Args:
            tokenizer: of transformers.
            name: what messages call it.

        Raises:
            ValueError: it has no template, or one that cannot write a question and its answer.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"model.language.chat_template is on, but the tokenizer {name!r} has no chat template: the LLM is a "
                "base model, or the folder lacks its chat_template.jinja. Set it to false."
            )
        try:
            asked = _write(tokenizer, [_user("?")], add_generation_prompt=True)
            whole = _write(tokenizer, [_user("?"), {"role": "assistant", "content": NAME}])
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(
                f"model.language.chat_template is on, but the template of the tokenizer {name!r} cannot write a "
                f"question and its answer ({type(error).__name__}: {error}). Set it to false."
            ) from error
        before, found, after = whole.rpartition(NAME)
        if not found or not before.startswith(asked):
            raise ValueError(
                f"model.language.chat_template is on, but the template of the tokenizer {name!r} writes an answer "
                f"({whole!r}) that does not begin with what it writes to ask for one ({asked!r}). Set it to false."
            )
        between = before[len(asked) :]
        reserved = frozenset((*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder))
        ends = [int(i) for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in reserved]
        opening = between.rstrip()
        end_id = ends[0] if ends else int(tokenizer.eos_token_id)
        return cls(tokenizer, between[len(opening) :], opening, end_id, reserved)

    def prompt(self, question: str) -> str:
        """The user's turn, and the beginning of the assistant's."""
        return _write(self.tokenizer, [_user(question)], add_generation_prompt=True) + self.opening

    def ids(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are meant."""
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _write(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    # Templates of LLMs that think know `enable_thinking`, the others ignore it: a name needs no thought.
    fixed = {"chat_template": TODAY + str(tokenizer.chat_template), "tokenize": False, "enable_thinking": False}
    return cast("str", tokenizer.apply_chat_template(messages, **fixed, **options))
