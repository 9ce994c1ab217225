"""One quantization from source to checkpoint directory, streaming tensor by tensor."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.rtn import quantize_rtn
from anybit.engine.weights.accounting import VOCABULARY_NAMES
from anybit.engine.weights.checkpoint import ShardWriter, nested_tensors
from anybit.engine.weights.manifest import MANIFEST_NAME, Manifest, TensorEntry, file_sha256, write_manifest
from anybit.engine.weights.source import SourceModel, first_sentence
from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight

METHODS = ("rtn",)
Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) as work proceeds."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`group_size` None chooses per weight the largest of 128, 64, 32 that divides its input."""

    method: str = "rtn"
    bit_widths: tuple[int, ...] = layout.BIT_WIDTHS
    group_size: int | None = None

    @property
    def group_size_label(self) -> str:
        return "auto" if self.group_size is None else str(self.group_size)


def quantize(
    source: SourceModel, destination: Path, options: QuantizeOptions, progress: Progress = lambda *_: None
) -> Manifest:
    """Write a complete checkpoint of `source` into the existing, empty directory `destination`."""
    config = dict(source.config)
    decoder = parse_config(config)
    linears = set(_linear_names(decoder.num_layers, decoder.tie_word_embeddings))
    names = [name for name in source.tensor_names() if name != "lm_head.weight" or not decoder.tie_word_embeddings]
    missing = sorted(linears - set(names))
    if missing:
        raise SourceError(f"The model {source.name} lacks the tensor {missing[0]}.")
    writer = ShardWriter(destination)
    entries: dict[str, TensorEntry] = {}
    for index, name in enumerate(names):
        progress(index, len(names), name)
        tensor = source.tensor(name)
        if name in linears:
            nested = _quantize_tensor(name, tensor, options)
            entries[name] = TensorEntry(
                (nested.out_features, nested.in_features),
                nested.group_size,
                str(nested.affine[min(nested.affine)].scale.dtype).removeprefix("torch."),
            )
            writer.add(nested_tensors(name, nested))
        else:
            writer.add({name: tensor})
    writer.close()
    progress(len(names), len(names), "tokenizer")
    source.write_tokenizer(destination)
    config["quantization_config"] = {"quant_method": "anybit", "bits": list(options.bit_widths)}
    (destination / "config.json").write_text(json.dumps(config, indent=1, default=str))
    manifest = Manifest(
        method=options.method,
        method_options={},
        bit_widths=tuple(sorted(options.bit_widths)),
        group_size=options.group_size_label,
        tensors=entries,
        source_name=source.name,
        source_location=source.location,
        source_sha256=source.sha256(),
        files=_hashes(destination),
    )
    write_manifest(destination, manifest)
    return manifest


def _quantize_tensor(name: str, tensor: Any, options: QuantizeOptions) -> NestedWeight:
    try:
        group_size = options.group_size or layout.auto_group_size(tensor.shape[1])
        return quantize_rtn(tensor, group_size, options.bit_widths)
    except ValueError as error:
        raise UnsupportedModelError(f"The weight {name} cannot be quantized: {first_sentence(error)}.") from error


def _linear_names(num_layers: int, tied: bool) -> list[str]:
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(num_layers) for name in projections]
    return [*(VOCABULARY_NAMES[:1] if tied else VOCABULARY_NAMES), *names]


def _hashes(directory: Path) -> dict[str, str]:
    files: Sequence[Path] = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: file_sha256(path) for path in files if path.name != MANIFEST_NAME}
