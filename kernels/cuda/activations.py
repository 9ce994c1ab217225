"""Inputs of linear layers as fixed point numbers, made by the operation that comes before: a norm, a gate, or nothing."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.driver import Argument, can_launch, defined, integers, load_kernel, pointers
from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_TOKENS
from anybit.kernels.cuda.values import VALUES

MAX_TOKEN_TILES = 8  # of a pass of `source/linear_decode.cu`
_MAX_WARPS = 16  # of a block of source/norm.cu
_GATES = {"silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, slots=True)
class Activations:
    """Fixed point numbers of `tokens` rows in the order that a product wants (`source/digits.cuh`).

    Passes of one n-tile are for `source/linear_decode.cu`, longer ones for `source/linear_batch.cu`
    (`kernels.cuda.linear.choose_pass_tiles`).
    """

    tokens: int
    digits: Tensor  # uint8 [passes, column tiles, n-tiles of a pass, 1024]
    scales: Tensor  # float32 [groups, slots, 2]

    @property
    def slots(self) -> int:
        return self.scales.shape[1]

    @property
    def column_tiles(self) -> int:
        return self.digits.shape[1]

    @property
    def pass_tiles(self) -> int:
        return self.digits.shape[2]

    @classmethod
    def allocate(
        cls, tokens: int, columns: int, group_size: int, device: torch.device, pass_tiles: int = 1
    ) -> "Activations":
        """Not initialised."""
        column_tiles, token_tiles = -(-columns // TILE_COLUMNS), num_token_tiles(tokens)
        passes = -(-token_tiles // pass_tiles)
        groups = column_tiles * (TILE_COLUMNS // group_size)
        return cls(
            tokens,
            torch.empty(passes, column_tiles, pass_tiles, 8 * TILE_COLUMNS, dtype=torch.uint8, device=device),
            torch.empty(groups, passes * pass_tiles * TILE_TOKENS, 2, device=device),
        )


def num_token_tiles(tokens: int) -> int:
    """N-tiles that `tokens` tokens are padded to: 1, 2, 4 or whole passes."""
    needed = -(-tokens // TILE_TOKENS)
    for count in (1, 2, 4):
        if needed <= count:
            return count
    return needed + -needed % MAX_TOKEN_TILES


def quantize_activations(x: Tensor, group_size: int, gate: str | None = None, pass_tiles: int = 1) -> Activations:
    """x [tokens, in], contiguous, as fixed point numbers; not-a-number for a group that is not finite.

    With a `gate` ("silu", "gelu_tanh") x is [tokens, 2·in], and what is quantized is gate(x[:, :in]) · x[:, in:].
    """
    tokens, columns = x.shape[0], x.shape[1] // (1 if gate is None else 2)
    activations = Activations.allocate(tokens, columns, group_size, x.device, pass_tiles)
    constants = defined(GROUP=group_size, VALUE=VALUES[x.dtype], GATE=0 if gate is None else _GATES[gate])
    kernel = load_kernel("activations", "quantize_activations", constants)
    arguments: list[Argument] = [
        *pointers(x, activations.digits, activations.scales),
        *integers(tokens, columns, activations.slots, activations.pass_tiles),
    ]
    kernel.launch((activations.column_tiles, activations.slots // TILE_TOKENS, 1), 128, arguments)
    return activations


@dataclass(frozen=True, slots=True)
class Addition:
    """What is added to the residual stream: values [tokens, hidden], under a norm of this gain or as they are."""

    values: Tensor
    gain: Tensor | None = None


def add_norm_quantize(
    hidden: Tensor,
    addition: Addition | None,
    gain: Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
    pass_tiles: int = 1,
) -> Activations:
    """hidden += addition, in place; then hidden / sqrt(mean(hidden²) + eps) · gain as fixed point numbers.

    hidden float32 [tokens, hidden], contiguous; `dtype` is that of additions (with or without one, for one kernel's sake).
    """
    tokens, columns = hidden.shape
    activations = Activations.allocate(tokens, columns, group_size, hidden.device, pass_tiles)
    kernel = load_kernel("norm", "add_norm_quantize", _norm_constants(columns, addition, group_size, dtype))
    arguments: list[Argument] = [
        *_pointers(hidden, addition),
        *pointers(gain, activations.digits, activations.scales),
        *integers(tokens, activations.slots, activations.pass_tiles),
        ctypes.c_float(eps),
    ]
    kernel.launch((activations.slots, 1, 1), _norm_threads(columns), arguments)
    return activations


def add_residual(hidden: Tensor, addition: Addition, eps: float) -> None:
    """hidden += addition, in place."""
    tokens, columns = hidden.shape
    constants = _norm_constants(columns, addition, TILE_COLUMNS, addition.values.dtype)
    arguments: list[Argument] = [*_pointers(hidden, addition), ctypes.c_float(eps)]
    load_kernel("norm", "add_residual", constants).launch((tokens, 1, 1), _norm_threads(columns), arguments)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · gain over the last dimension, a multiple of 4, in x's dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    constants = _norm_constants(columns, None, TILE_COLUMNS, x.dtype)
    arguments: list[Argument] = [*pointers(x, gain, out), ctypes.c_float(eps)]
    load_kernel("norm", "norm_rows", constants).launch((x.numel() // columns, 1, 1), _norm_threads(columns), arguments)
    return out


def can_normalise(x: Tensor) -> bool:
    """Whether `rms_norm` knows this type and size."""
    return x.is_cuda and x.dtype in VALUES and x.shape[-1] % 4 == 0 and x.numel() > 0 and can_launch(x.device)


def _pointers(hidden: Tensor, addition: Addition | None) -> list[ctypes.c_void_p]:
    if addition is None:
        return pointers(hidden, None, None)
    return pointers(hidden, addition.values, addition.gain)


def _norm_constants(
    columns: int, addition: Addition | None, group_size: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    return defined(
        HIDDEN=columns,
        GROUP=group_size,
        VALUE=VALUES[dtype],
        HAS_DELTA=int(addition is not None),
        HAS_OUTPUT_NORM=int(addition is not None and addition.gain is not None),
    )


def _norm_threads(columns: int) -> int:
    tiles = -(-columns // TILE_COLUMNS)
    of_warp = -(-tiles // _MAX_WARPS)
    return 32 * -(-tiles // of_warp)
