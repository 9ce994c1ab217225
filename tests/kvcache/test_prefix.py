"""Keys of pages: equal exactly where everything that decides a page's content is equal."""

from hypothesis import given
from hypothesis import strategies as st

from anybit.kvcache.prefix import PageKeys, PrefixIndex, root_key
from anybit.kvcache.spec import PAGE_SIZE

ROOT = root_key("checkpoint", "plan", "bf16", "")
tokens = st.lists(st.integers(0, 3), min_size=3 * PAGE_SIZE, max_size=3 * PAGE_SIZE)


def keys_of(token_ids, root=ROOT):
    return PageKeys(root).first(len(token_ids) // PAGE_SIZE, token_ids)


@given(st.lists(st.text(max_size=4), min_size=4, max_size=4), st.lists(st.text(max_size=4), min_size=4, max_size=4))
def test_roots_are_equal_only_for_equal_parts(some, others):
    assert (root_key(*some) == root_key(*others)) == (some == others)


def test_every_part_of_the_root_tells_chains_apart():
    roots = {
        ROOT,
        root_key("other", "plan", "bf16", ""),
        root_key("checkpoint", "other", "bf16", ""),
        root_key("checkpoint", "plan", "float32", ""),
        root_key("checkpoint", "plan", "bf16", "salt"),
    }
    token_ids = list(range(PAGE_SIZE))
    assert len(roots) == len({keys_of(token_ids, root)[0] for root in roots}) == 5


@given(tokens, st.integers(0, 3 * PAGE_SIZE - 1))
def test_keys_agree_up_to_the_page_of_the_first_difference(token_ids, position):
    changed = list(token_ids)
    changed[position] += 1
    same = [one == other for one, other in zip(keys_of(token_ids), keys_of(changed), strict=True)]
    assert same == [page < position // PAGE_SIZE for page in range(3)]


def test_large_token_ids_are_told_apart():
    assert keys_of([0] * PAGE_SIZE) != keys_of([2**31] * PAGE_SIZE) != keys_of([2**32] * PAGE_SIZE)


def test_keys_do_not_depend_on_when_they_are_asked_for():
    token_ids = list(range(5 * PAGE_SIZE))
    growing = PageKeys(ROOT)
    assert [growing.first(count, token_ids[: count * PAGE_SIZE])[-1:] for count in range(6)][1:] == [
        [key] for key in keys_of(token_ids)
    ]


@given(tokens, tokens)
def test_the_page_of_first_tokens_has_a_key_of_its_own_that_follows_from_the_first_page(token_ids, others):
    keys, plain = PageKeys(ROOT, has_first=True).first(3, token_ids), keys_of(token_ids)
    assert keys[1:] == plain
    assert keys[0] not in plain
    assert PageKeys(ROOT, has_first=True).first(0, token_ids) == []
    same_first = token_ids[:PAGE_SIZE] == others[:PAGE_SIZE]
    assert (PageKeys(ROOT, has_first=True).first(1, others)[0] == keys[0]) == same_first


def test_index_finds_the_longest_known_beginning():
    index = PrefixIndex()
    for number, page in enumerate((7, 3, 9)):
        index.insert(bytes([number]), page)
    assert index.find([b"\0", b"\1", b"\2", b"\3"]) == [7, 3, 9]
    index.discard(3)
    assert index.find([b"\0", b"\1", b"\2"]) == [7]
    assert index.find([b"\5"]) == index.find([]) == []


def test_index_keeps_the_first_of_two_pages_with_one_content():
    index = PrefixIndex()
    index.insert(b"a", 1)
    index.insert(b"a", 2)
    index.insert(b"b", 1)
    assert index.find([b"a"]) == [1]
    assert (2 in index, index.find([b"b"]), len(index)) == (False, [], 1)
    index.discard(2)  # unknown
    index.discard(1)
    assert len(index) == 0
