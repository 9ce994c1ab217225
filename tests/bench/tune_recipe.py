"""Compares settings of the default method on a text that no result is reported on.

    python tests/bench/tune_recipe.py --calibration FILE --text FILE --json OUT --device cuda \\
        --setting 'base={}' --setting 'few steps={"training": {"steps": 4}}' --setting 'codes={"code_importance": {"2": 1}}'

A setting changes fields of `engine.quantize.recipes.Recipe`; `training` and a width of `end_to_end` change some of their own
fields, `code_importance` the widths' weights in the descent over codes, `descent_passes` the number of its passes. Each is
quantized and scored once per --variant and --seeds. Scores are those of the codes dequantized to float32 and run over whole
windows, which is many times faster than the serving path and differs from it by less than settings do.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from quality_sources import RotatedSource
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.evaluate.text import read_text
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.machine import describe_device, keep_freed_memory, resolve_device
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize import calibrated
from anybit.engine.quantize.calibrate.block import SITES, Block, load_linears, load_vectors, norm_names
from anybit.engine.quantize.options import SHIPPED, QuantizeOptions
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.quantize.recipes import Recipe, recipe_for
from anybit.engine.quantize.run import quantize
from anybit.engine.quantize.solve import methods
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.source import SourceModel
from anybit.kernels import reference
from anybit.kernels.layout import BIT_WIDTHS

CONTEXT = 1024
_WINDOWS_TOGETHER = 4
_OF_SOLVER = ("code_importance", "descent_passes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--setting", action="append", required=True, metavar="NAME=JSON")
    parser.add_argument("--variant", default="rotated,original")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--source", default="demo")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = resolve_device(arguments.device)
    demo = fetch_source(arguments.source)
    sources = {"original": Kept(demo), "rotated": Kept(RotatedSource(demo))}
    report: dict[str, Any] = {"device": describe_device(device), "text": arguments.text.name, "rows": []}
    for seed in map(int, arguments.seeds.split(",")):
        for setting in arguments.setting:
            name, _, changes = setting.partition("=")
            for variant in arguments.variant.split(","):
                row = measure(sources[variant], json.loads(changes), seed, arguments, device)
                report["rows"].append({"setting": name, "changes": changes, "variant": variant, "seed": seed, **row})
                print(name, variant, seed, row, flush=True)
                arguments.json.write_text(json.dumps(report, indent=1))


class Kept:
    """A source whose tensors are read once."""

    def __init__(self, source: SourceModel) -> None:
        self._source = source
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._source.tensor(name)
        return self._tensors[name].clone()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def measure(
    source: Any, changes: dict[str, Any], seed: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds, and perplexity and KL divergence by width."""
    options = QuantizeOptions(
        method="best",
        bit_widths=BIT_WIDTHS,
        group_size=64,
        calibration=(str(arguments.calibration), SHIPPED),
        seed=seed,
        device=arguments.device,
    )
    codes = {**methods._LOW_IMPORTANCE, **_by_width(changes.get("code_importance", {}))}
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(methods, "_LOW_IMPORTANCE", codes),
        patch.object(methods, "_DESCENT_PASSES", changes.get("descent_passes", methods._DESCENT_PASSES)),
        patch.object(calibrated, "recipe_for", lambda asked: changed(recipe_for(asked), changes)),
    ):
        started = time.perf_counter()
        quantize(source, Path(directory), options)
        seconds = time.perf_counter() - started
        tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
        token_ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=False).ids
        windows = torch.tensor(token_ids[: arguments.windows * CONTEXT], device=device).view(-1, CONTEXT)
        return {"seconds": round(seconds, 1), **scores(Path(directory), source, windows)}


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    fields = {name: value for name, value in changes.items() if name not in _OF_SOLVER}
    if "training" in fields and recipe.training is not None:
        fields["training"] = replace(recipe.training, **fields["training"])
    if "end_to_end" in fields:
        widths = _by_width(fields["end_to_end"])
        fields["end_to_end"] = {
            width: replace(options, **widths.get(width, {})) for width, options in recipe.end_to_end.items()
        }
    for name in ("importance", "damping"):
        if name in fields:
            fields[name] = {**getattr(recipe, name), **_by_width(fields[name])}
    return replace(recipe, **fields)


def _by_width(values: Mapping[str, Any]) -> dict[int, Any]:
    return {int(width): value for width, value in values.items()}


@torch.no_grad()
def scores(directory: Path, source: SourceModel, windows: Tensor) -> dict[str, Any]:
    """Of the float model and of each width of a checkpoint, over int64 [windows, tokens]."""
    config = parse_config(source.config)
    device = windows.device
    reader = CheckpointReader(directory)
    rotary = {layer.rope: RotaryEmbedding(layer.rope, config.head_dim, CONTEXT, device) for layer in config.layers}
    table = source.tensor("model.embed_tokens.weight").to(device, torch.float32)
    head = table if config.tie_word_embeddings else source.tensor("lm_head.weight").to(device, torch.float32)
    norm = source.tensor("model.norm.weight").to(device, torch.float32) + config.norm_offset

    def last_hidden(width: int | None) -> Tensor:
        hidden = F.embedding(windows, table) * config.embedding_scale
        for layer in range(config.num_layers):
            vectors = load_vectors(source, config, layer, device)
            linears = load_linears(source, layer, device)
            if width is not None:
                prefix = f"model.layers.{layer}."
                for name in norm_names(config):
                    vectors[name] = reader.dense(prefix + name).to(device, torch.float32) + config.norm_offset
                linears = {
                    site.name: torch.cat(
                        [dequantized(reader, name, width, device) for name in site.weight_names(layer)]
                    )
                    for site in SITES
                }
            block = Block(config, layer, rotary[config.layers[layer].rope])
            hidden = torch.cat([block(part, linears, vectors) for part in torch.split(hidden, _WINDOWS_TOGETHER)])
        return F.rms_norm(hidden, (config.hidden_size,), norm, config.rms_norm_eps)

    wanted = last_hidden(None)
    found: dict[str, Any] = {}
    for width in (None, *BIT_WIDTHS):
        hidden = wanted if width is None else last_hidden(width)
        nll = kl = 0.0
        for window, own, float_hidden in zip(windows, hidden, wanted, strict=True):
            expected, got = (torch.log_softmax(x @ head.T, -1) for x in (float_hidden, own))
            nll -= float(got[:-1].gather(1, window[1:, None]).sum(dtype=torch.float64))
            kl += float((expected.exp() * (expected - got)).sum(dtype=torch.float64))
        perplexity = math.exp(nll / (windows.numel() - len(windows)))
        found["float" if width is None else str(width)] = (round(perplexity, 3), round(kl / windows.numel(), 4))
    return found


def dequantized(reader: CheckpointReader, name: str, width: int, device: torch.device) -> Tensor:
    weight = reader.allocate([name], (width,), device)
    reader.copy_nested(name, weight)
    return reference.dequantize(weight, width)


if __name__ == "__main__":
    main()
