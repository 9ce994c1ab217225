"""How fast attention over sealed pages is on an NVIDIA GPU beside PyTorch's attention in bfloat16, and sealing them."""

import functools
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anybit.engine.bench.graph_timing import graph_seconds
from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.config import ConfigError
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.machine import describe_device, resolve_device
from anybit.engine.models.config import DecoderConfig
from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.cuda.attention import attend_splits
from anybit.kernels.cuda.seal import LayerRecords, PageSeals, can_seal, seal_pages
from anybit.kernels.cuda.sealed_attention import SealedRecords, SealedTables, attend_sealed, can_attend_sealed
from anybit.kvcache.formats import SEALED_FORMATS, parse_format
from anybit.kvcache.gpu_records import has_kernels, layer_records, sealed_records
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.sealed_pool import Seals, sealed_layer
from anybit.kvcache.spec import PAGE_SIZE, KVSpec

KERNEL_FORMATS = tuple(name for name in SEALED_FORMATS if has_kernels(name))
"""Formats whose pages the GPU's kernels seal and read."""
SEALED_TOGETHER = (1, 8, 32)
"""Pages, one of a sequence each, for which sealing is timed."""
LIBRARY = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

_ROTATION_BYTES = 160 << 20  # read before anything is read again: far more than an L2 cache holds
_REPLAYS = 15
_ROUNDS = 3  # in which formats and library take turns: a single reading may be a quarter off
_DIFFERENT_PAGES = 64  # of random numbers, from which all sealed ones are made

Call = Callable[[], object]
Records = TypeVar("Records", LayerRecords, SealedRecords)


