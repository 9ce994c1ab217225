"""Sealed pages and attention over them, against sums token by token in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kvcache.attention import PageTables, attend
from anybit.kvcache.formats import SEALED_FORMATS, parse_format
from anybit.kvcache.sealed import SealedPages

KV_HEADS, HEADS, HEAD_DIM = 2, 6, 64


@dataclass
class Cache:
    """Sequences of some lengths in scattered pages: all but the last, which is being written, sealed."""

    keys: list[Tensor]  # [tokens, kv_heads, head_dim] of each sequence, as exact pages hold them
    values: list[Tensor]
    exact: ExactPages
    sealed: SealedPages
    own: list[dict[int, int]]  # page -> slot
    pages: list[list[int]]
    first: list[int]

    def tables(self, sequences: list[int], first_own: list[int], own_pages: int) -> PageTables:
        longest = max(len(self.pages[index]) for index in sequences)
        return PageTables(
            torch.tensor([self.pages[index] + [-1] * (longest - len(self.pages[index])) for index in sequences]),
            torch.tensor([self.first[index] for index in sequences]),
            torch.tensor(
                [
                    [self.own[index].get(page, -1) for page in range(start, start + own_pages)]
                    for index, start in zip(sequences, first_own, strict=True)
                ]
            ),
            torch.tensor(first_own),
        )


def filled(name: str, lengths: list[int], seed: int = 0) -> Cache:
    """Every page has a slot too, so that prompts can be asked for at any place."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // 64) for length in lengths]
    slots = iter(torch.randperm(sum(counts), generator=generator).tolist())
    ids = iter(torch.randperm(sum(counts) + len(lengths), generator=generator).tolist())
    exact = ExactPages(*(torch.full((sum(counts), KV_HEADS, 64, HEAD_DIM), torch.nan).bfloat16() for _ in range(2)))
    sealed = SealedPages(parse_format(name), sum(counts) + len(lengths), KV_HEADS, HEAD_DIM)
    cache = Cache([], [], exact, sealed, [], [], [])
    for length, count in zip(lengths, counts, strict=True):
        keys, values = (
            (torch.randn(length, KV_HEADS, HEAD_DIM, generator=generator) * 2 + 1).bfloat16() for _ in range(2)
        )
        own = {page: next(slots) for page in range(count)}
        for page, slot in own.items():
            tokens = slice(64 * page, min(64 * page + 64, length))
            exact.keys[slot, :, : tokens.stop - tokens.start] = keys[tokens].transpose(0, 1)
            exact.values[slot, :, : tokens.stop - tokens.start] = values[tokens].transpose(0, 1)
        full = length // 64
        pages, first = [next(ids) for _ in range(full)], next(ids)
        if full:
            chosen = torch.tensor([own[page] for page in range(full)])
            sealed.seal(torch.tensor(pages), exact.keys[chosen], exact.values[chosen])
            sealed.keep_exactly(torch.tensor([first]), exact.keys[chosen[:1]], exact.values[chosen[:1]])
        for known, new in ((cache.keys, keys), (cache.values, values), (cache.own, own), (cache.pages, pages)):
            known.append(new)
        cache.first.append(first)
    return cache


def expected(cache: Cache, sequence: int, q: Tensor, position: int, settings: AttentionSettings) -> Tensor:
    """One query [heads, head_dim]: float64."""
    sealed_keys, sealed_values = cache.sealed.read(torch.tensor(cache.pages[sequence], dtype=torch.int64))
    rows = []
    for exact_rows, sealed_rows in ((cache.keys, sealed_keys), (cache.values, sealed_values)):
        seen = exact_rows[sequence].double().clone()
        for token in range(cache.sealed.exact_tokens, position // 64 * 64):
            seen[token] = sealed_rows[token // 64, :, token % 64].double()
        rows.append(seen[: position + 1])
    start = 0 if settings.window is None else max(0, position + 1 - settings.window)
    out = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
    for head in range(HEADS):
        keys, values = (part[start:, head // (HEADS // KV_HEADS)] for part in rows)
        scores = keys @ q[head].double() * settings.scale
        if settings.softcap is not None:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        out[head] = torch.softmax(scores, 0) @ values
    return out


SETTINGS = [AttentionSettings(0.1), AttentionSettings(0.1, window=100), AttentionSettings(0.2, softcap=5.0)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["qet4", "qet2+2@2", "uniform3", "qet4/qet2"])
def test_decoding_reads_its_own_page_and_the_first_tokens_exactly(name: str, settings: AttentionSettings) -> None:
    lengths = [1, 64, 65, 129, 200, 333]
    cache = filled(name, lengths)
    q = torch.randn(len(lengths), 1, HEADS, HEAD_DIM)
    positions = torch.tensor(lengths)[:, None] - 1
    tables = cache.tables(list(range(len(lengths))), [(length - 1) // 64 for length in lengths], 1)
    got = attend(q, cache.exact, cache.sealed, tables, positions, settings)
    for index, length in enumerate(lengths):
        wanted = expected(cache, index, q[index, 0], length - 1, settings)
        assert torch.allclose(got[index, 0].double(), wanted, atol=1e-4), length


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_prompt_gives_each_token_what_decoding_would(settings: AttentionSettings) -> None:
    cache = filled("qet3", [250, 190], seed=1)
    first, count = [70, 10], 180
    positions = torch.tensor([list(range(start, start + count)) for start in first])
    q = torch.randn(2, count, HEADS, HEAD_DIM)
    together = attend(q, cache.exact, cache.sealed, cache.tables([0, 1], [1, 0], 4), positions, settings)
    for sequence in range(2):
        for index in range(0, count, 7):
            position = int(positions[sequence, index])
            tables = cache.tables([sequence], [position // 64], 1)
            one = q[sequence : sequence + 1, index : index + 1]
            alone = attend(
                one, cache.exact, cache.sealed, tables, positions[sequence : sequence + 1, index : index + 1], settings
            )
            assert torch.equal(alone[0, 0], together[sequence, index]), position
            wanted = expected(cache, sequence, q[sequence, index], position, settings)
            assert torch.allclose(alone[0, 0].double(), wanted, atol=1e-4), position


@pytest.mark.parametrize("name", SEALED_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_records_hold_what_the_codec_decodes(name: str, head_dim: int) -> None:
    sealed = SealedPages(parse_format(name), 5, 3, head_dim)
    rows = torch.randn(2, 3, 64, head_dim)
    sealed.seal(torch.tensor([4, 1]), rows, rows)
    keys, values = sealed.read(torch.tensor([[1], [4]]))
    assert keys.shape == values.shape == (2, 1, 3, 64, head_dim)
    for found in (keys, values):
        assert float((found[:, 0] - rows[[1, 0]]).square().mean()) < 0.35
    assert not bool(sealed.keys[[0, 2, 3]].any())


def test_first_tokens_are_kept_to_the_bit() -> None:
    sealed = SealedPages(parse_format("qet2"), 3, 2, 128)
    rows = torch.randn(1, 2, 64, 128).bfloat16()
    sealed.keep_exactly(torch.tensor([2]), rows, -rows)
    keys, values = sealed.read_exactly(torch.tensor([2]))
    assert torch.equal(keys, rows[:, :, :8].float())
    assert torch.equal(values, -rows[:, :, :8].float())
