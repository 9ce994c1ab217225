"""Products of some rows of a step on an NVIDIA GPU, and the form in which each wants its inputs."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anybit.engine.layers.linear import DenseLinear, Linear, NestedLinear
from anybit.kernels.cuda.activations import Activations, InputForm
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.cuda.linear import (
    exact_form,
    fast_form,
    mixed_form,
    multiply,
    multiply_dequantized,
    multiply_mixed,
)
from anybit.kernels.widths import RowWidths


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start .. stop−1 of a step, which one launch computes."""

    start: int
    stop: int
    widths: int | RowWidths


class Product(Protocol):
    """A linear layer, which says in what form it takes the inputs of some rows."""

    @property
    def out_features(self) -> int: ...

    def form(self, rows: Rows) -> InputForm | None:
        """None for a tensor of the decoder's type."""
        ...

    def __call__(self, inputs: Activations | Tensor, rows: Rows, y: Tensor) -> None:
        """Write the product of `inputs`, which are these rows, to theirs of y [all rows, out]."""
        ...


@dataclass(frozen=True, slots=True)
class NestedProduct:
    """With `is_fast`, bfloat16 rows are multiplied as such: some by a kernel, many of one width by the library."""

    weight: FragmentWeight
    bias: Tensor | None
    is_fast: bool

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def form(self, rows: Rows) -> InputForm | None:
        count = rows.stop - rows.start
        if isinstance(rows.widths, RowWidths):
            return mixed_form(count, self.weight, rows.widths, self.is_fast)
        return fast_form(count, self.weight) if self.is_fast else exact_form(count, self.weight)

    def __call__(self, inputs: Activations | Tensor, rows: Rows, y: Tensor) -> None:
        part = y[rows.start : rows.stop]
        if isinstance(inputs, Tensor):
            if isinstance(rows.widths, RowWidths):
                raise ValueError("Rows of several widths have no common weight.")
            multiply_dequantized(inputs, self.weight, rows.widths, self.bias, part)
        elif isinstance(rows.widths, RowWidths):
            multiply_mixed(inputs, self.weight, rows.widths, self.bias, part)
        else:
            multiply(inputs, self.weight, rows.widths, self.bias, part)


@dataclass(frozen=True, slots=True)
class DenseProduct:
    """An unquantized weight [out, in], whatever the rows' widths; what it is to be compared with."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def form(self, rows: Rows) -> None:
        del rows

    def __call__(self, inputs: Activations | Tensor, rows: Rows, y: Tensor) -> None:
        if not isinstance(inputs, Tensor):
            raise ValueError("Unquantized weights take values.")
        part = y[rows.start : rows.stop]
        torch.mm(inputs, self.weight.T, out=part)
        if self.bias is not None:
            part += self.bias


def product_of(linear: Linear, dtype: torch.dtype, is_fast: bool) -> Product | None:
    """None for a weight that is not in fragment order, or not of the decoder's type on a GPU."""
    if isinstance(linear, NestedLinear) and isinstance(linear.weight, FragmentWeight):
        return NestedProduct(linear.weight, linear.bias, is_fast)
    if isinstance(linear, DenseLinear) and linear.weight.is_cuda and linear.weight.dtype == dtype == torch.bfloat16:
        return DenseProduct(linear.weight, linear.bias)
    return None
