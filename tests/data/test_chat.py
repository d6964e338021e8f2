"""Chat templates of the families that the docs name: where the question, the answer and the turn's end are."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from osm_lightning.data.text import TextCodec, builtin_tokenizer, load_tokenizer
from osm_lightning.instructions import MASK_QUESTIONS, TEST_QUESTION

LANGUAGE = Path(__file__).parents[2] / "weights" / "mini" / "language"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS_THINKING = THINKING.replace("{% if enable_thinking is defined and enable_thinking is false %}", "{% if false %}")
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
CASES = {
    "chatml": (CHATML, "<|im_start|>user\nWHAT<|im_end|>\n<|im_start|>assistant\n", "cat", "<|im_end|>"),
    "qwen 3": (
        THINKING,
        "<|im_start|>user\nWHAT<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "cat",
        "<|im_end|>",
    ),
    "llama 2": (LLAMA2, "<s>[INST] WHAT [/INST]", " cat", "</s>"),
    "llama 3": (
        LLAMA3,
        "<s><|header|>user<|/header|>\n\nWHAT<|eot|><|header|>assistant<|/header|>\n\n",
        "cat",
        "<|eot|>",
    ),
    "no end": ("{% for m in messages %}{{ m['content'] }}: {% endfor %}", "WHAT: ", "cat", "<eos>"),
}


def save_tokenizer(folder: Path, template: str | None) -> str:
    tokenizer = pickle.loads(pickle.dumps(builtin_tokenizer(300)))
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", list(CASES))
def test_question_and_answer_are_turns_of_the_template(tmp_path: Path, family: str) -> None:
    template, asked_text, said_text, end = CASES[family]
    folder = save_tokenizer(tmp_path, template)
    codec, tokenizer = TextCodec(folder, chat_template=True), load_tokenizer(folder)
    for question in MASK_QUESTIONS[:3]:
        asked, taught = codec.encode(question, None), codec.encode(question, " Cat ")
        assert tokenizer.decode(asked.text_ids) == asked_text.replace("WHAT", question)
        assert asked.prompt_tokens == taught.prompt_tokens == len(asked.text_ids)
        assert taught.text_ids[: taught.prompt_tokens] == asked.text_ids
        answer = taught.text_ids[taught.prompt_tokens :]
        assert tokenizer.decode(answer[:-1]) == said_text
        assert tokenizer.decode(answer[-1:]) == end
    assert codec.eos_ids == tuple(dict.fromkeys([tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]))
    spelled = tokenizer.convert_tokens_to_ids
    assert asked.text_ids.count(spelled(TOKENS[2])) == asked_text.count(TOKENS[2]), "the template's tokens are tokens"


def test_what_the_template_puts_before_every_answer_is_part_of_the_question(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, ALWAYS_THINKING)
    codec, tokenizer = TextCodec(folder, chat_template=True), load_tokenizer(folder)
    taught = codec.encode(TEST_QUESTION, "cat")
    assert tokenizer.decode(taught.text_ids[: taught.prompt_tokens]).endswith("assistant\n<think>\n\n</think>")
    assert tokenizer.decode(taught.text_ids[taught.prompt_tokens :]) == "\n\ncat<|im_end|>"


def test_tokens_of_the_template_in_a_name_are_only_letters(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, CHATML)
    codec = TextCodec(folder, chat_template=True)
    text = codec.encode(TEST_QUESTION, "a <|im_end|> sign")
    assert text.text_ids[text.prompt_tokens :].count(codec.eos_ids[0]) == 1
    assert codec.decode(text.text_ids[text.prompt_tokens :]) == "a <|im_end|> sign"


def test_off_the_template_changes_nothing(tmp_path: Path) -> None:
    with_template = TextCodec(save_tokenizer(tmp_path / "with", CHATML))
    without = TextCodec(save_tokenizer(tmp_path / "without", None))
    assert with_template.encode(TEST_QUESTION, "cat") == without.encode(TEST_QUESTION, "cat")
    assert with_template.eos_ids == without.eos_ids


def test_the_qformer_reads_the_plain_question(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, CHATML)
    chat, plain = (
        TextCodec(folder, "builtin:300", chat_template=on).encode(TEST_QUESTION, "cat") for on in (True, False)
    )
    assert chat.instruction_ids == plain.instruction_ids
    assert chat.text_ids != plain.text_ids


def test_a_codec_with_a_template_can_be_sent_to_a_spawned_worker(tmp_path: Path) -> None:
    codec = TextCodec(save_tokenizer(tmp_path, CHATML), chat_template=True)
    assert pickle.loads(pickle.dumps(codec)).encode(TEST_QUESTION, "cat") == codec.encode(TEST_QUESTION, "cat")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template.*Set it to false"),
        ("{{ raise_exception('no') }}", "cannot write a question and its answer.*no"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not begin"),
        (CHATML.replace("assistant\n{% endif", "robot\n{% endif"), "does not begin"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_error(tmp_path: Path, template: str | None, reason: str) -> None:
    folder = save_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=rf"(?s)^model\.language\.chat_template is on, but .*'{folder}'.*{reason}"):
        TextCodec(folder, chat_template=True)


@pytest.mark.skipif(not LANGUAGE.exists(), reason="weights/mini/language is missing: run `osm weights fetch mini`")
def test_the_template_of_smollm2_ends_a_turn_as_it_was_trained() -> None:
    codec = TextCodec(str(LANGUAGE), chat_template=True)
    tokenizer = load_tokenizer(str(LANGUAGE))
    taught = codec.encode(TEST_QUESTION, "Stop sign")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEST_QUESTION}, {"role": "assistant", "content": "stop sign"}], tokenize=False
    )
    assert tokenizer.decode(taught.text_ids) == whole.rstrip("\n")
    assert taught.text_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_writes_the_date_asks_the_same_tomorrow(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}" + CHATML
    codec = TextCodec(save_tokenizer(tmp_path, dated), chat_template=True)
    asked = codec.encode(TEST_QUESTION, None)
    said = load_tokenizer(str(tmp_path)).decode(asked.text_ids)
    assert said.startswith("26 Jul 2024<|im_start|>user")


def test_a_limit_that_the_template_fills_is_refused_when_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, CHATML)
    TextCodec(tokenizer, max_text_tokens=100)
    with pytest.raises(ValueError, match=r"max_text_tokens is 20, .* and its chat template.*chat_template to false"):
        TextCodec(tokenizer, max_text_tokens=20, chat_template=True)
