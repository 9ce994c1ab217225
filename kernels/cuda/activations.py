"""Inputs of linear layers in the form that products take, made by the operation before: a norm, a gate, or nothing."""

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
class InputForm:
    """How a product takes its inputs: as fixed point numbers with a step per group, or as the values that they are.

    Fixed point numbers in passes of one n-tile (4 tokens) are for `source/linear_decode.cu`, in longer ones for
    `source/linear_batch.cu`; values are for `source/linear_values.cu`, with sums where rows are of several widths.
    """

    group_size: int
    pass_tiles: int = 1
    is_values: bool = False
    has_sums: bool = False  # of values, over each group

    @property
    def defines(self) -> dict[str, int]:
        """Constants of the kernels that write inputs."""
        return {"GROUP": self.group_size, "AS_VALUES": int(self.is_values) + int(self.has_sums)}


@dataclass(frozen=True, slots=True)
class Activations:
    """Inputs of a product, `tokens` rows in a form of it (`source/digits.cuh`, `source/values.cuh`)."""

    tokens: int
    form: InputForm
    numbers: Tensor  # uint8 [passes, column tiles, n-tiles of a pass, 1024]
    scales: Tensor  # float32 [groups, slots, 2] of fixed point numbers; of values [groups, slots], their sums, or empty

    @property
    def passes(self) -> int:
        return self.numbers.shape[0]

    @property
    def slots(self) -> int:
        """Tokens, those included that only fill passes."""
        return self.passes * self.form.pass_tiles * TILE_TOKENS

    @property
    def column_tiles(self) -> int:
        return self.numbers.shape[1]

    @classmethod
    def allocate(cls, tokens: int, columns: int, form: InputForm, device: torch.device) -> "Activations":
        """Not initialised."""
        column_tiles = -(-columns // TILE_COLUMNS)
        token_tiles = -(-tokens // TILE_TOKENS) if form.is_values else num_token_tiles(tokens)
        passes = -(-token_tiles // form.pass_tiles)
        groups = column_tiles * (TILE_COLUMNS // form.group_size)
        slots = passes * form.pass_tiles * TILE_TOKENS
        numbers = torch.empty(passes, column_tiles, form.pass_tiles, 8 * TILE_COLUMNS, dtype=torch.uint8, device=device)
        size = (groups if form.has_sums else 0, slots) if form.is_values else (groups, slots, 2)
        return cls(tokens, form, numbers, torch.empty(size, device=device))

    @property
    def addresses(self) -> list[ctypes.c_void_p]:
        """Numbers and scales, as kernels take them."""
        return pointers(self.numbers, self.scales)


_NO_INPUTS = InputForm(TILE_COLUMNS)
"""Of kernels that share a file with those that write inputs."""


def num_token_tiles(tokens: int) -> int:
    """N-tiles that `tokens` tokens are padded to: 1, 2, 4 or whole passes."""
    needed = -(-tokens // TILE_TOKENS)
    for count in (1, 2, 4):
        if needed <= count:
            return count
    return needed + -needed % MAX_TOKEN_TILES


def prepare_activations(x: Tensor, form: InputForm, gate: str | None = None) -> Activations:
    """x [tokens, in], contiguous, as inputs of a product; a number that is not finite stays so.

    Of fixed point numbers its whole group is not-a-number. With a `gate` ("silu", "gelu_tanh") x is [tokens, 2·in] and
    the inputs are gate(x[:, :in]) · x[:, in:].
    """
    tokens, columns = x.shape[0], x.shape[1] // (1 if gate is None else 2)
    activations = Activations.allocate(tokens, columns, form, x.device)
    constants = defined(**form.defines, VALUE=VALUES[x.dtype], GATE=0 if gate is None else _GATES[gate])
    kernel = load_kernel("activations", "prepare_activations", constants)
    arguments: list[Argument] = [
        *pointers(x),
        *activations.addresses,
        *integers(tokens, columns, activations.slots, form.pass_tiles),
    ]
    kernel.launch((activations.column_tiles, activations.slots // TILE_TOKENS, 1), 128, arguments)
    return activations


@dataclass(frozen=True, slots=True)
class Addition:
    """What is added to the residual stream: values [tokens, hidden], under a norm of this gain or as they are."""

    values: Tensor
    gain: Tensor | None = None


def add_norm_prepare(
    hidden: Tensor,
    addition: Addition | None,
    gain: Tensor,
    eps: float,
    form: InputForm,
    dtype: torch.dtype,
) -> Activations:
    """hidden += addition, in place; then hidden / sqrt(mean(hidden²) + eps) · gain as inputs of a product.

    hidden float32 [tokens, hidden], contiguous; `dtype` is that of additions (with or without one, for one kernel's sake)
    and of inputs that are values.
    """
    tokens, columns = hidden.shape
    activations = Activations.allocate(tokens, columns, form, hidden.device)
    kernel = load_kernel("norm", "add_norm_prepare", _norm_constants(columns, addition, form, dtype))
    arguments: list[Argument] = [
        *_pointers(hidden, addition),
        *pointers(gain),
        *activations.addresses,
        *integers(tokens, activations.slots, form.pass_tiles),
        ctypes.c_float(eps),
    ]
    kernel.launch((activations.slots, 1, 1), _norm_threads(columns), arguments)
    return activations


def add_residual(hidden: Tensor, addition: Addition, eps: float) -> None:
    """hidden += addition, in place."""
    tokens, columns = hidden.shape
    constants = _norm_constants(columns, addition, _NO_INPUTS, addition.values.dtype)
    arguments: list[Argument] = [*_pointers(hidden, addition), ctypes.c_float(eps)]
    load_kernel("norm", "add_residual", constants).launch((tokens, 1, 1), _norm_threads(columns), arguments)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · gain over the last dimension, a multiple of 4, in x's dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    constants = _norm_constants(columns, None, _NO_INPUTS, x.dtype)
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
    columns: int, addition: Addition | None, form: InputForm, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    return defined(
        **form.defines,
        HIDDEN=columns,
        VALUE=VALUES[dtype],
        HAS_DELTA=int(addition is not None),
        HAS_OUTPUT_NORM=int(addition is not None and addition.gain is not None),
    )


def _norm_threads(columns: int) -> int:
    tiles = -(-columns // TILE_COLUMNS)
    of_warp = -(-tiles // _MAX_WARPS)
    return 32 * -(-tiles // of_warp)
