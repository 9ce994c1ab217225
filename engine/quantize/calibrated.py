"""A whole model under a calibrated method: blocks in order, then training through all of them; resumable at each step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.machine import free_bytes, keep_freed_memory, physical_cores, resolve_device
from anybit.engine.models.config import DecoderConfig
from anybit.engine.quantize.blockwise import BlockSolver, SolvedBlock, Streams
from anybit.engine.quantize.calibrate.block import SITES, norm_names
from anybit.engine.quantize.calibrate.tokens import read_calibration, sample_texts
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.recipes import Recipe, recipe_for
from anybit.engine.quantize.solve.coded import CodedWeight, FloatPart
from anybit.engine.quantize.solve.end_to_end import Distillation, EndToEndOptions, QuantizedBlock, train_end_to_end
from anybit.engine.quantize.solve.precision import training_dtype
from anybit.engine.quantize.work_folder import WorkFolder
from anybit.engine.text_prefix import first_tokens
from anybit.engine.weights.source import SourceModel
from anybit.kernels import layout
from anybit.kernels.cpu.bindings import set_threads

logger = logging.getLogger("anybit.quantize")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Solution:
    """Solved weights by name, norms that changed by name, and what a manifest tells of how they came about."""

    weights: dict[str, CodedWeight]
    vectors: dict[str, Tensor]
    options: dict[str, Any]


def solve_calibrated(
    source: SourceModel,
    config: DecoderConfig,
    options: QuantizeOptions,
    work: WorkFolder,
    tokenizer_file: Path,
    progress: Progress,
) -> Solution:
    """Solve all linears of a model by a calibrated method. SourceError if the calibration text is too short."""
    keep_freed_memory()
    device = resolve_device(options.device)
    # PyTorch's products and the native integer step take turns; neither waits while the other computes.
    torch.set_num_threads(physical_cores())
    set_threads(physical_cores())
    recipe = recipe_for(options)
    recipe = replace(recipe, context=min(recipe.context, config.max_position_embeddings))
    token_ids = sample_calibration(Tokenizer.from_file(str(tokenizer_file)), recipe, options)
    blocks = ModelSolver(source, config, options, recipe, work, device, progress).solve(token_ids)
    solution = Solution({}, {}, _described(options, recipe, token_ids))
    for layer, block in enumerate(blocks):
        solution.weights.update(by_name(layer, block, config))
        if recipe.training is not None or recipe.balance:
            solution.vectors.update(vectors_by_name(layer, block, config))
    return solution


def _described(options: QuantizeOptions, recipe: Recipe, token_ids: Tensor) -> dict[str, Any]:
    return {
        "calibration": [Path(name).name for name in options.calibration],
        "calibration_tokens": token_ids.numel(),
        "context": recipe.context,
        "damping": {str(width): damping for width, damping in recipe.damping.items()},
        "per_channel": options.per_channel,
        "balance": recipe.balance,
        "true_sequential": recipe.true_sequential,
        "block_training_steps": 0 if recipe.training is None else recipe.training.steps,
        "end_to_end_steps": {str(width): options.steps for width, options in recipe.end_to_end.items()},
        "seed": options.seed,
    }


def sample_calibration(tokenizer: Tokenizer, recipe: Recipe, options: QuantizeOptions) -> Tensor:
    """The token windows of a run: int64 [sequences, context]."""
    texts = [read_calibration(name) for name in options.calibration]

    def encode(part: str) -> list[int]:
        token_ids: list[int] = tokenizer.encode(part, add_special_tokens=False).ids
        return token_ids

    count = max(recipe.sequences, recipe.training_sequences)
    return sample_texts(texts, encode, first_tokens(tokenizer), count, recipe.context, options.seed)


class ModelSolver:
    """Solves every block of a model and keeps what it has solved in a work folder."""

    def __init__(
        self,
        source: SourceModel,
        config: DecoderConfig,
        options: QuantizeOptions,
        recipe: Recipe,
        work: WorkFolder,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._source = source
        self._config = config
        self._options = options
        self._recipe = recipe
        self._work = work
        self._device = device
        self._progress = progress
        self._blocks = BlockSolver(source, config, options, recipe, device)
        self._end_to_end = {
            width: options for width, options in recipe.end_to_end.items() if width in self._blocks.shared_widths
        }
        self._total = config.num_layers + sum(options.steps for options in self._end_to_end.values())

    def solve(self, token_ids: Tensor) -> list[SolvedBlock]:
        """All blocks, on the CPU unless they are trained together; token_ids int64 [sequences, context]."""
        table = self._source.tensor("model.embed_tokens.weight").to(self._device, torch.float32)
        embedded = F.embedding(token_ids.to(self._device), table) * self._config.embedding_scale
        streams = self._blocks.start(embedded)
        solved = []
        for layer in range(self._config.num_layers):
            self._progress(layer, self._total, f"block {layer + 1} of {self._config.num_layers}")
            block = self._work.load_block(layer, self._device)
            if block is None:
                block = self._blocks.solve(layer, streams, self._options.seed + layer)
                self._work.save_block(layer, block)
                _log_report(layer, block)
            self._blocks.advance(layer, block, streams)
            solved.append(_moved(block, torch.device("cpu")) if not self._end_to_end else block)
        self._train_end_to_end(solved, embedded, streams)
        return solved

    def _train_end_to_end(self, solved: list[SolvedBlock], embedded: Tensor, streams: Streams) -> None:
        done = self._config.num_layers
        for width, options in self._end_to_end.items():
            name = f"end-to-end-{width}"
            parts = self._work.load_parts(name, len(solved), self._device)
            if parts is None:
                started = done

                def report(step: int, started: int = started, width: int = width) -> None:
                    self._progress(started + step, self._total, f"{width} bits through the whole model")

                parts = self._train_width(solved, width, options, embedded, streams.float_hidden, report)
                self._work.save_parts(name, parts)
            for block, sites in zip(solved, parts, strict=True):
                for site, part in sites.items():
                    weight = block.weights[site]
                    block.weights[site] = CodedWeight(weight.codes, {**weight.parts, width: part})
            done += options.steps

    def _train_width(
        self,
        solved: list[SolvedBlock],
        width: int,
        options: EndToEndOptions,
        embedded: Tensor,
        targets: Tensor,
        progress: Callable[[int], None],
    ) -> list[dict[str, FloatPart]]:
        # The low nibble was solved for the 4-bit scale as it is.
        fixed_scales = width == layout.NIBBLE_BITS and max(self._options.bit_widths) > layout.NIBBLE_BITS
        blocks = [
            QuantizedBlock(
                self._blocks.block(layer),
                block.vectors,
                {site: weight.codes_at(width) for site, weight in block.weights.items()},
                {site: weight.parts[width] for site, weight in block.weights.items()},
            )
            for layer, block in enumerate(solved)
        ]
        generator = torch.Generator().manual_seed(self._options.seed + width)
        order = torch.randperm(len(embedded), generator=generator).tolist()
        options = replace(options, train_scales=not fixed_scales)
        data = Distillation(embedded, targets, self._head(), order)
        recompute = self._must_recompute(embedded, options.sequences(embedded))
        return train_end_to_end(blocks, width, data, options, recompute, progress)

    def _head(self) -> Callable[[Tensor], Tensor]:
        config = self._config
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        table = self._source.tensor(name).to(self._device, training_dtype(self._device))
        norm = self._source.tensor("model.norm.weight").to(self._device, torch.float32) + config.norm_offset

        def head(hidden: Tensor) -> Tensor:
            logits = F.linear(F.rms_norm(hidden, (hidden.shape[-1],), norm, config.rms_norm_eps), table)
            cap = config.logits_softcap
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return head

    def _must_recompute(self, embedded: Tensor, together: int) -> bool:
        """Whether a step's activations and all weights in float would take more than half of the free memory."""
        config = self._config
        per_token = 12 * config.hidden_size + 6 * config.intermediate_size
        activations = config.num_layers * together * embedded.shape[1] * per_token
        weights = config.num_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
        return 4 * (activations + weights) > free_bytes(self._device) // 2


