"""What a long quantization has finished, kept beside its destination so that a killed run goes on where it was."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anybit.engine.quantize.blockwise import SolvedBlock
from anybit.engine.quantize.solve.coded import CodedWeight, FloatPart


class WorkFolder:
    """One safetensors file per solved block and per trained width; a file is there whole or not at all.

    Belongs to one source and one set of options (`identity`): what another run left is removed.
    """

    def __init__(self, destination: Path, identity: Mapping[str, object]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
        prefix = f".{destination.name}.work-"
        self.path = destination.parent / f"{prefix}{digest}"
        for other in destination.parent.glob(f"{prefix}*"):
            if other != self.path:
                shutil.rmtree(other, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def save_block(self, layer: int, block: SolvedBlock) -> None:
        tensors = {f"vector.{name}": vector for name, vector in block.vectors.items()}
        for site, weight in block.weights.items():
            tensors[f"codes.{site}"] = weight.codes
            for width, part in weight.parts.items():
                tensors[f"scale.{width}.{site}"], tensors[f"zero.{width}.{site}"] = part.scale, part.zero
        self._save(f"block-{layer:04d}", tensors, {"report": json.dumps(block.report)})

    def load_block(self, layer: int, device: torch.device) -> SolvedBlock | None:
        """None if the block has not been solved (or its file cannot be read, as after a full disk)."""
        found = self._load(f"block-{layer:04d}", device)
        if found is None:
            return None
        tensors, metadata = found
        block = SolvedBlock({}, {}, json.loads(metadata["report"]))
        parts: dict[str, dict[int, FloatPart]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "vector":
                block.vectors[rest] = tensor
            elif kind == "scale":
                width, _, site = rest.partition(".")
                parts.setdefault(site, {})[int(width)] = FloatPart(tensor, tensors[f"zero.{rest}"])
        block.weights = {site: CodedWeight(tensors[f"codes.{site}"], widths) for site, widths in parts.items()}
        return block

    def save_parts(self, name: str, parts: list[dict[str, FloatPart]]) -> None:
        """The float parts of one width, block by block."""
        tensors = {}
        for layer, sites in enumerate(parts):
            for site, part in sites.items():
                tensors[f"{layer}.{site}.scale"], tensors[f"{layer}.{site}.zero"] = part.scale, part.zero
        self._save(name, tensors, {})

    def load_parts(self, name: str, num_layers: int, device: torch.device) -> list[dict[str, FloatPart]] | None:
        found = self._load(name, device)
        if found is None:
            return None
        tensors, _ = found
        parts: list[dict[str, FloatPart]] = [{} for _ in range(num_layers)]
        for key, tensor in tensors.items():
            layer, site, kind = key.split(".")
            if kind == "scale":
                parts[int(layer)][site] = FloatPart(tensor, tensors[f"{layer}.{site}.zero"])
        return parts

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        temporary = self.path / f"{name}.partial"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, self.path / f"{name}.safetensors")

    def _load(self, name: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        except (SafetensorError, OSError):
            return None
