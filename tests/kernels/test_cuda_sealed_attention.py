"""The GPU's attention over sealed pages against the one in PyTorch, which is tested against sums token by token."""

import pytest
import torch

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda.sealed_attention import PairRecords, SealedTables, attend_sealed
from anybit.kvcache.attention import PageTables, attend
from anybit.kvcache.codec.pages import PairCodec
from anybit.kvcache.formats import codec_of, parse_format
from anybit.kvcache.sealed import SealedPages

pytestmark = pytest.mark.gpu

SETTINGS = [AttentionSettings(0.1), AttentionSettings(0.1, window=150), AttentionSettings(0.2, softcap=5.0)]


def levels_of(name: str) -> torch.Tensor:
    codec = codec_of(name, for_keys=True)
    assert isinstance(codec, PairCodec)
    return codec.table.levels.half().cuda()  # type: ignore[attr-defined]


def attended(
    name: str, lengths: list[int], heads: int, kv_heads: int, head_dim: int, settings: AttentionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sequences' newest tokens by both: [seqs, heads, head_dim]. A sequence's numbers follow from its length."""
    generator = torch.Generator().manual_seed(1)
    counts = [length // 64 for length in lengths]
    most = max(*counts, 1)
    kv_format = parse_format(name)
    sealed = SealedPages(kv_format, sum(counts) + len(lengths), kv_heads, head_dim)
    ids = iter(torch.randperm(sum(counts) + len(lengths), generator=generator).tolist())
    shape = (len(lengths), kv_heads, 64, head_dim)
    exact = ExactPages(*(torch.full(shape, torch.nan).bfloat16() for _ in range(2)))
    table = torch.zeros(len(lengths), most, dtype=torch.int64)
    first = torch.tensor([next(ids) for _ in lengths])
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = torch.Generator().manual_seed(length)
        keys, values = ((torch.randn(length, kv_heads, head_dim, generator=own) * 2 + 1).bfloat16() for _ in range(2))
        whole = [part[: 64 * count].view(count, 64, kv_heads, head_dim).transpose(1, 2) for part in (keys, values)]
        pages = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int64)
        own_page = (length - 1) // 64
        if count:
            sealed.seal(pages, *whole)
            sealed.keep_exactly(first[index : index + 1], whole[0][:1], whole[1][:1])
            table[index, :count] = pages
        written = length - 64 * own_page
        for pool, part in ((exact.keys, keys), (exact.values, values)):
            pool[index, :, :written] = part[64 * own_page :].transpose(0, 1)
    positions = torch.tensor(lengths) - 1
    queries = [torch.randn(heads, head_dim, generator=torch.Generator().manual_seed(-length)) for length in lengths]
    q = torch.stack(queries).bfloat16()
    slots = torch.arange(len(lengths))
    tables = PageTables(table, first, slots[:, None], positions // 64)
    expected = attend(q[:, None], exact, sealed, tables, positions[:, None], settings)[:, 0]
    key_levels = levels_of(kv_format.keys)
    value_levels = key_levels if kv_format.keys == kv_format.values else levels_of(kv_format.values)
    got = attend_sealed(
        q.cuda(),
        PairRecords(sealed.keys.cuda(), key_levels),
        PairRecords(sealed.values.cuda(), value_levels),
        ExactPages(exact.keys.cuda(), exact.values.cuda()),
        SealedTables(table.cuda(), first.cuda(), slots.cuda()),
        positions.cuda(),
        sealed.exact_tokens,
        settings,
    )
    return got.cpu(), expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (4, 1, 256), (24, 2, 64)])
@pytest.mark.parametrize("name", ["qet4", "qet3", "qet2", "qet2+2", "qet4/qet2"])
def test_it_is_what_the_pages_say(
    name: str, heads: int, kv_heads: int, head_dim: int, settings: AttentionSettings
) -> None:
    lengths = [1, 63, 64, 65, 128, 200, 1024, 1025, 1500]
    got, expected = attended(name, lengths, heads, kv_heads, head_dim, settings)
    size = expected.norm(dim=-1, keepdim=True)
    assert bool(((got - expected).norm(dim=-1, keepdim=True) <= 5e-3 * size).all())


def test_a_sequence_has_the_same_bits_alone() -> None:
    lengths = [300, 1300, 70]
    together, _ = attended("qet4", lengths, 8, 2, 128, AttentionSettings(0.1))
    for index, length in enumerate(lengths):
        alone, _ = attended("qet4", [length], 8, 2, 128, AttentionSettings(0.1))
        assert torch.equal(together[index], alone[0])
