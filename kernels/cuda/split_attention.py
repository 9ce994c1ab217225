"""What one token of each sequence has attended to, in parts that one more kernel puts together."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.activations import Activations, InputForm
from anybit.kernels.cuda.driver import Argument, defined, integers, load_kernel


@dataclass(frozen=True, slots=True)
class Merge:
    """Kernels of `source/<source>.cu` that merge splits: to a tensor, and to a product's inputs.

    Both take the problem, the number of splits and sequences; a block has so many columns of so many sequences.
    """

    source: str
    to_tensor: str
    to_inputs: str
    columns: int
    sequences: int
    threads: int


@dataclass(frozen=True, slots=True)
class SplitAttention:
    """One token of each sequence, split by split of its keys and values; `merged` puts them together."""

    like: Tensor  # [sequences, 1, heads, head_dim], of the type of the queries, which it need not hold
    problem: ctypes.Structure  # of the merge's source; its `out` is set here
    constants: dict[str, int]
    splits: int
    merge: Merge
    kept: tuple[Tensor, ...]  # what `problem` points to

    def merged(self, out: Tensor | None = None) -> Tensor:
        """[sequences, 1, heads, head_dim] in the type of the queries; rows at negative positions are left as they are."""
        out = torch.empty_like(self.like, memory_format=torch.contiguous_format) if out is None else out
        self.problem.out = out.data_ptr()
        kernel = load_kernel(self.merge.source, self.merge.to_tensor, defined(**self.constants))
        arguments: list[Argument] = [self.problem, *integers(self.splits, len(self.like))]
        kernel.launch(self._grid(len(self.like)), self.merge.threads, arguments)
        return out

    def prepared(self, start: int, stop: int, form: InputForm) -> Activations:
        """`merged` of sequences start .. stop−1, [sequences, heads · head_dim], as inputs of a product."""
        activations = Activations.allocate(stop - start, self.like[0].numel(), form, self.like.device)
        kernel = load_kernel(self.merge.source, self.merge.to_inputs, defined(**self.constants, **form.defines))
        arguments: list[Argument] = [
            self.problem,
            *integers(self.splits, start, stop - start),
            *activations.addresses,
            *integers(activations.slots, form.pass_tiles),
        ]
        kernel.launch(self._grid(activations.slots), self.merge.threads, arguments)
        return activations

    def _grid(self, sequences: int) -> tuple[int, int, int]:
        return -(-self.like[0].numel() // self.merge.columns), -(-sequences // self.merge.sequences), 1
