"""The GPU's attention over sealed pages against the one in PyTorch, which is tested against sums token by token."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda import sealed_attention
from anybit.kernels.cuda.heads import LayerBases, RowPlaces
from anybit.kernels.cuda.sealed_attention import (
    PairRecords,
    SealedRecords,
    SealedTables,
    UniformRecords,
    attend_sealed,
    attend_sealed_splits,
)
from anybit.kernels.portable.hadamard import rotation_signs, unrotate
from anybit.kvcache.attention import PageTables, attend
from anybit.kvcache.codec.pages import PairCodec
from anybit.kvcache.formats import codec_of, parse_format
from anybit.kvcache.sealed import SealedPages
from tests.fixtures.projection import apart, random_projection

pytestmark = pytest.mark.gpu

SETTINGS = [
    AttentionSettings(0.1),
    AttentionSettings(0.1, window=150),
    AttentionSettings(0.1, window=7),
    AttentionSettings(0.2, softcap=5.0),
]
HEADS = [(9, 3, 64), (32, 8, 128), (4, 1, 256), (8, 1, 256), (24, 2, 64)]
FORMATS = ["qet4", "qet3", "qet2", "qet2+2", "qet4/qet2", "uniform8"]


@functools.cache
def levels_of(name: str) -> Tensor:
    codec = codec_of(name, for_keys=True)
    assert isinstance(codec, PairCodec)
    return codec.table.levels.half().cuda()  # type: ignore[attr-defined]


def on_gpu(name: str, records: Tensor) -> PairRecords | UniformRecords:
    return UniformRecords(records.cuda()) if name == "uniform8" else PairRecords(records.cuda(), levels_of(name))


@dataclass(frozen=True)
class Case:
    """Sequences of one format, whose numbers follow from their lengths, and their newest tokens."""

    sealed: SealedPages
    own: ExactPages
    tables: PageTables
    positions: Tensor
    queries: Tensor
    name: str
    settings: AttentionSettings

    def expected(self) -> Tensor:
        return attend(self.queries, self.own, self.sealed, self.tables, self.positions, self.settings)

    def records(self, signs: Tensor | None = None) -> SealedRecords:
        key_name, value_name = parse_format(self.name).names
        return SealedRecords(
            on_gpu(key_name, self.sealed.keys),
            on_gpu(value_name, self.sealed.values),
            self.sealed.exact_tokens,
            None if signs is None else signs.cuda(),
        )

    def tables_on_gpu(self) -> SealedTables:
        return SealedTables(self.tables.sealed.cuda(), self.tables.first.cuda(), self.tables.own.cuda())

    def attended(self, signs: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        out = torch.full_like(self.queries, 7.0).cuda()
        attend_sealed(
            self.queries.cuda(),
            self.records(signs),
            ExactPages(self.own.keys.cuda(), self.own.values.cuda()),
            self.tables_on_gpu(),
            (self.positions if positions is None else positions).cuda(),
            self.settings,
            out,
        )
        return out.cpu()


def make_case(
    name: str,
    lengths: list[int],
    heads: tuple[int, int, int],
    settings: AttentionSettings,
    new_tokens: int = 1,
    value_size: float = 1.0,
) -> Case:
    num_heads, kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(1)
    starts = [length - new_tokens for length in lengths]
    counts = [(length - 1) // 64 for length in lengths]
    firsts_own = [start // 64 for start in starts]
    most_own = max(count - first + 1 for count, first in zip(counts, firsts_own, strict=True))
    sealed = SealedPages(parse_format(name), sum(counts) + len(lengths), kv_heads, head_dim)
    ids = iter(torch.randperm(sum(counts) + len(lengths), generator=generator).tolist())
    shape = (len(lengths) * most_own, kv_heads, 64, head_dim)
    own = ExactPages(*(torch.full(shape, torch.nan).bfloat16() for _ in range(2)))
    slots = torch.randperm(len(lengths) * most_own, generator=generator).view(len(lengths), most_own)
    table = torch.zeros(len(lengths), max(*counts, 1), dtype=torch.int64)
    first = torch.tensor([next(ids) for _ in lengths])
    for index, (length, count, first_own) in enumerate(zip(lengths, counts, firsts_own, strict=True)):
        numbers = torch.Generator().manual_seed(length)
        keys, values = (
            ((torch.randn(length, kv_heads, head_dim, generator=numbers) * 2 + 1) * size).bfloat16()
            for size in (1.0, value_size)
        )
        whole = [part[: 64 * count].view(count, 64, kv_heads, head_dim).transpose(1, 2) for part in (keys, values)]
        pages = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int64)
        if count:
            sealed.seal(pages, *whole)
            sealed.keep_exactly(first[index : index + 1], whole[0][:1], whole[1][:1])
            table[index, :count] = pages
        for page in range(first_own, count + 1):
            slot, written = slots[index, page - first_own], slice(64 * page, min(64 * page + 64, length))
            for pool, part in ((own.keys, keys), (own.values, values)):
                pool[slot, :, : written.stop - written.start] = part[written].transpose(0, 1)
    positions = torch.tensor(starts)[:, None] + torch.arange(new_tokens)
    queries = [
        torch.randn(length, num_heads, head_dim, generator=torch.Generator().manual_seed(-length))[-new_tokens:]
        for length in lengths
    ]
    tables = PageTables(table, first, slots, torch.tensor(firsts_own))
    return Case(sealed, own, tables, positions, torch.stack(queries).half(), name, settings)


def check(got: Tensor, expected: Tensor) -> None:
    size = expected.norm(dim=-1, keepdim=True)
    assert bool(((got - expected).norm(dim=-1, keepdim=True) <= 5e-3 * size).all())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_what_the_pages_say_however_many_sequences(
    name: str, heads: tuple[int, int, int], settings: AttentionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(name, [1, 63, 64, 65, 128, 200, 1024, 1025, 1500], heads, settings)
    got = case.attended()
    check(got, case.expected())
    monkeypatch.setattr(sealed_attention, "_FEW_SPLITS", 0)
    assert torch.equal(case.attended(), got)
    monkeypatch.setattr(sealed_attention, "num_multiprocessors", lambda device: 2)  # so that a warp has several splits
    assert torch.equal(case.attended(), got)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["qet4", "qet2", "qet4/qet3", "uniform8"])
def test_many_tokens_attend_as_the_pages_say(
    name: str, heads: tuple[int, int, int], settings: AttentionSettings
) -> None:
    case = make_case(name, [150, 1000], heads, settings, new_tokens=150)
    check(case.attended(), case.expected())


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["qet4", "qet2+2", "uniform8"])
def test_heads_as_projected_give_the_same_bits(
    name: str, heads: tuple[int, int, int], settings: AttentionSettings, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed_attention, "_FEW_SPLITS", 1000 if few else 0)
    case = make_case(name, [1, 64, 65, 200, 1100], heads, settings)
    num_heads, kv_heads, head_dim = heads
    positions = case.positions[:, 0].cuda()
    slots, formats = case.tables.own[:, 0].cuda(), torch.zeros(len(positions), dtype=torch.int64, device="cuda")
    pages = case.own.keys.cuda(), case.own.values.cuda()
    bases = LayerBases(rotation_signs(head_dim).cuda(), torch.rand(kv_heads, head_dim).cuda() + 0.5, (True,), (True,))
    places = RowPlaces(positions, slots, positions % 64, formats)
    projected = random_projection(num_heads, places, pages, torch.bfloat16, bases=bases)
    queries, copies = apart(projected)
    rest = (case.tables_on_gpu(), positions[:, None], settings)
    records = case.records(rotation_signs(head_dim))
    expected = attend_sealed_splits(queries, records, ExactPages(copies.k_pages, copies.v_pages), *rest).merged()
    assert torch.equal(attend_sealed_splits(projected, records, ExactPages(*pages), *rest).merged(), expected)
    assert torch.equal(pages[0].nan_to_num(9), copies.k_pages.nan_to_num(9))
    assert torch.equal(pages[1].nan_to_num(9), copies.v_pages.nan_to_num(9))


def test_results_are_rotated_back() -> None:
    case = make_case("qet4", [70, 300], (32, 8, 128), SETTINGS[0])
    signs = rotation_signs(128)
    check(case.attended(signs), unrotate(case.expected(), signs))


@pytest.mark.parametrize("new_tokens", [1, 150])
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("uniform8/qet4", (32, 8, 128)),
        ("qet3/uniform8", (32, 8, 128)),
        ("uniform8/qet2", (9, 3, 64)),
        ("qet2/uniform8", (4, 1, 256)),
        ("uniform8/qet3", (8, 1, 256)),
    ],
)
def test_keys_and_values_of_different_forms_go_together(
    name: str, heads: tuple[int, int, int], settings: AttentionSettings, new_tokens: int
) -> None:
    case = make_case(name, [150, 1000], heads, settings, new_tokens)
    check(case.attended(), case.expected())


@pytest.mark.parametrize("size", [3e-4, 1e3])
def test_small_and_large_values_are_read_from_evenly_spaced_levels(size: float) -> None:
    case = make_case("uniform8", [70, 300], (8, 2, 128), SETTINGS[0], value_size=size)
    case = replace(case, queries=case.queries.float())  # so that results are not rounded to half precision
    check(case.attended(), case.expected())


@pytest.mark.parametrize("name", ["qet4", "uniform8"])
def test_pages_that_are_not_numbers_are_read_as_such(name: str) -> None:
    case = make_case(name, [300], (8, 2, 128), SETTINGS[0])
    page = case.tables.sealed[0, 2]
    case.sealed.seal(page[None], *(torch.full((1, 2, 64, 128), torch.nan) for _ in range(2)))
    assert bool(case.attended().isnan().all())


@pytest.mark.parametrize("name", ["qet4", "uniform8"])
def test_a_sequence_has_the_same_bits_alone(name: str) -> None:
    lengths = [300, 1300, 70]
    together = make_case(name, lengths, (8, 2, 128), SETTINGS[0]).attended()
    for index, length in enumerate(lengths):
        assert torch.equal(together[index], make_case(name, [length], (8, 2, 128), SETTINGS[0]).attended()[0])


@pytest.mark.parametrize(("name", "length"), [("qet4", 150), ("qet4", 9000), ("qet4", 17000), ("uniform8", 1000)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)], ids=str)
def test_a_token_has_the_same_bits_among_many(
    heads: tuple[int, int, int], settings: AttentionSettings, name: str, length: int
) -> None:
    signs = rotation_signs(heads[2])
    many = make_case(name, [length], heads, settings, new_tokens=150).attended(signs)
    for later in (0, 1, 70, 149):
        case = make_case(name, [length], heads, settings, new_tokens=150)
        position = case.positions[:, 149 - later : 150 - later]
        own = case.tables.own[:, position[0] // 64 - case.tables.first_own]
        tables = PageTables(case.tables.sealed, case.tables.first, own, position[0] // 64)
        alone = Case(
            case.sealed, case.own, tables, position, case.queries[:, 149 - later : 150 - later], name, settings
        )
        assert torch.equal(alone.attended(signs)[0, 0], many[0, 149 - later])


def test_rows_of_other_formats_are_left_alone() -> None:
    case = make_case("qet4", [300, 70, 500], (8, 2, 128), SETTINGS[0])
    positions = case.positions.clone()
    positions[1] = -1
    got, all_rows = case.attended(positions=positions), case.attended()
    assert torch.equal(got[[0, 2]], all_rows[[0, 2]])
    assert bool((got[1] == 7.0).all())
