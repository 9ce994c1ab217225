"""Further copies of a weight, for measurements that must not find it in a cache."""

from dataclasses import replace

import torch
from torch import Tensor

from anybit.kernels.cpu.bindings import FloatPart, Weight
from anybit.kernels.cpu.packed import PackedWeight
from anybit.kernels.cuda.fragments import FragmentWeight
from anybit.kernels.dispatch import ServedWeight
from anybit.kernels.nested import Affine, NestedWeight


def duplicates(weight: ServedWeight, count: int) -> list[ServedWeight]:
    """`count` weights like this one, each in memory of its own; many times faster than preparing it again."""
    if isinstance(weight, PackedWeight):
        streams = [_copies(tensor, count) for tensor in weight.tensors]
        return [_with_tensors(weight, tuple(stream[index] for stream in streams)) for index in range(count)]
    if isinstance(weight, FragmentWeight):
        stacks = {name: _copies(stream, count) for name, stream in weight.streams.items()}
        parts = {width: _copies(part, count) for width, part in weight.parts.items()}
        return [
            replace(
                weight,
                streams={name: copies[index] for name, copies in stacks.items()},
                parts={width: copies[index] for width, copies in parts.items()},
            )
            for index in range(count)
        ]
    chunks = {name: _copies(chunk, count) for name, chunk in weight.chunks.items()}
    affine = {
        width: Affine(_copies(part.scale, count), _copies(part.zero, count)) for width, part in weight.affine.items()
    }
    return [_nested_at(weight, chunks, affine, index) for index in range(count)]


def _copies(tensor: Tensor, count: int) -> Tensor:
    """[count, *shape], by one operation: one per copy would wait for PyTorch's threads thousands of times."""
    return tensor.expand(count, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _with_tensors(weight: PackedWeight, tensors: tuple[Tensor, ...]) -> PackedWeight:
    # An absent stream or part is a null pointer, which ctypes gives and takes as None.
    moved: dict[int | None, int | None] = {None: None}
    moved.update((old.data_ptr(), new.data_ptr()) for old, new in zip(weight.tensors, tensors, strict=True))
    descriptor = Weight.from_buffer_copy(weight.descriptor)
    for index, address in enumerate(descriptor.chunks):
        descriptor.chunks[index] = moved[address]
    for index, part in enumerate(descriptor.parts):
        descriptor.parts[index] = FloatPart(moved[part.scale], moved[part.zero])
    return replace(weight, tensors=tensors, descriptor=descriptor)


def _nested_at(weight: NestedWeight, chunks: dict[str, Tensor], affine: dict[int, Affine], index: int) -> NestedWeight:
    return replace(
        weight,
        chunks={name: copies[index] for name, copies in chunks.items()},
        affine={width: Affine(part.scale[index], part.zero[index]) for width, part in affine.items()},
    )
