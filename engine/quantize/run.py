"""One quantization from source to checkpoint directory, streaming tensor by tensor."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.tokens import read_calibration
from anybit.engine.quantize.calibrated import Solution, solve_calibrated
from anybit.engine.quantize.kv_calibration import key_windows
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.rtn import float_part_dtype, quantize_rtn
from anybit.engine.quantize.solve.coded import CodedWeight, to_nested
from anybit.engine.quantize.work_folder import WorkFolder
from anybit.engine.weights.accounting import VOCABULARY_NAMES
from anybit.engine.weights.checkpoint import ShardWriter, nested_tensors
from anybit.engine.weights.manifest import MANIFEST_NAME, Manifest, TensorEntry, file_sha256, write_manifest
from anybit.engine.weights.source import SourceModel, first_sentence
from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) as work proceeds."""


def quantize(
    source: SourceModel,
    destination: Path,
    options: QuantizeOptions,
    progress: Progress = lambda *_: None,
    work_beside: Path | None = None,
) -> Manifest:
    """Write a complete checkpoint of `source` into the existing, empty directory `destination`.

    A calibrated method keeps what it has solved in a folder beside `work_beside` (default: `destination`) until it is
    done, and goes on from there if it was stopped.
    """
    config = dict(source.config)
    decoder = parse_config(config)
    linears = set(_linear_names(decoder.num_layers, decoder.tie_word_embeddings))
    names = [name for name in source.tensor_names() if name != "lm_head.weight" or not decoder.tie_word_embeddings]
    missing = sorted(linears - set(names))
    if missing:
        raise SourceError(f"The model {source.name} lacks the tensor {missing[0]}.")
    source.write_tokenizer(destination)
    if options.kv_calibration:  # used when all else is done, but a text that will not do is told of now
        key_windows(destination, options.kv_calibration, options.seed)
    solution = Solution({}, {}, {})
    work = None
    if options.is_calibrated:
        work = WorkFolder(work_beside or destination, _identity(source, options))
        try:
            solution = solve_calibrated(source, decoder, options, work, destination / "tokenizer.json", progress)
        except ArithmeticError as error:
            raise UnsupportedModelError(
                f"{source.name} cannot be quantized by {options.method}: {first_sentence(error)}."
            ) from error
    writer = ShardWriter(destination)
    entries: dict[str, TensorEntry] = {}
    for index, name in enumerate(names):
        if not options.is_calibrated:
            progress(index, len(names), name)
        tensor = solution.vectors[name] if name in solution.vectors else source.tensor(name)
        if name in linears:
            nested = _quantize_tensor(name, tensor, options, solution.weights.pop(name, None))
            entries[name] = TensorEntry(
                (nested.out_features, nested.in_features),
                nested.group_size,
                str(nested.affine[min(nested.affine)].scale.dtype).removeprefix("torch."),
            )
            writer.add(nested_tensors(name, nested))
        else:
            writer.add({name: tensor})
    writer.close()
    progress(1, 1, "written")
    config["quantization_config"] = {"quant_method": "anybit", "bits": list(options.bit_widths)}
    (destination / "config.json").write_text(json.dumps(config, indent=1, default=str))
    manifest = Manifest(
        method=options.method,
        method_options=solution.options,
        bit_widths=tuple(sorted(options.bit_widths)),
        group_size=options.group_size_label,
        tensors=entries,
        source_name=source.name,
        source_location=source.location,
        source_sha256=source.sha256(),
        files=_hashes(destination),
    )
    write_manifest(destination, manifest)
    if work is not None:
        work.remove()
    return manifest


def _identity(source: SourceModel, options: QuantizeOptions) -> dict[str, object]:
    """What decides a run's result: a run that was stopped is only gone on with by its like."""
    texts = [read_calibration(name) for name in options.calibration]
    return {
        "source": source.sha256(),
        "options": {name: value for name, value in asdict(options).items() if name != "kv_calibration"},
        "texts": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "version": importlib.metadata.version("anybit"),
    }


def _quantize_tensor(name: str, tensor: Tensor, options: QuantizeOptions, solved: CodedWeight | None) -> NestedWeight:
    try:
        group_size = options.group_size or layout.auto_group_size(tensor.shape[1])
        if solved is not None:
            return to_nested(solved, options.bit_widths, group_size, float_part_dtype(tensor))
        # Embedding and head are read at 8 bits at every width, whatever widths the linears have.
        bit_widths = layout.BIT_WIDTHS if name in VOCABULARY_NAMES else options.bit_widths
        return quantize_rtn(tensor, group_size, bit_widths)
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
