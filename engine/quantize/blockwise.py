"""The calibrated methods: a model solved block after block, from the activations that reach each of them."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.config import DecoderConfig
from anybit.engine.quantize.calibrate.balance import ChannelSizes, balance
from anybit.engine.quantize.calibrate.block import SITES, Block, Site, Tap, Vectors, load_linears, load_vectors
from anybit.engine.quantize.calibrate.moments import DampedHessian, InputMoments, damp
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.recipes import HELD_OUT, Recipe
from anybit.engine.quantize.rtn import float_part_dtype
from anybit.engine.quantize.solve.coded import CodedWeight
from anybit.engine.quantize.solve.methods import Solved, solve_residual, solve_shared, solve_uniform
from anybit.engine.quantize.solve.precision import training_products
from anybit.engine.quantize.solve.trained import TrainedPart
from anybit.engine.quantize.solve.training import TrainingData, train_block
from anybit.engine.weights.source import SourceModel
from anybit.kernels import layout

logger = logging.getLogger("anybit.quantize")

_BATCH_TOKENS = 8192
_SMALL_GAIN = 1e-3  # of a norm's mean: below it a gain is not a divisor


@dataclass(slots=True)
class SolvedBlock:
    """A block's codes and float parts by site, its norms and biases, and what solving it reported."""

    weights: dict[str, CodedWeight]
    vectors: dict[str, Tensor]
    report: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Streams:
    """The hidden states that enter a block: the float model's and, where they are followed, each width's own.

    All [sequences, tokens, hidden]; widths may follow fewer sequences. `float_output` is the float block's output once
    it has been computed.
    """

    float_hidden: Tensor
    prefix: dict[int, Tensor]
    float_output: Tensor | None = None


Moments = dict[str, InputMoments]
"""Site -> moments of its input."""


