"""Formats by name, and what they cost in memory."""

import pytest

from anybit.kvcache.formats import EXACT_FORMATS, SEALED_FORMATS, KVFormat, parse_format


def share_of_bf16(name: str, num_tokens: int) -> float:
    """Tokens in the same memory, as a multiple of bf16's, at the shape of Llama-3.1-8B."""
    return parse_format("bf16").sequence_bytes(num_tokens, 128) / parse_format(name).sequence_bytes(num_tokens, 128)


def test_capacity_with_metadata_exact_tokens_and_the_open_page() -> None:
    assert share_of_bf16("qet4", 8192) >= 3.7
    assert share_of_bf16("qet2", 8192) >= 6.8
    assert share_of_bf16("qet2", 32768) >= 7.2


@pytest.mark.parametrize("name", SEALED_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_first_tokens_find_room_in_a_page_of_their_own(name: str, head_dim: int) -> None:
    kv_format = parse_format(name)
    assert 4 <= kv_format.exact_tokens(head_dim) <= 16
    assert kv_format.exact_tokens(head_dim) * head_dim * 2 <= min(kv_format.record_bytes(head_dim))
    assert all(size % 16 == 0 for size in kv_format.record_bytes(head_dim))


def test_names() -> None:
    assert parse_format("qet4") == KVFormat("qet4", "qet4")
    assert parse_format("qet4/qet3").name == "qet4/qet3"
    assert parse_format("qet3/qet3").name == "qet3"
    assert [name for name in EXACT_FORMATS if parse_format(name).is_exact] == ["bf16", "float32"]


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("qet5", "'qet5' is not a KV format; there are bf16"),
        ("", "'' is not"),
        ("bf16/qet4", "exact formats are for both"),
    ],
)
def test_what_does_not_exist_is_told_in_one_sentence(name: str, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        parse_format(name)
