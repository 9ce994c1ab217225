"""Which full page holds which tokens, so that a later sequence with the same beginning need not compute it again.

A page's content follows from everything before it, so its key is a hash chain: the key of the page before it and its own
tokens. The chain starts at a root that names what else decides the content. Keys are 256-bit hashes: equal keys mean
equal content, and nobody can construct a collision to read another's page.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from anybit.kvcache.spec import PAGE_SIZE


def root_key(checkpoint_hash: str, precision_hash: str, kv_format: str, salt: str) -> bytes:
    """Where the chains of one model, precision, KV format and salt begin: none of them ever shares pages with another."""
    digest = hashlib.sha256()
    for part in (checkpoint_hash, precision_hash, kv_format, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


class PageKeys:
    """The keys of one sequence's full pages, computed as its tokens become known.

    With `has_first` there is one key more, before the others: of the page that keeps the first page's first tokens exactly.
    """

    def __init__(self, root: bytes, has_first: bool = False) -> None:
        self._root = root
        self._has_first = has_first
        self._keys: list[bytes] = []

    def first(self, num_pages: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the first `num_pages` pages of a sequence that begins with `token_ids` (enough of them)."""
        while len(self._keys) < num_pages:
            start = len(self._keys) * PAGE_SIZE
            tokens = array("q", token_ids[start : start + PAGE_SIZE])
            self._keys.append(hashlib.sha256((self._keys[-1] if self._keys else self._root) + tokens).digest())
        keys = self._keys[:num_pages]
        return [hashlib.sha256(b"first" + keys[0]).digest(), *keys] if self._has_first and keys else keys


class PrefixIndex:
    """Finds pages by key. At most one page per key and one key per page."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page_id: int) -> bool:
        return page_id in self._keys

    @property
    def page_ids(self) -> Iterable[int]:
        return self._keys.keys()

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known beginning of a chain."""
        pages = []
        for key in keys:
            page_id = self._pages.get(key)
            if page_id is None:
                break
            pages.append(page_id)
        return pages

    def insert(self, key: bytes, page_id: int) -> None:
        """Make a page findable; without effect when another page with this content already is."""
        if key not in self._pages and page_id not in self._keys:
            self._pages[key] = page_id
            self._keys[page_id] = key

    def discard(self, page_id: int) -> None:
        """Forget what a page holds; unknown pages are ignored."""
        key = self._keys.pop(page_id, None)
        if key is not None:
            del self._pages[key]
