"""Training of float parts: gradients, progress, and going back."""

import pytest
import torch

from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.block import SITES, Block, load_linears, load_vectors
from anybit.engine.quantize.solve.affine import initial_solution
from anybit.engine.quantize.solve.coded import CodedWeight, FloatPart
from anybit.engine.quantize.solve.end_to_end import (
    Distillation,
    EndToEndOptions,
    QuantizedBlock,
    distribution_gradient,
    train_end_to_end,
)
from anybit.engine.quantize.solve.trained import TrainedPart
from anybit.engine.quantize.solve.training import TrainingData, TrainingOptions, block_loss, train_block
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from tests.engine.quantize.problems import nested_problem

CPU = torch.device("cpu")


def rounded(weight: torch.Tensor, bit_width: int, group_size: int = 32) -> CodedWeight:
    low, high = weight.view(weight.shape[0], -1, group_size).aminmax(dim=2)
    scale = (high - low) / (2**bit_width - 1)
    codes = ((weight.view(*scale.shape, -1) - low[:, :, None]) / scale[:, :, None]).round().to(torch.uint8)
    return CodedWeight(codes.view(weight.shape) << (8 - bit_width), {bit_width: FloatPart(scale, low)})


@pytest.fixture
def block_of_tiny_llama(tiny_source):
    source = HuggingFaceSource(tiny_source)
    config = parse_config(source.config)
    block = Block(config, 0, RotaryEmbedding(config.layers[0].rope, config.head_dim, 64))
    return block, load_linears(source, 0, CPU), load_vectors(source, config, 0, CPU)


def parts_of(linears, widths):
    coded = {width: {name: rounded(weight, width) for name, weight in linears.items()} for width in widths}
    return {
        width: {
            name: TrainedPart(weight.codes_at(width), width, weight.parts[width]) for name, weight in weights.items()
        }
        for width, weights in coded.items()
    }


