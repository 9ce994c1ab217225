"""What a tokenizer puts before every text."""

from itertools import takewhile

from tokenizers import Tokenizer


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that begin every text: a BOS without which some models predict poorly, or nothing."""
    encoded = tokenizer.encode("a")
    added = takewhile(lambda pair: pair[1], zip(encoded.ids, encoded.special_tokens_mask, strict=True))
    return [token_id for token_id, _ in added]
