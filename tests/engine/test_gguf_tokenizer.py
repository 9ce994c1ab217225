"""Tokenizers of GGUF files: what the file's own vocabulary says, as Hugging Face's files."""

import json

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.weights.gguf_source import GGUFSource
from anybit.server.tokenizer import load_tokenizer
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_gguf_tokenizer import add_byte_level, add_sentencepiece, sentencepiece_ids
from tests.server.tiny_checkpoint import CHAT_TEMPLATE, byte_level_tokenizer

TEXTS = [
    "The quick brown fox, it's 12345 o'clock!",
    "  two  and   three spaces\n\nand lines\r\n\tend ",
    "naïve café 日本語 🙂 \x07",
    "",
    " ",
]


def converted(directory, add, *arguments, **more):
    """Directory of the tokenizer files that come of a GGUF file."""
    writer = gguf.GGUFWriter(directory / "file.gguf", "llama")
    add(writer, *arguments, **more)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GGUFSource(directory / "file.gguf").write_tokenizer(directory)
    return directory


def tokenizer_in(directory):
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def ids(directory, text):
    return tokenizer_in(directory).encode(text).ids


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    return tokenizer_in(converted(tmp_path_factory.mktemp("llama"), add_sentencepiece))


@pytest.fixture(scope="module")
def unprefixed(tmp_path_factory):
    return tokenizer_in(converted(tmp_path_factory.mktemp("gemma"), add_sentencepiece, add_space_prefix=False))


def test_byte_level_tokenizer_is_the_one_the_file_was_made_from(tmp_path):
    original = byte_level_tokenizer()
    own = tokenizer_in(converted(tmp_path, add_byte_level, original, "gpt-2"))
    for text in [*TEXTS, "<|im_start|>user\nhello<|im_end|>"]:
        assert own.encode(text).ids == original.encode(text).ids
        assert own.decode(own.encode(text).ids, skip_special_tokens=False) == text


LLAMA3 = ["I", "'LL", " pay", " ", "123", "45", "!?", " \n\n", " now"]
SPLIT = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", "!?", " \n\n", " now"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", "!?", " \n\n", " now"],
    "llama-bpe": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", "!?", " \n\n", " now"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", "!?", " \n\n", " now"],
}


@pytest.mark.parametrize(("pre", "pieces"), SPLIT.items(), ids=SPLIT)
def test_text_is_split_the_way_the_file_names(tmp_path, pre, pieces):
    own = tokenizer_in(converted(tmp_path, add_byte_level, byte_level_tokenizer(), pre))
    spans = [span for _, span in own.pre_tokenizer.pre_tokenize_str("I'LL pay 12345!? \n\n now")]
    assert ["I'LL pay 12345!? \n\n now"[start:stop] for start, stop in spans] == pieces


@pytest.mark.parametrize("text", [*TEXTS, "the fox</s>the dog", " the", "qqq", "▁the", "a  \n\n  b"])
def test_sentencepiece_ids_are_those_of_its_definition(prefixed, unprefixed, text):
    assert prefixed.encode(text, add_special_tokens=False).ids == sentencepiece_ids(text, " ")
    assert unprefixed.encode(text, add_special_tokens=False).ids == sentencepiece_ids(text, "")


@settings(max_examples=200, deadline=None)
@given(st.text("the quickbrown \n", max_size=40))
def test_sentencepiece_gives_every_text_back_from_the_ids_of_its_definition(prefixed, unprefixed, text):
    encoded = unprefixed.encode(text, add_special_tokens=False).ids
    assert encoded == sentencepiece_ids(text, "")
    assert unprefixed.decode(encoded) == text
    assert unprefixed.decode(unprefixed.encode(text).ids) == text


@pytest.mark.parametrize("text", ["the fox", " the fox ", "naïve 日本語", "\x07 \t"])
def test_space_that_is_put_first_is_taken_away_again(prefixed, text):
    assert prefixed.decode(prefixed.encode(text).ids) == text


@pytest.mark.parametrize(
    ("more", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": True, "bos_token_id": 2}, 2, None),
        ({"add_bos_token": False, "add_eos_token": True}, None, 2),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
    ],
)
def test_ends_are_added_as_the_file_says(tmp_path, more, first, last):
    directory = converted(tmp_path, add_sentencepiece, **more)
    plain = sentencepiece_ids("the fox", " ")
    assert ids(directory, "the fox") == [*([first] if first else []), *plain, *([last] if last else [])]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (first is not None, last is not None)


@pytest.mark.parametrize(("pre", "added"), [("gpt-2", False), ("llama-bpe", True)])
def test_byte_level_files_add_bos_by_their_splitting_unless_they_say(tmp_path, pre, added):
    original = byte_level_tokenizer()
    bos = original.token_to_id("<|im_start|>")
    directory = converted(tmp_path, add_byte_level, original, pre, bos_token_id=bos)
    assert (ids(directory, "hello")[0] == bos) == added
    (tmp_path / "other").mkdir()
    directory = converted(tmp_path / "other", add_byte_level, original, pre, bos_token_id=bos, add_bos_token=not added)
    assert (ids(directory, "hello")[0] == bos) != added


def test_server_finds_markers_ends_and_template(tmp_path):
    more = {"eos_token_id": 0, "eot_token_id": 3, "tokenizer.chat_template": CHAT_TEMPLATE}
    directory = converted(tmp_path, add_byte_level, byte_level_tokenizer(), "gpt-2", **more)
    tokenizer = load_tokenizer(directory)
    # <|im_end|> (1) is known by its text.
    assert tokenizer.eos_token_ids == {0, 1, 3}
    assert tokenizer.special_tokens == {"eos_token": "<|endoftext|>"}
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_transformers_reads_what_is_written(tmp_path):
    from transformers import AutoTokenizer

    directory = converted(tmp_path, add_sentencepiece)
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert loaded("the fox")["input_ids"] == ids(directory, "the fox")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)


def test_unknown_splitting_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError) as caught:
        converted(tmp_path, add_byte_level, byte_level_tokenizer(), "of-tomorrow")
    assert_one_sentence(caught.value, "'of-tomorrow'")


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError) as caught:
        converted(tmp_path, add_sentencepiece, model="bert")
    assert_one_sentence(caught.value, "'bert'")


@pytest.mark.parametrize(("more", "word"), [({"bos_token_id": 9999}, "9999"), ({"unknown_token_id": 9999}, "unk")])
def test_marker_outside_the_vocabulary_is_told(tmp_path, more, word):
    with pytest.raises(SourceError) as caught:
        converted(tmp_path, add_sentencepiece, **more)
    assert_one_sentence(caught.value, word)


def test_merge_of_unknown_tokens_is_told(tmp_path):
    def add(writer):
        add_byte_level(writer, byte_level_tokenizer(), "gpt-2")
        writer.add_token_merges(["no such"])

    with pytest.raises(SourceError) as caught:
        converted(tmp_path, add)
    assert_one_sentence(caught.value, "tokenizer")