def test_the_gradient_is_that_of_the_formula():
    problem = nested_problem((3,))
    solution = initial_solution(problem)
    start = FloatPart(solution.scale[0], solution.zero[0])
    trained = TrainedPart(solution.codes, 3, start)
    assert torch.allclose(trained.weight(), solution.read_width(problem, 0), atol=1e-5)
    direction = torch.randn_like(problem.targets[0])
    (trained.weight() * direction).sum().backward()
    codes = solution.codes.view(*start.scale.shape, -1).float()
    scale_change, middle_change = (torch.zeros_like(start.scale, requires_grad=True) for _ in range(2))
    scale = start.scale * (1 + scale_change)
    middle = start.zero + 3.5 * start.scale + start.scale.abs() * middle_change
    plain = (codes - 3.5) * scale[:, :, None] + middle[:, :, None]
    (plain.flatten(1) * direction).sum().backward()
    for ours, theirs in zip(trained.changes, (scale_change, middle_change), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    part = trained.part()
    assert torch.allclose(part.scale, start.scale)
    assert torch.allclose(part.zero, start.zero, atol=1e-6)


def test_training_brings_every_width_nearer_to_the_float_block(block_of_tiny_llama):
    block, linears, vectors = block_of_tiny_llama
    hidden = torch.randn(8, 32, 64)
    target = block(hidden, linears, vectors)
    parts = parts_of(linears, (2, 4))

    def losses(parts_by_width, norms):
        return {
            width: block_loss(block(hidden, {n: p.weight() for n, p in sites.items()}, norms), target).item()
            for width, sites in parts_by_width.items()
        }

    before = losses(parts, vectors)
    trained, norms = train_block(
        block,
        parts,
        vectors,
        TrainingData(dict.fromkeys(parts, hidden), dict.fromkeys(parts, target), range(6), range(6, 8)),
        {2: 1.0, 4: 1.0},
        TrainingOptions(steps=20, tokens=32),
    )
    after = losses(parts, norms)
    assert all(after[width] < before[width] for width in parts)
    assert {width: set(sites) for width, sites in trained.items()} == {
        width: {site.name for site in SITES} for width in parts
    }
    assert any(not torch.equal(norms[name], vectors[name]) for name in block.norm_names)


def test_training_that_makes_held_out_sequences_worse_is_taken_back(block_of_tiny_llama):
    block, linears, vectors = block_of_tiny_llama
    hidden = torch.randn(4, 32, 64)
    target = block(hidden, linears, vectors)
    parts = parts_of(linears, (4,))
    starts = {name: part.part() for name, part in parts[4].items()}
    trained, norms = train_block(
        block,
        parts,
        vectors,
        TrainingData({4: hidden}, {4: target}, range(2), range(2, 4)),
        {4: 1.0},
        TrainingOptions(steps=3, tokens=32, learning_rate=50.0),
    )
    assert all(torch.equal(trained[4][name].scale, start.scale) for name, start in starts.items())
    assert all(torch.equal(norms[name], vectors[name]) for name in vectors)


@pytest.mark.parametrize("recompute", [False, True])
def test_end_to_end_training_brings_the_distribution_nearer(block_of_tiny_llama, recompute):
    block, linears, vectors = block_of_tiny_llama
    hidden = torch.randn(6, 24, 64)
    table = torch.randn(50, 64) * 0.3
    coded = {name: rounded(weight, 3) for name, weight in linears.items()}
    targets = block(block(hidden, linears, vectors), linears, vectors).detach()

    def quantized(parts):
        codes = {name: weight.codes_at(3) for name, weight in coded.items()}
        return [QuantizedBlock(block, vectors, codes, sites) for sites in parts]

    def divergence(blocks):
        states = hidden
        for entry in blocks:
            weights = {name: CodedWeight(coded[name].codes, {3: part}).read(3) for name, part in entry.parts.items()}
            states = entry.block(states, weights, entry.vectors)
        wanted = torch.log_softmax(targets @ table.T, -1)
        return float((wanted.exp() * (wanted - torch.log_softmax(states @ table.T, -1))).sum(-1).mean())

    started = [{name: weight.parts[3] for name, weight in coded.items()} for _ in range(2)]
    steps = []
    trained = train_end_to_end(
        quantized(started),
        3,
        Distillation(hidden, targets, lambda states: states @ table.T, range(6)),
        EndToEndOptions(steps=12),
        recompute,
        steps.append,
    )
    assert divergence(quantized(trained)) < divergence(quantized(started))
    assert steps == list(range(1, 13))


def test_zeros_alone_can_be_trained(block_of_tiny_llama):
    block, linears, vectors = block_of_tiny_llama
    hidden = torch.randn(2, 16, 64)
    coded = {name: rounded(weight, 4) for name, weight in linears.items()}
    start = {name: weight.parts[4] for name, weight in coded.items()}
    codes = {name: weight.codes_at(4) for name, weight in coded.items()}
    (trained,) = train_end_to_end(
        [QuantizedBlock(block, vectors, codes, start)],
        4,
        Distillation(hidden, block(hidden, linears, vectors).detach(), lambda states: states, range(2)),
        EndToEndOptions(2, train_scales=False),
        recompute=False,
    )
    assert all(torch.equal(trained[name].scale, start[name].scale) for name in start)
    assert any(not torch.equal(trained[name].zero, start[name].zero) for name in start)


def test_gradient_towards_a_distribution_is_that_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 16, dtype=torch.float64, generator=generator)
    hidden, targets = torch.randn(2, 3, 101, 16, dtype=torch.float64, generator=generator)
    hidden.requires_grad_()

    gradient = distribution_gradient(hidden, targets, lambda x: x @ table.T)

    expected = torch.log_softmax(targets @ table.T, -1)
    divergence = (expected.exp() * (expected - torch.log_softmax(hidden @ table.T, -1))).sum(-1).mean()
    (wanted,) = torch.autograd.grad(divergence, hidden)
    torch.testing.assert_close(gradient, wanted)