def bench_kv_kernels(
    shape: str,
    cells: Sequence[tuple[int, int]],
    kv_formats: Sequence[str] | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The `bench kv --kernels` report of a `model_shapes` shape: decode attention at each cell of sequences and tokens
    before the new one, and sealing, per format (None: all `KERNEL_FORMATS`).

    Microseconds of attention are one layer's, those of sealing one page's over all layers. ConfigError where the kernels
    know no such format or can't run.
    """
    config = MODELS[shape]
    names = _checked_formats(KERNEL_FORMATS if kv_formats is None else kv_formats)
    target = _checked_device(device, config.head_dim)
    return {
        "device": describe_device(target),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        },
        "shape": shape,
        "rows": kernel_rows(KernelTimer(config, target), cells, names, progress),
    }


class KernelTimer:
    """Seconds of kernels at a model's shape, from a CUDA graph over copies of what they read."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self._config = config
        self._device = device

    @torch.inference_mode()
    def pytorch_attention(self, batch: int, context: int) -> dict[str, float]:
        """Of PyTorch's attention over keys and values that lie together; without those of `LIBRARY` that can't run."""
        sizes = (batch, self._config.num_kv_heads, context, self._config.head_dim)
        copies = [(self._random(*sizes), self._random(*sizes)) for _ in range(_num_copies(2 * 2 * math.prod(sizes)))]
        q = self._random(batch, self._config.num_heads, 1, self._config.head_dim)
        seconds = {}
        for name, backend in LIBRARY.items():
            calls = [functools.partial(_attend_with, backend, q, keys, values) for keys, values in copies]
            if _can_run(calls[0]):
                seconds[name] = graph_seconds(calls, _REPLAYS)
        return seconds

    @torch.inference_mode()
    def exact_attention(self, batch: int, context: int) -> float:
        """Of AnyBit's own kernel over pages in bfloat16."""
        pages = -(-context // PAGE_SIZE)
        sizes = (batch * pages, self._config.num_kv_heads, PAGE_SIZE, self._config.head_dim)
        tables = torch.randperm(batch * pages, device=self._device).view(batch, pages)
        positions = torch.full((batch, 1), context - 1, device=self._device)
        q = self._queries(batch)

        def attended(keys: Tensor, values: Tensor) -> Tensor:
            return attend_splits(q, keys, values, tables, positions, self._settings.scale).merged()

        copies = _num_copies(2 * 2 * math.prod(sizes))
        return graph_seconds(
            [functools.partial(attended, self._random(*sizes), self._random(*sizes)) for _ in range(copies)], _REPLAYS
        )

    @torch.inference_mode()
    def sealed_attention(self, kv_format: str, batch: int, context: int) -> float:
        """Of AnyBit's own kernel over sealed pages, of new tokens on the page after them."""
        spec = self._spec(1, kv_format)
        pages = context // PAGE_SIZE
        num_pages = batch * (pages + 1)  # the last ones are those of exact first tokens
        page_ids = torch.randperm(batch * pages, device=self._device)
        firsts = torch.arange(batch * pages, num_pages, device=self._device)
        slots = torch.arange(batch, device=self._device)
        tables = SealedTables(page_ids.view(batch, pages), firsts, slots[:, None])
        own = self._exact_pages(batch)
        positions = torch.full((batch, 1), context, device=self._device)
        q = self._queries(batch)
        out = torch.empty_like(q)

        def attend(records: SealedRecords) -> None:
            attend_sealed(q, records, own, tables, positions, self._settings, out)

        copies = _num_copies(num_pages * spec.page_bytes)
        return graph_seconds(
            [functools.partial(attend, self._sealed_records(spec, page_ids, firsts)) for _ in range(copies)], _REPLAYS
        )

    @torch.inference_mode()
    def sealing(self, kv_format: str, pages: int) -> float:
        """Of sealing so many pages of all layers at once."""
        spec = self._spec(self._config.num_layers, kv_format)
        copies = _num_copies(pages * spec.of_format(OWN_FORMAT).page_bytes)
        own = self._exact_pages(spec.num_layers, copies * pages)
        sealed = {
            layer: SealedPages(
                spec.kv_format(layer), copies * pages, spec.num_kv_heads, spec.head_dim, device=self._device
            )
            for layer in range(spec.num_layers)
        }
        records = _known(layer_records(sealed))
        page_ids = torch.arange(copies * pages, device=self._device).view(copies, pages)
        none = page_ids[0, :0]
        exact_tokens = sealed[0].exact_tokens
        return graph_seconds(
            [
                functools.partial(seal_pages, own, records, PageSeals(ids, ids, none, none, exact_tokens))
                for ids in page_ids
            ],
            _REPLAYS,
        )

    @property
    def _settings(self) -> AttentionSettings:
        return AttentionSettings(self._config.head_dim**-0.5)

    def _spec(self, num_layers: int, kv_format: str) -> KVSpec:
        return KVSpec(num_layers, self._config.num_kv_heads, self._config.head_dim, kv_format)

    def _queries(self, batch: int) -> Tensor:
        return self._random(batch, 1, self._config.num_heads, self._config.head_dim)

    def _exact_pages(self, *counts: int) -> ExactPages:
        sizes = (*counts, self._config.num_kv_heads, PAGE_SIZE, self._config.head_dim)
        return ExactPages(self._random(*sizes), self._random(*sizes))

    def _sealed_records(self, spec: KVSpec, page_ids: Tensor, first_page_ids: Tensor) -> SealedRecords:
        """Pages sealed as a server seals them, so that codes are as frequent as in one."""
        num_pages = len(page_ids) + len(first_page_ids)
        layer = sealed_layer(spec, 0, num_pages, device=self._device)
        slots = torch.arange(num_pages, device=self._device) % _DIFFERENT_PAGES
        first_slots, slots = slots[: len(first_page_ids)], slots[: len(page_ids)]
        seals = Seals(slots, page_ids, first_slots, first_page_ids, torch.zeros_like(slots))
        layer.seal(self._exact_pages(_DIFFERENT_PAGES), seals)
        return _known(sealed_records(layer.pages, layer.basis))

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=self._device)


def kernel_rows(
    timer: KernelTimer,
    cells: Sequence[tuple[int, int]],
    kv_formats: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Rows of the report: per cell bf16 and the formats, then per format and number of pages what sealing takes."""
    rows: list[dict[str, Any]] = []
    done, total = 0, len(cells) * (len(kv_formats) + 1) + len(kv_formats) * len(SEALED_TOGETHER)

    def add(row: dict[str, Any]) -> None:
        nonlocal done
        rows.append(row)
        done += 1
        progress(done, total)

    progress(done, total)
    for batch, context in cells:
        try:
            library, seconds = _cell_seconds(timer, batch, context, kv_formats)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"The cell {batch}x{context} takes more memory than the GPU has free; name smaller ones with --cells."
            ) from None
        for name, of_format in seconds.items():
            add(_row("attention", name, batch, context, of_format, library))
        torch.cuda.empty_cache()
    for name in kv_formats:
        for pages in SEALED_TOGETHER:
            add(_row("seal", name, pages, None, timer.sealing(name, pages) / pages, {}))
    return rows


def _cell_seconds(
    timer: KernelTimer, batch: int, context: int, kv_formats: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of attention, by the library's kernels and by AnyBit's for bf16 and each format: medians of rounds."""
    library: dict[str, list[float]] = {}
    own: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        for name, seconds in timer.pytorch_attention(batch, context).items():
            library.setdefault(name, []).append(seconds)
        own.setdefault(OWN_FORMAT, []).append(timer.exact_attention(batch, context))
        for name in kv_formats:
            own.setdefault(name, []).append(timer.sealed_attention(name, batch, context))
    of_library, of_own = ({name: statistics.median(part) for name, part in times.items()} for times in (library, own))
    return of_library, of_own


def _row(
    kernel: str, kv_format: str, batch: int, context: int | None, seconds: float, library: dict[str, float]
) -> dict[str, Any]:
    """`times_library` is how many times as fast as the fastest one of the library this is, None where there is none."""
    return {
        "kernel": kernel,
        "kv_format": kv_format,
        "batch": batch,
        "context": context,
        "microseconds": seconds * 1e6,
        "library_microseconds": {name: peer * 1e6 for name, peer in library.items()},
        "times_library": min(library.values()) / seconds if library else None,
    }


def _checked_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Those beside bf16, which is always timed."""
    chosen = tuple(name for name in dict.fromkeys(names) if name != OWN_FORMAT)
    for name in chosen:
        if not set(parse_format(name).names) <= set(KERNEL_FORMATS):
            raise ConfigError(
                f"The GPU has kernels for {', '.join(KERNEL_FORMATS)} and their mixtures, not for {name}."
            )
    return chosen


def _checked_device(name: str, head_dim: int) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        raise ConfigError("Kernels of keys and values are timed on a GPU, but PyTorch sees none here.")
    if not (can_attend_sealed(torch.bfloat16, head_dim, device) and can_seal(torch.bfloat16, head_dim, device)):
        raise ConfigError(
            f"The kernels need NVRTC and an NVIDIA GPU from Ampere on, with shared memory for heads of {head_dim}."
        )
    return device


def _known(records: Records | None) -> Records:
    if records is None:
        raise ValueError("No kernel knows these pages.")
    return records


def _num_copies(num_bytes: int) -> int:
    return max(1, -(-_ROTATION_BYTES // num_bytes))


def _attend_with(backend: SDPBackend, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def _can_run(call: Call) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # PyTorch has no such kernel for this GPU or these sizes
        return False
    return True
