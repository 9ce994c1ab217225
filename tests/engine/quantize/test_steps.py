"""Integer and float steps of the solvers against their definitions."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.quantize.solve.affine import initial_solution, refit
from anybit.engine.quantize.solve.methods import solve_decoupleq, solve_gptq, solve_joint
from anybit.engine.quantize.solve.problem import proxy_loss
from anybit.engine.quantize.solve.relaxation import relax, relaxed_pass
from anybit.engine.quantize.solve.side_by_side import each_part
from anybit.engine.quantize.solve.sweep import descent_pass, gptq_pass
from tests.engine.quantize.problems import GROUP, INPUTS, ROWS, nested_problem


def weighted_loss(problem, solution) -> float:
    return float(torch.tensor(problem.importance, dtype=torch.float64) @ proxy_loss(problem, solution).sum(1))


def plain_gptq(problem, solution) -> torch.Tensor:
    """GPTQ of one width as published: column by column, no blocks."""
    weight = problem.targets[0].double().clone()
    factor = problem.hessians[0].inverse_factor
    codes = torch.zeros(ROWS, INPUTS)
    for column in range(INPUTS):
        group = column // problem.group_size
        scale, zero = solution.scale[0, :, group].double(), solution.zero[0, :, group].double()
        code = ((weight[:, column] - zero) / scale).round().clamp(0, (1 << problem.code_bits) - 1)
        codes[:, column] = code
        error = (weight[:, column] - (code * scale + zero)) / factor[column, column]
        weight[:, column:] -= error[:, None] * factor[column, column:]
    return codes


@pytest.mark.parametrize("width", [2, 3, 4])
def test_gptq_of_one_width_is_the_published_one(width):
    problem = nested_problem((width,))
    solution = initial_solution(problem)
    expected = plain_gptq(problem, solution)
    before = weighted_loss(problem, solution)
    gptq_pass(problem, solution)
    assert (solution.codes.float() != expected).double().mean() < 0.01  # ties and rounding
    assert weighted_loss(problem, solution) < before


@pytest.mark.parametrize("seed", range(3))
def test_grid_that_leaves_a_remainder_to_be_coded_is_clipped_less(seed):
    problem = nested_problem((2, 3, 4), seed=seed)
    problem = replace(problem, targets=problem.targets**3)  # with outliers worth clipping

    def ranges(remainder_importance: float) -> torch.Tensor:
        """Of what 4 bits leave over: [out, groups]."""
        solution = initial_solution(replace(problem, remainder_importance=remainder_importance))
        low, high = (problem.targets[-1] - solution.read_width(problem, -1)).view(ROWS, -1, GROUP).aminmax(dim=2)
        return high - low

    # The more a term of a sum counts, the smaller it is where the sum is least.
    assert (ranges(100.0) <= ranges(0.0)).all()
    assert ranges(100.0).mean() < ranges(0.0).mean()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), widths=st.sampled_from([(2,), (4,), (2, 3, 4), (2, 4)]))
def test_descent_never_raises_the_loss(seed, widths):
    problem = nested_problem(widths, seed=seed)
    solution = initial_solution(problem)
    losses = [weighted_loss(problem, solution)]
    for refitted in (False, True, True):
        descent_pass(problem, solution, refit=refitted)
        losses.append(weighted_loss(problem, solution))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_descent_passes_end_where_no_single_code_can_be_bettered():
    problem = nested_problem((3,))
    solution = initial_solution(problem)
    for _ in range(60):
        before = solution.codes.clone()
        descent_pass(problem, solution, refit=False)
        if torch.equal(before, solution.codes):
            break
    best = proxy_loss(problem, solution)[0]
    for column in (0, 17, 63):
        for change in (-1, 1):
            other = solution.clone()
            other.codes[:, column] = (other.codes[:, column].int() + change).clamp(0, 7).to(torch.uint8)
            assert (proxy_loss(problem, other)[0] >= best - 1e-3).all()


def test_the_closed_form_is_where_the_gradient_vanishes():
    problem = nested_problem((2, 4))
    solution = solve_gptq(problem)
    before = proxy_loss(problem, solution)
    refit(problem, solution)
    assert (proxy_loss(problem, solution) <= before).all()
    for index, width in enumerate(problem.bit_widths):
        scale = solution.scale[index].double().requires_grad_()
        zero = solution.zero[index].double().requires_grad_()
        levels = (solution.codes >> (4 - width)).view(ROWS, -1, problem.group_size).double()
        read = (levels * scale[:, :, None] + zero[:, :, None]).view(ROWS, -1)
        error = problem.targets[index].double() - read
        loss = ((error @ problem.hessians[index].matrix) * error).sum()
        gradients = torch.autograd.grad(loss, (scale, zero))
        targets = problem.targets[index].double()
        energy = ((targets @ problem.hessians[index].matrix) * targets).sum()
        assert all(gradient.abs().max() < 1e-3 * energy for gradient in gradients)


@pytest.mark.parametrize("step", [gptq_pass, relaxed_pass], ids=["gptq", "projected gradients"])
@pytest.mark.parametrize("widths", [(2,), (3,), (2, 3, 4)])
def test_decoupleq_is_monotone_and_better_than_gptq(widths, step):
    problem = nested_problem(widths)
    trace: list[float] = []
    solution = solve_decoupleq(problem, integer_step=step, trace=trace)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(trace))
    assert trace[-1] == pytest.approx(weighted_loss(problem, solution))
    assert trace[-1] < weighted_loss(problem, solve_gptq(problem))


def test_the_relaxed_solution_stays_in_the_box_and_is_better_than_clamping():
    problem = nested_problem((2,))
    solution = initial_solution(problem)
    relaxed = relax(problem, solution)
    low = solution.zero.repeat_interleave(problem.group_size, 2)
    high = low + 3 * solution.scale.repeat_interleave(problem.group_size, 2)
    assert ((relaxed >= low - 1e-5) & (relaxed <= high + 1e-5)).all()

    def loss(values):
        error = (values - problem.targets).double()
        return float(((error @ problem.hessians[0].matrix) * error).sum())

    assert loss(relaxed) < loss(problem.targets.clamp(low, high))


def test_joint_descent_serves_every_width_better_than_rounding():
    problem = nested_problem((2, 3, 4))
    rounded = proxy_loss(problem, initial_solution(problem)).sum(1)
    joint = proxy_loss(problem, solve_joint(problem)).sum(1)
    assert (joint < rounded).all()


def test_importance_moves_quality_between_the_widths():
    problem = nested_problem((2, 4))
    losses = {}
    for favoured in (1.0, 100.0):
        importance = (favoured, problem.importance[1])
        losses[favoured] = proxy_loss(problem, solve_joint(replace(problem, importance=importance))).sum(1)
    assert losses[100.0][0] < losses[1.0][0]
    assert losses[100.0][1] > losses[1.0][1]


def test_a_row_of_zeros_and_one_of_equal_weights_are_kept_exactly():
    problem = nested_problem((2, 3, 4))
    targets = problem.targets.clone()
    targets[:, 0], targets[:, 1] = 0, 0.5
    problem = replace(problem, targets=targets)
    read = solve_joint(problem).read(problem)
    assert (read[:, 0]).abs().max() < 1e-5
    assert (read[:, 1] - 0.5).abs().max() < 1e-4


def test_one_group_per_row_takes_the_same_way():
    problem = nested_problem((2,), group_size=INPUTS)
    trace: list[float] = []
    solution = solve_decoupleq(problem, trace=trace)
    assert solution.scale.shape == (1, ROWS, 1)
    assert trace[-1] < trace[0]


@pytest.mark.parametrize("rows", [65, 200])
def test_threads_with_rows_of_their_own_find_what_one_finds(rows):
    problem = nested_problem()
    weight = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(3))
    problem = replace(problem, targets=weight.expand(3, *weight.shape))
    before = torch.get_num_threads()
    solutions = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            solutions.append(solve_joint(problem))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for solution in solutions[1:]:
        assert torch.equal(solution.codes, solutions[0].codes)
        assert torch.equal(solution.scale, solutions[0].scale)
        assert torch.equal(solution.zero, solutions[0].zero)


def test_parts_are_all_rows_once_in_their_order():
    problem = replace(nested_problem(), targets=torch.zeros(3, 1001, INPUTS))
    rows = [row for part in each_part(problem, lambda part: range(*part.indices(1001))) for row in part]
    assert rows == list(range(1001))
