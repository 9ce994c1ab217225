"""The text of single tokens, as log probabilities are reported for them."""

import json
import re
from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of every token id; a token may hold only part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; empty for an id that stands for nothing."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of_character:
            return bytes(self._byte_of_character[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        """The token's text; bytes that are no text by themselves in OpenAI's form `bytes:\\xe2\\x80`."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def num_characters(self, token_id: int) -> int:
        """How many characters of the text begin in this token."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token_id))

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """How a byte-level tokenizer writes bytes as characters; empty for any other."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        if all(part.get("type") != "ByteLevel" for part in parts):
            return {}
        # The alphabet keeps printable characters of Latin-1 as they are and puts the rest, in order, behind it.
        alphabet = set(ByteLevel.alphabet())
        shifted = iter(sorted(character for character in alphabet if ord(character) > 0xFF))
        return {chr(byte) if chr(byte) in alphabet else next(shifted): byte for byte in range(256)}
