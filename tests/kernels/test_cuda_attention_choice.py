"""How attention is launched, by what there is to do and how much shared memory a GPU has; no GPU is needed."""

import pytest
import torch

from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda import attention, sealed_attention
from anybit.kernels.cuda.attention import attend_splits
from anybit.kernels.cuda.sealed_attention import SealedTables, attend_sealed_splits
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.formats import parse_format
from anybit.kvcache.gpu_records import sealed_records
from anybit.kvcache.sealed import SealedPages

HOPPER, SMALL = 227 << 10, 99 << 10  # bytes that a block may ask for


class Launches:
    """In place of the kernels: what would have been launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shared_bytes: int) -> None:
        self.source, self.threads, self.shared_bytes, self.defines = "", 0, 0, {}
        monkeypatch.setattr(sealed_attention, "num_multiprocessors", lambda device: 132)
        for module in (attention, sealed_attention):
            monkeypatch.setattr(module, "max_shared_bytes", lambda device: shared_bytes)
            monkeypatch.setattr(module, "load_kernel", self._load)

    def _load(self, source: str, _function: str, defines: tuple[tuple[str, int], ...], *_: object) -> "Launches":
        self.source, self.defines = source, dict(defines)
        return self

    def launch(
        self, _grid: object, threads: int, _arguments: object, shared_bytes: int, may_overlap: bool = True
    ) -> None:
        self.threads, self.shared_bytes = threads, shared_bytes


def attend(kv_format: str, sequences: int, pages: int, head_dim: int) -> None:
    records = sealed_records(SealedPages(parse_format(kv_format), 1, 1, head_dim), PageBasis(head_dim))
    assert records is not None
    own = ExactPages(*(torch.empty(sequences, 1, 64, head_dim, dtype=torch.bfloat16) for _ in range(2)))
    ids = torch.zeros(sequences, max(pages, 1), dtype=torch.int64)
    q = torch.empty(sequences, 1, 4, head_dim, dtype=torch.bfloat16)
    tables = SealedTables(ids[:, :pages], ids[:, 0].contiguous(), ids[:, :1].contiguous())
    attend_sealed_splits(q, records, own, tables, ids[:, :1], AttentionSettings(0.1))


@pytest.mark.parametrize("kv_format", ["qet4", "qet3", "qet2", "uniform8", "uniform8/qet4"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("shared_bytes", [HOPPER, SMALL])
def test_a_block_asks_for_no_more_than_there_is(kv_format, head_dim, shared_bytes, monkeypatch):
    launches = Launches(monkeypatch, shared_bytes)
    for sequences, pages in [(1, 0), (1, 100), (64, 128), (300, 8)]:
        attend(kv_format, sequences, pages, head_dim)
        assert launches.threads >= 32
        assert launches.shared_bytes <= shared_bytes


def test_many_splits_are_streamed_where_there_is_room(monkeypatch):
    launches = Launches(monkeypatch, HOPPER)
    attend("qet4", 1, 128, 128)
    assert launches.source == "attend_sealed_pages"
    attend("qet4", 64, 128, 128)
    assert launches.source == "attend_sealed_splits"
    launches = Launches(monkeypatch, SMALL)
    attend("qet4", 64, 128, 256)
    assert launches.source == "attend_sealed_splits"
    attend("uniform8/qet4", 64, 128, 256)  # a table, and records as large as they are
    assert launches.source == "attend_sealed_pages"


@pytest.mark.parametrize(("shared_bytes", "staged"), [(HOPPER, 1), (137 << 10, 1), (128 << 10, 0), (SMALL, 0)])
def test_pages_are_copied_where_a_block_has_room_for_all_it_keeps(shared_bytes, staged, monkeypatch):
    launches = Launches(monkeypatch, shared_bytes)
    q = torch.empty(1, 1, 4, 128, dtype=torch.bfloat16)
    pages = torch.empty(5, 1, 64, 128, dtype=torch.bfloat16)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    attend_splits(q, pages, pages, ids, ids[:, :1], 0.1)
    assert launches.defines["STAGED"] == staged
    assert launches.shared_bytes <= shared_bytes