class BlockSolver:
    """Solves one block at a time; holds no more of the model than that block."""

    def __init__(
        self, source: SourceModel, config: DecoderConfig, options: QuantizeOptions, recipe: Recipe, device: torch.device
    ) -> None:
        self._source = source
        self._config = config
        self._options = options
        self._recipe = recipe
        self._device = device
        self._rotary = {
            rope: RotaryEmbedding(rope, config.head_dim, recipe.context, device)
            for rope in {layer.rope for layer in config.layers}
        }
        # With a solver, widths above 4 bits are a residual code on top of the 4-bit one; a single width needs none.
        self.shared_widths: tuple[int, ...] = options.bit_widths
        self._residual_widths: tuple[int, ...] = ()
        if recipe.solver is not None and len(options.bit_widths) > 1:
            low = {width for width in options.bit_widths if width <= layout.NIBBLE_BITS}
            self._residual_widths = tuple(sorted(set(options.bit_widths) - low))
            self.shared_widths = tuple(sorted(low | ({layout.NIBBLE_BITS} if self._residual_widths else set())))

    @property
    def followed_widths(self) -> tuple[int, ...]:
        """The widths whose own hidden states are followed: those that are trained or give Hessians."""
        if not self._recipe.needs_prefix:
            return ()
        return self.shared_widths

    def start(self, embedded: Tensor) -> Streams:
        followed = embedded
        if not self._recipe.prefix_hessians and self._recipe.training is not None:
            followed = embedded[: self._recipe.training_sequences, : self._recipe.training.tokens]
        return Streams(embedded, dict.fromkeys(self.followed_widths, followed))

    def block(self, layer: int) -> Block:
        return Block(self._config, layer, self._rotary[self._config.layers[layer].rope])

    def solve(self, layer: int, streams: Streams, seed: int) -> SolvedBlock:
        """Solve a block for its inputs in `streams`, which learn the float block's output."""
        block = self.block(layer)
        linears = load_linears(self._source, layer, self._device)
        vectors = load_vectors(self._source, self._config, layer, self._device)
        with torch.no_grad():
            sizes: dict[str, ChannelSizes] | None = {} if self._recipe.balance else None
            with self._forward_products():
                float_moments, streams.float_output = self._observe(
                    block, streams.float_hidden, linears, vectors, sizes
                )
            if sizes is not None:
                balanced = balance(self._config, linears, vectors, sizes, self._recipe.balance)
                linears, vectors = balanced.linears, balanced.vectors
                for name, scales in balanced.input_scales.items():
                    float_moments[name].divide_inputs(scales)
        solved: dict[str, Solved] = {}
        hessians: dict[str, dict[int, DampedHessian]] = {}
        prefix: dict[int, Moments] = {}
        for site in SITES:
            with torch.no_grad():
                if self._recipe.prefix_hessians and (self._recipe.true_sequential or not prefix):
                    prefix = self._observe_prefix(block, streams, linears, vectors, solved)
                hessians[site.name] = self._damped(site, float_moments, prefix)
                solved[site.name] = self._solve_site(linears[site.name], hessians[site.name])
        result = SolvedBlock({name: entry.weight for name, entry in solved.items()}, vectors)
        if self._recipe.training is not None:
            self._train(block, linears, result, streams, seed)
        # From here on the float parts are what a checkpoint can hold: residuals and later blocks make up for the rounding.
        result.weights = {
            name: weight.stored(float_part_dtype(linears[name])) for name, weight in result.weights.items()
        }
        losses = {name: dict(entry.losses) for name, entry in solved.items()}
        if self._residual_widths:
            with torch.no_grad():
                for name, residual in self._solve_residuals(block, linears, vectors, result, hessians).items():
                    losses[name].update(residual)
        result.report = {
            "losses": losses,
            "damping": {name: max(entry.damping for entry in sites.values()) for name, sites in hessians.items()},
            "tokens": float_moments[SITES[0].name].num_tokens,
            "full_rank": all(entry.is_full_rank for entry in float_moments.values()),
        }
        return result

    def advance(self, layer: int, solved: SolvedBlock, streams: Streams) -> None:
        """Replace the inputs of a block in `streams` by its outputs."""
        block = self.block(layer)
        with torch.no_grad():
            if streams.float_output is None:
                linears = load_linears(self._source, layer, self._device)
                vectors = load_vectors(self._source, self._config, layer, self._device)
                with self._forward_products():
                    streams.float_output = _forward(block, streams.float_hidden, linears, vectors)
            streams.float_hidden, streams.float_output = streams.float_output, None
            if layer + 1 == self._config.num_layers:  # no block is left to follow a width's own states to
                return
            for width, hidden in streams.prefix.items():
                weights = {name: weight.read(width) for name, weight in solved.weights.items()}
                with self._forward_products():
                    streams.prefix[width] = _forward(block, hidden, weights, solved.vectors)

    def _forward_products(self) -> AbstractContextManager[object]:
        """The published methods see what the model computes in float32; training needs no more than it is trained with."""
        return nullcontext() if self._recipe.prefix_hessians else training_products(self._device)

    def _observe(
        self,
        block: Block,
        hidden: Tensor,
        linears: Mapping[str, Tensor],
        vectors: Vectors,
        sizes: dict[str, ChannelSizes] | None = None,
    ) -> tuple[Moments, Tensor]:
        """Moments of every site's input, and the block's output; `sizes`, if given, is filled too."""
        moments: Moments = {}

        def tap(site: str, x: Tensor) -> None:
            if site not in moments:
                moments[site] = InputMoments(x.shape[-1], self._device)
            moments[site].add(x)
            if sizes is not None:
                sizes.setdefault(site, ChannelSizes(x.shape[-1], self._device)).add(x)

        return moments, _forward(block, hidden, linears, vectors, tap)

    def _observe_prefix(
        self,
        block: Block,
        streams: Streams,
        linears: Mapping[str, Tensor],
        vectors: Vectors,
        solved: Mapping[str, Solved],
    ) -> dict[int, Moments]:
        """Moments per width, with what is solved of this block already in place."""
        observed = {}
        for width, hidden in streams.prefix.items():
            weights = {**linears, **{name: entry.weight.read(width) for name, entry in solved.items()}}
            observed[width], _ = self._observe(block, hidden, weights, vectors)
        return observed

    def _damped(self, site: Site, moments: Moments, prefix: Mapping[int, Moments]) -> dict[int, DampedHessian]:
        """A damped Hessian per width; equal ones are one object."""
        found: dict[tuple[int, float], DampedHessian] = {}
        hessians = {}
        for width in sorted({*self.shared_widths, *self._residual_widths}):
            source = prefix.get(width, moments)[site.name]
            if source.num_skipped:
                logger.warning(
                    "%d calibration inputs of %s were not finite and left out.", source.num_skipped, site.name
                )
            key = (id(source), self._recipe.damping[width])
            if key not in found:
                found[key] = damp(source.hessian, self._recipe.damping[width])
            hessians[width] = found[key]
        return hessians

    def _solve_site(self, weight: Tensor, hessians: Mapping[int, DampedHessian]) -> Solved:
        in_features = weight.shape[1]
        group_size = in_features if self._options.per_channel else self._options.group_size
        group_size = group_size or layout.auto_group_size(in_features)
        if self._recipe.solver is None:
            return solve_uniform(weight, hessians, self.shared_widths, group_size, self._recipe.sliced)
        return solve_shared(
            weight, hessians, self.shared_widths, group_size, self._recipe.solver, bool(self._residual_widths)
        )

    def _train(
        self, block: Block, linears: Mapping[str, Tensor], solved: SolvedBlock, streams: Streams, seed: int
    ) -> None:
        recipe = self._recipe
        if recipe.training is None or streams.float_output is None:
            return
        widths = self.shared_widths
        parts = {
            width: {
                name: TrainedPart(weight.codes_at(width), width, weight.parts[width])
                for name, weight in solved.weights.items()
            }
            for width in widths
        }
        tokens = recipe.training.tokens
        inputs = {width: streams.prefix[width][: recipe.training_sequences, :tokens] for width in widths}
        if recipe.prefix_target:
            with torch.no_grad():
                targets = {width: _forward(block, hidden, linears, solved.vectors) for width, hidden in inputs.items()}
        else:
            targets = dict.fromkeys(widths, streams.float_output[: recipe.training_sequences, :tokens])
        count = len(targets[widths[0]])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count - HELD_OUT, generator=generator).tolist()
        trained, vectors = train_block(
            block,
            parts,
            solved.vectors,
            TrainingData(inputs, targets, order, range(count - HELD_OUT, count)),
            recipe.importance,
            recipe.training,
        )
        solved.vectors = _without_vanished_gains(block, solved.vectors, vectors)
        for name, weight in solved.weights.items():
            learned = {width: sites[name] for width, sites in trained.items()}
            solved.weights[name] = CodedWeight(weight.codes, {**weight.parts, **learned})
            if len(widths) == 1 and widths[0] > layout.NIBBLE_BITS:
                solved.weights[name] = solved.weights[name].with_high_step(widths[0])

    def _solve_residuals(
        self,
        block: Block,
        linears: Mapping[str, Tensor],
        vectors: Vectors,
        solved: SolvedBlock,
        hessians: Mapping[str, Mapping[int, DampedHessian]],
    ) -> dict[str, dict[int, float]]:
        """Add the low nibbles. Where a norm has changed, they make up for that too."""
        attention_norm, mlp_norm = block.norm_names
        losses = {}
        for site, norm in (("qkv", attention_norm), ("o", None), ("gate_up", mlp_norm), ("down", None)):
            weight, matrices = linears[site], hessians[site]
            if norm is not None:
                before, after = vectors[norm], solved.vectors[norm]
                change = torch.where(before == after, 1.0, after / before)
                weight = weight / change
                rescaled: dict[int, DampedHessian] = {
                    id(matrix): matrix.rescaled(change) for matrix in matrices.values()
                }
                matrices = {width: rescaled[id(matrix)] for width, matrix in matrices.items()}
            residual = solve_residual(weight, solved.weights[site], matrices, self._residual_widths)
            solved.weights[site] = residual.weight
            losses[site] = residual.losses
        return losses


def _forward(
    block: Block, hidden: Tensor, linears: Mapping[str, Tensor], vectors: Vectors, tap: Tap | None = None
) -> Tensor:
    """A block over all sequences, some at a time."""
    batch = max(1, _BATCH_TOKENS // hidden.shape[1])
    return torch.cat([block(part, linears, vectors, tap) for part in torch.split(hidden, batch)])


def _without_vanished_gains(block: Block, before: Vectors, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms as trained, but for gains near zero: what they do cannot be made up for by dividing."""
    kept = dict(after)
    for name in block.norm_names:
        old, new = before[name], after[name]
        usable = (old.abs() > _SMALL_GAIN * old.abs().mean()) & (new / old > 0.5) & (new / old < 2)
        kept[name] = torch.where(usable, new, old)
    return kept
