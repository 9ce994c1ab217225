"""The small layers: right by definition, and the same bits for a row in any company."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.layers.embedding import DenseVocabulary
from anybit.engine.layers.linear import DenseLinear, NestedLinear
from anybit.engine.layers.mlp import GatedMLP
from anybit.engine.layers.norm import RMSNorm
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.models.registry import parse_config
from anybit.kernels import dispatch
from anybit.kernels.reference import dequantize
from tests.fixtures.nested import normal, random_nested
from tests.fixtures.tiny_llama import tiny_config

quick = settings(max_examples=25, deadline=None)
some_rows = st.lists(st.integers(0, 69), min_size=1, max_size=9)


def test_rms_norm_follows_its_formula():
    x, weight = normal(5, 48), normal(48, seed=1)
    mean = x.double().square().mean(1, keepdim=True)
    expected = x.double() / (mean + 1e-3).sqrt() * weight.double()
    assert torch.allclose(RMSNorm(weight, 1e-3)(x).double(), expected, rtol=1e-6, atol=1e-7)


def test_rms_norm_computes_in_float32_whatever_comes_in():
    x, norm = normal(3, 64).bfloat16(), RMSNorm(normal(64, seed=1), 1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@quick
@given(st.sampled_from((40, 48, 64, 576, 2048)), some_rows)
def test_rms_norm_gives_a_row_the_same_bits_in_any_batch(hidden, rows):
    x, norm = normal(70, hidden), RMSNorm(normal(hidden, seed=1), 1e-5)
    assert torch.equal(norm(x[rows]), norm(x)[rows])


def dense_mlp(activation, hidden=24, inner=40):
    gate_up, down = DenseLinear(normal(2 * inner, hidden, seed=1)), DenseLinear(normal(hidden, inner, seed=2))
    return GatedMLP(gate_up, down, dispatch.ACTIVATIONS[activation])


@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", partial(torch.nn.functional.gelu, approximate="tanh"))],
)
def test_gated_mlp_follows_its_formula(activation, function):
    mlp, x = dense_mlp(activation), normal(7, 24)
    gate, up = (x @ mlp.gate_up.weight.T).chunk(2, dim=1)
    expected = (function(gate) * up) @ mlp.down.weight.T
    assert torch.allclose(mlp(x, [(4, 0, 7)]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", dispatch.ACTIVATIONS)
def test_gated_mlp_stays_finite_for_large_inputs(activation):
    mlp = GatedMLP(DenseLinear(torch.eye(2).repeat(2, 1)), DenseLinear(torch.eye(2)), dispatch.ACTIVATIONS[activation])
    assert mlp(torch.tensor([[500.0, -500.0]]), [(4, 0, 1)]).tolist() == [[250_000.0, 0.0]]


@quick
@given(st.sampled_from(((32, 40), (64, 96), (96, 72))), some_rows)
def test_gated_mlp_gives_a_row_the_same_bits_in_any_batch(shape, rows):
    hidden, inner = shape
    inner = -(-inner // 32) * 32
    mlp = GatedMLP(
        NestedLinear(random_nested(2 * inner, hidden, 32)),
        NestedLinear(random_nested(hidden, inner, 32, seed=1)),
        dispatch.ACTIVATIONS["silu"],
    )
    x = normal(70, hidden)
    assert torch.equal(mlp(x[rows], [(4, 0, len(rows))]), mlp(x, [(4, 0, 70)])[rows])


@quick
@given(st.integers(1, 40), some_rows, st.sampled_from(sorted(dispatch.ACTIVATIONS)))
def test_gate_gives_a_row_the_same_bits_whatever_its_length(size, rows, activation):
    """Rows that fill no whole vector register, with projections that could not tell rows apart."""
    mlp = GatedMLP(lambda x, _: torch.cat((x, 3 * x), 1), lambda x, _: x, dispatch.ACTIVATIONS[activation])
    x = normal(70, size)
    assert torch.equal(mlp(x[rows], []), mlp(x, [])[rows])


def rotary(**overrides):
    config = parse_config(tiny_config(**overrides).to_dict())
    return RotaryEmbedding(config.layers[0].rope, config.head_dim, 100)


def test_rotary_turns_each_pair_by_its_angle():
    x, positions = normal(4, 2, 16).double(), torch.tensor([0, 1, 7, 99])
    frequencies = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(4, 8, dtype=torch.float64), positions[:, None] * frequencies)
    turned = torch.complex(x[..., :8], x[..., 8:]) * turn[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(rotary().rotate(x.float(), positions).double(), expected, atol=1e-5)


def test_rotary_leaves_position_zero_alone_and_keeps_lengths():
    x = normal(3, 2, 16)
    turned = rotary().rotate(x, torch.tensor([0, 5, 50]))
    assert torch.equal(turned[0], x[0])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_only():
    q, k, turn = normal(1, 1, 16), normal(1, 1, 16, seed=1), rotary()
    scores = [
        (turn.rotate(q, torch.tensor([start + 9])) * turn.rotate(k, torch.tensor([start]))).sum()
        for start in (0, 30, 80)
    ]
    assert torch.allclose(torch.stack(scores), scores[0].expand(3), atol=1e-4)


def test_rotary_stretches_positions_by_a_linear_factor():
    scaled = rotary(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0})
    x = normal(1, 2, 16)
    assert torch.allclose(scaled.rotate(x, torch.tensor([40])), rotary().rotate(x, torch.tensor([10])), atol=1e-5)


@quick
@given(some_rows)
def test_rotary_gives_a_row_the_same_bits_in_any_batch(rows):
    x, positions, turn = normal(70, 3, 16), torch.arange(70), rotary()
    assert torch.equal(turn.rotate(x[rows], positions[rows]), turn.rotate(x, positions)[rows])


def test_nested_linear_adds_its_bias():
    weight, bias, x = random_nested(16, 64, 32), normal(16, seed=1), normal(3, 64)
    plain = NestedLinear(weight)(x, [(4, 0, 3)])
    assert torch.equal(NestedLinear(weight, bias)(x, [(4, 0, 3)]), plain + bias)
    assert torch.allclose(plain, x @ dequantize(weight, 4).T, atol=1e-2)


@pytest.mark.parametrize("segments", [[(2, 0, 3)], [(2, 0, 1), (8, 1, 3)]])
def test_dense_layers_know_no_width(segments):
    weight, bias, x = normal(16, 64), normal(16, seed=1), normal(3, 64)
    assert torch.allclose(DenseLinear(weight, bias)(x, segments), x @ weight.T + bias, atol=1e-5)
    table = DenseVocabulary(weight)
    assert torch.equal(table.embed(torch.tensor([3, 0])), weight[[3, 0]])
    assert torch.allclose(table.logits(x), x @ weight.T, atol=1e-5)
