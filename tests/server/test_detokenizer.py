"""Text of token ids: whole characters only, stop strings wherever tokens end."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from anybit.server.detokenizer import Detokenizer, IncrementalDecoder, StopStringFilter
from anybit.server.tokenizer import PromptTokenizer
from tests.server.tiny_checkpoint import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one visible emoji, three code points and two joiners

some_ids = st.lists(st.integers(0, 511), max_size=40)
some_text = st.text(alphabet=st.sampled_from("ab é漢😀\n�"), max_size=30)


def byte_fallback_tokenizer() -> Tokenizer:
    """Like SentencePiece: a word's space is part of its token, unknown characters are single bytes."""
    pieces = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FALLBACK = byte_fallback_tokenizer()


def decoder_of(tokenizer: Tokenizer, prompt: tuple[int, ...] = ()) -> IncrementalDecoder:
    return PromptTokenizer(tokenizer, {}, frozenset()).decoder(list(prompt))


def detokenizer_of(stop: tuple[str, ...]) -> Detokenizer:
    return Detokenizer(decoder_of(TOKENIZER), stop)


def decode_in_steps(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    decoder = decoder_of(tokenizer, prompt)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def test_emoji_split_across_tokens_appears_whole():
    ids = TOKENIZER.encode("a😀b", add_special_tokens=False).ids
    assert len(ids) == 6  # one token per byte of the emoji
    assert decode_in_steps(TOKENIZER, ids) == ["a", "", "", "", "😀", "b", ""]


def test_emoji_of_several_code_points_never_shows_a_broken_one():
    ids = TOKENIZER.encode(FAMILY, add_special_tokens=False).ids
    pieces = decode_in_steps(TOKENIZER, ids)
    assert "".join(pieces) == FAMILY
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_at_the_end_becomes_a_replacement():
    ids = TOKENIZER.encode("a😀", add_special_tokens=False).ids
    assert "".join(decode_in_steps(TOKENIZER, ids[:-1])) == "a\ufffd"


def test_bytes_that_are_no_text_do_not_pile_up():
    broken = TOKENIZER.token_to_id("ÿ")  # the byte FF
    decoder = decoder_of(TOKENIZER)
    shown = "".join(decoder.push(broken) for _ in range(2000))
    assert len(shown) >= 1980
    assert len(shown + decoder.flush()) == 2000


def test_special_tokens_are_not_shown():
    ids = [2, *TOKENIZER.encode("hello", add_special_tokens=False).ids, 1, 3]
    assert "".join(decode_in_steps(TOKENIZER, ids)) == "hello"


def test_long_runs_of_special_tokens_do_not_pile_up():
    decoder = decoder_of(TOKENIZER)
    assert "".join(decoder.push(3) for _ in range(1000)) == ""
    assert len(decoder._pending) < 20
    assert decoder.push(TOKENIZER.token_to_id("a")) + decoder.flush() == "a"


def test_continuation_keeps_the_space_between_prompt_and_answer():
    prompt = FALLBACK.encode("ab").ids
    answer = FALLBACK.encode("ab").ids  # "▁ab"
    assert "".join(decode_in_steps(FALLBACK, answer, tuple(prompt))) == " ab"
    assert "".join(decode_in_steps(FALLBACK, answer)) == "ab"


def test_space_is_kept_behind_a_prompt_of_single_bytes():
    prompt = FALLBACK.encode("漢" * 5).ids
    assert "".join(decode_in_steps(FALLBACK, FALLBACK.encode("b").ids, tuple(prompt))) == " b"


def test_prompt_that_ends_inside_a_character_leaves_the_answer_alone():
    prompt = TOKENIZER.encode("a😀").ids[:-1]
    assert "".join(decode_in_steps(TOKENIZER, TOKENIZER.encode("bc").ids, tuple(prompt))) == "bc"


def test_broken_bytes_after_whole_ones_do_not_disturb_byte_fallback():
    def byte(value: int) -> int:
        return FALLBACK.token_to_id(f"<0x{value:02X}>")

    ids = [*map(byte, "你".encode()), byte(0xFF), FALLBACK.token_to_id("a")]
    assert decode_in_steps(FALLBACK, ids)[2] == "你"
    assert "".join(decode_in_steps(FALLBACK, ids)) == "你\ufffda"


def test_replacement_characters_that_are_meant_appear_at_once():
    text = "a" + "\ufffd" * 6 + "é"
    pieces = decode_in_steps(FALLBACK, FALLBACK.encode(text).ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


@settings(max_examples=150, deadline=None)
@given(some_ids)
def test_steps_give_the_text_of_the_whole(ids):
    assert "".join(decode_in_steps(TOKENIZER, ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(some_text, some_text)
def test_steps_give_the_text_behind_a_prompt(prompt, answer):
    prompt_ids = TOKENIZER.encode(prompt).ids
    answer_ids = TOKENIZER.encode(answer).ids
    assert "".join(decode_in_steps(TOKENIZER, answer_ids, tuple(prompt_ids))) == answer


@settings(max_examples=150, deadline=None)
@given(some_text)
def test_steps_give_the_text_with_byte_fallback(text):
    ids = FALLBACK.encode(text).ids
    assert "".join(decode_in_steps(FALLBACK, ids)) == FALLBACK.decode(ids)


@settings(max_examples=150, deadline=None)
@given(some_ids, st.lists(st.text("abeho \ufffd", min_size=1, max_size=4), max_size=3), st.data())
def test_streamed_text_equals_whole_text(ids, stop, data):
    whole = detokenizer_of(tuple(stop))
    whole_text = whole.push(ids) + whole.finish()

    streamed = detokenizer_of(tuple(stop))
    pieces, rest = [], ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(streamed.push(rest[:size]))
        rest = rest[size:]
    pieces.append(streamed.finish())

    assert "".join(pieces) == whole_text
    assert (streamed.stopped, streamed.num_tokens) == (whole.stopped, whole.num_tokens)
    assert not any(text in whole_text for text in stop)
    full = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert full.startswith(whole_text)
    assert whole.stopped == any(text in full for text in stop)


def run_filter(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stop_filter = StopStringFilter(stop)
    shown = ""
    for piece in pieces:
        text, found = stop_filter.push(piece)
        shown += text
        if found:
            return shown, True
    return shown + stop_filter.flush(), False


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_how_text_arrives(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run_filter(tuple(stop), pieces) == run_filter(tuple(stop), [text])


def test_text_that_might_begin_a_stop_string_is_held_back():
    stop_filter = StopStringFilter(("END", "NDX"))
    assert stop_filter.push("this is the E") == ("this is the ", False)
    assert stop_filter.push("N") == ("", False)
    assert stop_filter.push("Q") == ("ENQ", False)
    assert stop_filter.push("EN") == ("", False)
    assert stop_filter.push("D and more") == ("", True)


def test_held_text_is_shown_when_nothing_follows():
    stop_filter = StopStringFilter(("END",))
    assert stop_filter.push("fine EN") == ("fine ", False)
    assert stop_filter.flush() == "EN"


def test_stop_string_that_is_complete_first_wins():
    assert run_filter(("abcd", "bc"), ["xabcd"]) == ("xa", True)
    assert run_filter(("abc", "bc"), ["xabcd"]) == ("x", True)


def test_stop_string_across_tokens_ends_the_text_and_the_count():
    ids = TOKENIZER.encode("one two three four five", add_special_tokens=False).ids
    detokenizer = detokenizer_of(("e two t",))
    assert detokenizer.push(ids) + detokenizer.finish() == "on"
    assert detokenizer.stopped
    assert detokenizer.num_tokens < len(ids)


def test_stop_string_inside_a_split_character_run():
    ids = TOKENIZER.encode("go 😀 stop", add_special_tokens=False).ids
    detokenizer = detokenizer_of(("😀",))
    assert detokenizer.push(ids) == "go "
    assert detokenizer.stopped
