"""Chooses the implementation of each operation. Callers name what they want, never how it is done.

On a CPU linear layers run natively where the library was built, on an NVIDIA GPU through kernels that are compiled on
first use, else through Triton; everything else is portable PyTorch.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from anybit.kernels import fallbacks
from anybit.kernels.cpu import choose_codes as cpu_codes
from anybit.kernels.cpu import packed as cpu
from anybit.kernels.cpu.bindings import is_native
from anybit.kernels.cpu.packed import PackedWeight
from anybit.kernels.cuda import activations as cuda_activations
from anybit.kernels.cuda import attention as cuda_attention
from anybit.kernels.cuda import fragments
from anybit.kernels.cuda import greedy as cuda_greedy
from anybit.kernels.cuda import linear as cuda
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.nested import NestedWeight
from anybit.kernels.portable import attention as portable_attention
from anybit.kernels.portable import choose_codes as portable_codes
from anybit.kernels.portable import elementwise
from anybit.kernels.portable import greedy as portable_greedy
from anybit.kernels.portable import linear as portable_linear
from anybit.kernels.portable import norm as portable_norm
from anybit.kernels.portable.fixed_point import ACTIVATION_ERROR as PORTABLE_ACTIVATION_ERROR
from anybit.kernels.widths import WidthSegment

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": elementwise.silu, "gelu_tanh": elementwise.gelu_tanh}

ServedWeight = NestedWeight | PackedWeight | FragmentWeight
"""A nested weight in the order that checkpoints have, or in the one that a CPU's or a GPU's kernels read."""


def prepare(weight: NestedWeight) -> ServedWeight:
    """The form of a weight that the fastest kernels here read; the original may then be freed."""
    if cpu.can_pack(weight):
        return cpu.pack(weight)
    if cuda.can_pack(weight):
        return fragments.pack(weight)
    if next(iter(weight.chunks.values())).is_cuda:
        fallbacks.record(
            "cuda_linear", "the GPU's kernels need NVRTC, CUDA's headers and compute capability 8.0, so Triton computes"
        )
    return weight


def linear(
    x: Tensor,
    weight: ServedWeight,
    segments: Sequence[WidthSegment],
    bias: Tensor | None = None,
    is_fast: bool = False,
) -> Tensor:
    """x Ŵᵀ (+ bias), each segment of rows at exactly its own bit-width: [tokens, in] -> [tokens, out] in x's dtype.

    The segments cover the rows of x in order. A row's result depends on that row and its width alone; with `is_fast`
    a GPU may let the number of rows decide too, where that is faster.
    """
    if isinstance(weight, PackedWeight):
        return cpu.linear(x, weight, segments, bias)
    if isinstance(weight, FragmentWeight):
        return cuda.linear(x, weight, segments, bias, is_fast)
    multiply = _linear_without_packing(x.is_cuda)
    parts = [multiply(x[start:stop], weight, width) for width, start, stop in segments]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if bias is None else y + bias


@functools.cache
def _linear_without_packing(on_gpu: bool) -> Callable[[Tensor, NestedWeight, int], Tensor]:
    """For weights that no faster kernel here reads: Triton on a GPU, where it is installed, else PyTorch."""
    if on_gpu and importlib.util.find_spec("triton") is not None:
        from anybit.kernels.triton import linear as triton_linear  # noqa: PLC0415 - Triton is slow to load

        return triton_linear.linear
    return portable_linear.linear


def activation_error(weight: ServedWeight) -> float:
    """How far activations may be from what `linear` multiplies with this weight, as a share of their group's largest."""
    if isinstance(weight, PackedWeight):
        return cpu.ACTIVATION_ERROR
    return cuda.ACTIVATION_ERROR if isinstance(weight, FragmentWeight) else PORTABLE_ACTIVATION_ERROR


def embedding(token_ids: Tensor, weight: ServedWeight, bit_width: int) -> Tensor:
    """Rows of a nested embedding table: int64 [tokens] -> float32 [tokens, in]."""
    if isinstance(weight, PackedWeight):
        return cpu.embedding(token_ids, weight, bit_width)
    if isinstance(weight, FragmentWeight):
        return cuda.embedding(token_ids, weight, bit_width)
    return portable_linear.embedding(token_ids, weight, bit_width)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention over paged keys and values; shapes in `kernels.portable.attention.paged_attention`."""
    if q.is_cuda and cuda_attention.can_attend(q.dtype, k_pages):
        return cuda_attention.paged_attention(
            q, k_pages, v_pages, block_tables, positions, scale, window=window, softcap=softcap
        )
    if q.is_cuda:
        fallbacks.record("cuda_attention", f"no kernel for heads of {q.shape[-1]} and {k_pages.dtype} pages")
    return portable_attention.paged_attention(
        q, k_pages, v_pages, block_tables, positions, scale, window=window, softcap=softcap
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's dtype (arXiv 1910.07467, eq. 4)."""
    if cpu.can_normalise(x):
        return cpu.rms_norm(x, weight, eps)
    if cuda_activations.can_normalise(x):
        return cuda_activations.rms_norm(x, weight, eps)
    return portable_norm.rms_norm(x, weight, eps)


def greedy(logits: Tensor) -> Tensor:
    """Per row the index of the largest logit, or −1 where one is not finite: float32 [rows, vocab] -> int64 [rows]."""
    if logits.device.type == "cpu" and is_native():
        return cpu.greedy(logits)
    if cuda_greedy.can_choose(logits):
        return cuda_greedy.greedy(logits)
    return portable_greedy.greedy(logits)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap·tanh(x/cap), in place."""
    return elementwise.softcap_(x, cap)


def choose_codes(
    targets: Tensor,
    origin: Tensor | None,
    coupling: Tensor,
    weights: Tensor,
    scale: Tensor,
    zero: Tensor,
    shifts: Sequence[int],
    num_codes: int,
) -> tuple[Tensor, Tensor]:
    """The integer step of the solvers; contract and shapes in `kernels.portable.choose_codes.choose_codes`."""
    arguments = (targets, origin, coupling, weights, scale, zero, shifts, num_codes)
    if targets.is_cuda:
        from anybit.kernels.triton import choose_codes as triton_codes  # noqa: PLC0415 - Triton is slow to load

        return triton_codes.choose_codes(*arguments)
    if cpu_codes.can_choose_codes(targets, num_codes):
        return cpu_codes.choose_codes(*arguments)
    return portable_codes.choose_codes(*arguments)
