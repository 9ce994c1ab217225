"""Token ids to text, one token at a time: no half characters, and no text from a stop string on."""

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most four bytes and a token at least one, so an unfinished one began in the last three tokens.
_UNFINISHED_TOKENS = 3
_MAX_PENDING_TOKENS = 16
_CONTEXT_TOKENS = 8


class IncrementalDecoder:
    """The text that each further token adds.

    A decoder may treat a token by what stands before it (a leading space, bytes of one character), so every token is
    decoded behind the tokens that produced the last text, starting with the end of the prompt. Text depends on the
    sequence of tokens only, not on how they were grouped into events.
    """

    def __init__(self, tokenizer: Tokenizer, special_token_ids: frozenset[int], prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._special_token_ids = special_token_ids
        self._pending: list[int] = []  # tokens without text so far
        self._pending_text = ""  # of the context and these, as last read
        for num_tokens in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _UNFINISHED_TOKENS + 1):
            self._remember(prompt_token_ids[-num_tokens:])
            if not self._context_text.endswith(_REPLACEMENT):
                break  # else the cut may have fallen into a character
        else:
            # The prompt itself ends inside a character, which no answer can make whole.
            self._remember([])

    def push(self, token_id: int) -> str:
        """Text that `token_id` completed; empty while a character is unfinished."""
        if token_id in self._special_token_ids or self._tokenizer.id_to_token(token_id) is None:
            return ""  # without text, also in the middle of a character
        self._pending.append(token_id)
        text, before = self._decode(self._context + self._pending), self._pending_text
        self._pending_text = text
        # Single bytes have a replacement character each until they are whole: fewer than before are one that was meant.
        if not text.endswith(_REPLACEMENT) or len(text) < len(before):
            return self._advance(len(self._pending), text)
        return self._release_broken(text) if len(self._pending) >= _MAX_PENDING_TOKENS else ""

    def flush(self) -> str:
        """The rest when no token follows; an unfinished character becomes a replacement character."""
        return self._advance(len(self._pending), self._decode(self._context + self._pending)) if self._pending else ""

    def _release_broken(self, text: str) -> str:
        # Bytes that are no character and never will be must not pile up. Text before a cut is final when later tokens
        # did not change it, and when its end is whole or too far back to become so.
        for kept in range(_UNFINISHED_TOKENS, 0, -1):
            head = self._decode(self._context + self._pending[:-kept])
            final = text.startswith(head) and (kept == _UNFINISHED_TOKENS or not head.endswith(_REPLACEMENT))
            if final and len(head) > len(self._context_text):
                return self._advance(len(self._pending) - kept, head)
        return self._advance(len(self._pending), text)

    def _advance(self, num_tokens: int, text: str) -> str:
        """Take `num_tokens` from the pending ones, which with the context read as `text`."""
        if text == self._context_text and num_tokens < _MAX_PENDING_TOKENS:
            return ""  # tokens without a text of their own may still shape the next one
        done, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        # Some decoders read a context in another way once more follows; then the tokens speak for themselves.
        known = text.startswith(self._context_text)
        new = text[len(self._context_text) :] if known else self._decode(done)
        self._remember(done)
        self._pending_text = self._decode(self._context + self._pending) if self._pending else ""
        return new

    def _remember(self, context: list[int]) -> None:
        self._context = context
        self._context_text = self._decode(context) if context else ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class StopStringFilter:
    """Lets text through up to the first stop string; holds back what could be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was found behind it."""
        if not self._stop:
            return text, False
        known = len(self._held)
        buffer = self._held + text
        # The string that is complete first decides, so the result does not depend on how the text arrives in pieces.
        found = [(start + len(stop), start) for stop in self._stop if (start := _find(buffer, stop, known)) >= 0]
        if found:
            self._held = ""
            return buffer[: min(found)[1]], True
        cut = min(_held_from(buffer, stop) for stop in self._stop)
        self._held = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _find(buffer: str, stop: str, known: int) -> int:
    # The first `known` characters were searched before.
    return buffer.find(stop, max(0, known - len(stop) + 1))


def _held_from(buffer: str, stop: str) -> int:
    """Where the longest end of `buffer` that `stop` could begin with starts; its length when there is none."""
    start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(buffer[start:]):
            return start
        start = buffer.find(stop[0], start + 1)
    return len(buffer)


class Detokenizer:
    """The visible text of one sequence; the same for streamed and whole answers."""

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._filter = StopStringFilter(stop)
        self.stopped = False  # a stop string was found; what follows is dropped
        self.num_tokens = 0  # tokens taken, up to the one that completed a stop string

    def push(self, token_ids: list[int]) -> str:
        """Text that is safe to show after these tokens."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            pieces.append(self._show(self._decoder.push(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, when the sequence has ended."""
        if self.stopped:
            return ""
        shown = self._show(self._decoder.flush())
        return shown if self.stopped else shown + self._filter.flush()

    def _show(self, text: str) -> str:
        shown, self.stopped = self._filter.push(text)
        return shown
