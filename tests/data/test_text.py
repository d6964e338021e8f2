import hashlib
import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from osm_lightning.data.text import TextCodec, builtin_tokenizer, load_tokenizer
from osm_lightning.instructions import BOX_QUESTIONS, MASK_QUESTIONS, TEST_QUESTION, prompt

LANGUAGE = Path(__file__).parents[2] / "weights" / "mini" / "language"
WEIRD = [
    "stop sign",
    "",
    " ",
    "  two\tspaces \n",
    "piñata",
    "漢字と仮名",
    "🦜🏳️‍🌈",
    "e\u0301 ≠ é",
    "a\x00b",
    "n't , .",
    "\ufeff\u200f",
]


def save_word_tokenizer(folder, template=None, **special):
    """Saves a tokenizer of whole words; `template` is a post-processor such as `<s> $A`."""
    texts = prompt(TEST_QUESTION) + " cat"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "[CLS]": 3, "[SEP]": 4}
    for word in pre_tokenizers.Whitespace().pre_tokenize_str(texts):
        vocabulary.setdefault(word[0], len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        used = [(piece, vocabulary[piece]) for piece in template.split() if piece in vocabulary]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("text", WEIRD)
def test_the_builtin_tokenizer_writes_every_text(text):
    tokenizer = builtin_tokenizer(300)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("size", "sha256"),
    [
        (300, "3c3e39ed4a95aed48d5c8e86eef218d0cc6b956fd13c180aeec20bb589644a29"),
        (512, "3283843e7d5891bf3dfb006bcbf4a21849ad2ee1192fb6793a45369deb430596"),
    ],
)
def test_the_builtin_tokenizer_is_the_same_on_every_machine(size, sha256):
    # Trained weights hang on these ids: whoever changes the names, the questions or the training sees it here.
    tokenizer = builtin_tokenizer(size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = json.dumps([model["vocab"], model["merges"]], sort_keys=True)
    assert len(tokenizer) == size
    assert hashlib.sha256(content.encode()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("name", "reason"), [("builtin:100", "too small"), ("builtin:", "number"), ("builtin:x", "number")]
)
def test_a_builtin_size_that_makes_no_sense(name, reason):
    with pytest.raises(ValueError, match=rf"tokenizer '?{name}.*{reason}"):
        load_tokenizer(name)


@pytest.mark.parametrize("folder", ["./nowhere", "/nowhere/at/all", "weights/nowhere"])
def test_a_folder_that_is_missing_is_not_looked_up_in_the_hub(folder):
    with pytest.raises(ValueError, match=f"tokenizer '{folder}'.*no such folder"):
        TextCodec(folder)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}'"):
        TextCodec(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no EOS token"):
        TextCodec(save_word_tokenizer(tmp_path))


@pytest.mark.parametrize("name", ["builtin:300", "builtin:512", "words"])
def test_the_prompt_is_the_same_in_training_and_at_test(tmp_path, name):
    codec = TextCodec(name if name != "words" else save_word_tokenizer(tmp_path, eos_token="</s>"))
    for question in (*MASK_QUESTIONS, *BOX_QUESTIONS):
        asked = codec.encode(question, None)
        taught = codec.encode(question, "Stop Sign ")
        assert len(asked.text_ids) == asked.prompt_tokens == taught.prompt_tokens
        assert taught.text_ids[: taught.prompt_tokens] == asked.text_ids
        assert taught.text_ids[-1] == codec.eos_ids[0]
        assert codec.eos_ids[0] not in taught.text_ids[:-1]


def test_an_answer_is_lower_case_and_its_name_comes_back():
    codec = TextCodec("builtin:300")
    text = codec.encode(TEST_QUESTION, " Traffic Light ")
    assert codec.decode(text.text_ids[: text.prompt_tokens]) == prompt(TEST_QUESTION)
    assert codec.decode(text.text_ids[text.prompt_tokens :]) == " traffic light"
    assert codec.encode(TEST_QUESTION, "traffic light") == text


@pytest.mark.parametrize("name", WEIRD)
def test_any_free_text_can_be_an_answer(name):
    codec = TextCodec("builtin:300")
    text = codec.encode(TEST_QUESTION, name)
    assert codec.decode(text.text_ids[text.prompt_tokens :]) == " " + name.strip().lower()


def test_special_tokens_in_a_name_are_only_letters():
    codec = TextCodec("builtin:300")
    text = codec.encode(TEST_QUESTION, "a <eos> sign <pad>")
    assert text.text_ids.count(codec.eos_ids[0]) == 1
    assert codec.decode(text.text_ids[text.prompt_tokens :]) == " a <eos> sign <pad>"


def test_where_a_merge_would_span_prompt_and_answer_the_prompt_wins(tmp_path):
    # Letters, and ": " as one piece: tokenised together, the prompt's last id would differ from the one at test.
    letters = sorted(set(prompt(TEST_QUESTION) + " cat"))
    vocabulary = {piece: i for i, piece in enumerate(["</s>", *letters, ": "])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", " ")]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    codec = TextCodec(str(tmp_path))
    assert vocabulary[": "] in load_tokenizer(str(tmp_path))("Assistant: cat")["input_ids"]
    asked, taught = codec.encode(TEST_QUESTION, None), codec.encode(TEST_QUESTION, "cat")
    assert taught.text_ids[: taught.prompt_tokens] == asked.text_ids
    assert [letters[i - 1] for i in taught.text_ids[taught.prompt_tokens : -1]] == list(" cat")


@pytest.mark.parametrize(
    ("template", "special", "first"),
    [
        (None, {"bos_token": "<s>"}, None),  # has a BOS, but does not put it there
        ("<s> $A", {"bos_token": "<s>"}, 1),
        ("<s> $A", {"bos_token": "</s>"}, 2),  # InstructBLIP's folder names </s>; newer classes put <s>
        ("<s> $A", {}, 1),
        ("$A </s>", {}, None),  # puts EOS only
    ],
)
def test_bos_comes_first_where_the_tokenizer_puts_it(tmp_path, template, special, first):
    folder = save_word_tokenizer(tmp_path, template=template, eos_token="</s>", **special)
    codec = TextCodec(folder)
    bos = () if first is None else (first,)
    words = ["What", "is", "in", "the", "segmentation", "mask", "?", "Assistant", ":"]
    for name, answer in ((None, []), ("cat", ["cat", "</s>"])):
        text = codec.encode(TEST_QUESTION, name)
        assert text.text_ids[: len(bos)] == bos
        assert load_tokenizer(folder).convert_ids_to_tokens(text.text_ids[len(bos) :]) == words + answer
        assert text.prompt_tokens == len(bos) + len(words)


@pytest.mark.parametrize("template", [None, "<s> $A"])
def test_the_prompts_of_an_instructblip_begin_with_its_own_bos_whatever_its_tokenizer_puts_first(tmp_path, template):
    folder = save_word_tokenizer(tmp_path, template, bos_token="</s>", eos_token="</s>")
    (tmp_path / "config.json").write_text('{"model_type": "instructblip"}')
    assert TextCodec(folder).encode(TEST_QUESTION, None).text_ids[0] == 2


def test_the_qformer_reads_the_prompt_with_its_own_tokenizer(tmp_path):
    folder = save_word_tokenizer(tmp_path, template="[CLS] $A [SEP]")
    codec = TextCodec("builtin:300", folder)
    asked, taught = codec.encode(TEST_QUESTION, None), codec.encode(TEST_QUESTION, "cat")
    assert asked.instruction_ids == taught.instruction_ids
    assert (asked.instruction_ids[0], asked.instruction_ids[-1], len(asked.instruction_ids)) == (3, 4, 11)
    assert codec.instruction_vocabulary == len(load_tokenizer(folder))
    assert codec.language_vocabulary == 300


def test_without_an_instruction_tokenizer_there_is_no_instruction():
    codec = TextCodec("builtin:300")
    assert codec.encode(TEST_QUESTION, "cat").instruction_ids == ()
    assert codec.instruction_vocabulary == 0


def test_a_text_is_tokenised_once():
    codec = TextCodec("builtin:300")
    assert codec.encode(TEST_QUESTION, "cat") is codec.encode(TEST_QUESTION, "cat")


def test_a_codec_can_be_sent_to_a_spawned_worker():
    codec = TextCodec("builtin:300", "builtin:512")
    sent = pickle.loads(pickle.dumps(codec))
    assert sent.encode(TEST_QUESTION, "cat") == codec.encode(TEST_QUESTION, "cat")


@pytest.mark.skipif(not LANGUAGE.exists(), reason="weights/mini/language is missing: run `osm weights fetch mini`")
def test_the_rules_hold_for_smollm2():
    codec = TextCodec(str(LANGUAGE))
    for question in MASK_QUESTIONS:
        asked, taught = codec.encode(question, None), codec.encode(question, "Stop sign")
        assert taught.text_ids[: taught.prompt_tokens] == asked.text_ids
        assert codec.decode(asked.text_ids) == prompt(question)  # no BOS, no special tokens
        assert codec.decode(taught.text_ids[taught.prompt_tokens : -1]) == " stop sign"
        assert taught.text_ids[-1] == codec.eos_ids[0]
