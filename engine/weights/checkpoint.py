"""Reads and writes the nested weights of a checkpoint directory, one tensor at a time."""

import errno
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anybit.engine.errors import CheckpointError
from anybit.engine.weights.manifest import FLOAT_DTYPE_NAMES, Manifest, TensorEntry, read_manifest
from anybit.kernels import layout
from anybit.kernels.nested import Affine, NestedWeight

INDEX_NAME = "model.safetensors.index.json"
_SHARD_BYTES = 512 << 20
FLOAT_DTYPES = {name: getattr(torch, name) for name in FLOAT_DTYPE_NAMES}


def nested_tensors(name: str, weight: NestedWeight) -> dict[str, Tensor]:
    """The tensors that hold one nested weight, by the names they have in a shard."""
    tensors = {f"{name}.{chunk}": codes for chunk, codes in weight.chunks.items()}
    for width, part in weight.affine.items():
        tensors[f"{name}.scale_{width}"] = part.scale
        tensors[f"{name}.zero_{width}"] = part.zero
    return tensors


class ShardWriter:
    """Collects tensors and writes them as safetensors shards, holding at most one shard in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._pending.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left and the index; shards get their final names once their number is known."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        try:
            save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            # The library wraps the system's error in text; give it back its number, so that a full disk is told as one.
            number = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
            raise OSError(number, str(error)) from error
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self._directory / f"model-{number:05d}.safetensors"


@contextmanager
def open_shards(directory: Path) -> Iterator["ShardReader"]:
    """Open a directory's safetensors files for random access by tensor name."""
    reader = ShardReader(directory)
    try:
        yield reader
    finally:
        reader.close()


class ShardReader:
    """Tensors of a Hugging Face style directory by name, memory-mapped until copied."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, safe_open] = {}
        index = directory / INDEX_NAME
        try:
            if index.is_file():
                self._weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                with safe_open(directory / "model.safetensors", framework="pt") as file:
                    self._weight_map = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"The weights in {directory} cannot be read: {error}.") from error

    @property
    def names(self) -> Iterable[str]:
        return self._weight_map.keys()

    def tensor(self, name: str) -> Tensor:
        """CheckpointError if the tensor is missing or its shard is damaged."""
        shard = self._weight_map.get(name)
        if shard is None:
            raise CheckpointError(f"The weights in {self._directory} lack the tensor {name}.")
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self._directory / shard, framework="pt")
            tensor: Tensor = self._files[shard].get_tensor(name)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The file {self._directory / shard} cannot be read: {error}.") from error
        return tensor

    def close(self) -> None:
        self._files.clear()


class CheckpointReader:
    """A checkpoint directory whose manifest has been read; hashes are the caller's to verify."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self._shards = ShardReader(directory)

    def entry(self, name: str) -> TensorEntry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"The checkpoint {self.directory} lacks the weight {name}.")
        return entry

    def dense(self, name: str) -> Tensor:
        return self._shards.tensor(name)

    def mapped(self, name: str, bit_width: int) -> NestedWeight:
        """A weight as the mapped file holds it, with what a read at `bit_width` touches and nothing else."""
        entry = self.entry(name)

        def part(width: int) -> Affine:
            return Affine(*(self._shards.tensor(f"{name}.{kind}_{width}") for kind in ("scale", "zero")))

        return NestedWeight(
            *entry.shape,
            entry.group_size,
            {chunk.name: self._shards.tensor(f"{name}.{chunk.name}") for chunk in layout.chunks_for(bit_width)},
            {width: part(width) for width in {bit_width, min(bit_width, layout.NIBBLE_BITS)}},
        )

    def copy_nested(self, name: str, into: NestedWeight) -> None:
        """Fill `into`, a weight (or a view of rows) with the widths wanted, from the shards; no other stream is read."""
        for tensor_name, destination in nested_tensors(name, into).items():
            source = self._shards.tensor(tensor_name)
            if source.shape != destination.shape:
                raise CheckpointError(
                    f"The tensor {tensor_name} has the shape {tuple(source.shape)}, expected {tuple(destination.shape)}."
                )
            destination.copy_(source)

    def allocate(
        self, names: Iterable[str], bit_widths: Iterable[int], device: torch.device | str = "cpu"
    ) -> NestedWeight:
        """Memory for several weights of one input, stacked along the output."""
        entries = [self.entry(name) for name in names]
        if len({(entry.shape[1], entry.group_size) for entry in entries}) != 1:
            raise CheckpointError("Weights that share an input differ in group size.")
        rows = [entry.shape[0] for entry in entries]
        if any(count % layout.ROW_BLOCK for count in rows[:-1]):
            raise CheckpointError(f"Weights of {rows} rows cannot be stacked: all but the last must be multiples of 8.")
        first = entries[0]
        # Where one part needs the wider type, all of the stack gets it.
        float_dtype = max((FLOAT_DTYPES[entry.float_dtype] for entry in entries), key=lambda dtype: dtype.itemsize)
        return NestedWeight.allocate(sum(rows), first.shape[1], first.group_size, bit_widths, float_dtype, device)