def by_name(layer: int, block: SolvedBlock, config: DecoderConfig) -> dict[str, CodedWeight]:
    """A block's stacked weights taken apart again, by Hugging Face name."""
    weights = {}
    for site in SITES:
        start = 0
        for name, rows in zip(site.weight_names(layer), site.rows(config), strict=True):
            weights[name] = block.weights[site.name].rows(start, start + rows)
            start += rows
    return weights


def vectors_by_name(layer: int, block: SolvedBlock, config: DecoderConfig) -> dict[str, Tensor]:
    """A block's norms before linears, and its biases, by Hugging Face name, on the CPU."""
    prefix = f"model.layers.{layer}."
    vectors = {f"{prefix}{name}": (block.vectors[name] - config.norm_offset).cpu() for name in norm_names(config)}
    for site in SITES:
        if f"{site.name}.bias" in block.vectors:
            biases = torch.split(block.vectors[f"{site.name}.bias"].cpu(), site.rows(config))
            vectors.update({f"{prefix}{linear}.bias": bias for linear, bias in zip(site.linears, biases, strict=True)})
    return vectors


def _moved(block: SolvedBlock, device: torch.device) -> SolvedBlock:
    return SolvedBlock(
        {site: weight.to(device) for site, weight in block.weights.items()},
        {name: vector.to(device) for name, vector in block.vectors.items()},
        block.report,
    )


def _log_report(layer: int, block: SolvedBlock) -> None:
    if not block.report["full_rank"]:
        logger.warning(
            "Block %d: fewer calibration tokens than inputs; damping alone makes the Hessian invertible.", layer
        )
    logger.info("Block %d: %s", layer, block.report)
