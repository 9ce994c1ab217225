"""The Triton product: interpreted against the oracle, and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from anybit.kernels import layout, reference
from tests.fixtures.nested import normal, random_nested

triton_linear = pytest.importorskip("anybit.kernels.triton.linear")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter computes where there is no GPU")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anybit.kernels.triton.linear import _linear_kernel

for capability in (80, 90):
    for width, group, part in ((2, 32, "*fp16"), (4, 128, "*fp16"), (8, 64, "*fp32")):
        pointers = ["*i8", "*fp32", "*fp32", *["*u8"] * 5, part, part, part, "*fp32"]
        types = [*pointers, "i32", "i32", "i32", "i32", *["constexpr"] * 4]
        constants = {"BIT_WIDTH": width, "GROUP": group, "BLOCK_TOKENS": 16, "BLOCK_ROWS": 32}
        names = _linear_kernel.arg_names
        source = ASTSource(_linear_kernel, dict(zip(names, types, strict=True)), constexprs={
            (names.index(name),): value for name, value in constants.items()
        })
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"].startswith(b"\\x7fELF")
print("compiled")
"""


@interpreted
@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(40, 128, 32), (13, 192, 64), (70, 256, 128)])
def test_products_are_near_the_oracle(rows, columns, group_size, width):
    weight, x = random_nested(rows, columns, group_size), normal(3, columns)
    expected = reference.linear(x, weight, width)
    got = triton_linear.linear(x, weight, width)
    assert (got - expected).norm() < 2e-4 * expected.norm()


@interpreted
def test_a_row_does_not_depend_on_those_beside_it():
    weight, x = random_nested(24, 128, 64), normal(20, 128)
    together = triton_linear.linear(x, weight, 6)
    for row in (0, 15, 16, 19):
        assert torch.equal(triton_linear.linear(x[row : row + 1], weight, 6)[0], together[row])


@interpreted
def test_results_have_the_type_of_the_inputs():
    weight, x = random_nested(16, 64, 32), normal(2, 64).bfloat16()
    assert torch.equal(triton_linear.linear(x, weight, 4), triton_linear.linear(x.float(), weight, 4).bfloat16())


def test_it_compiles_for_ampere_and_hopper_without_a_gpu(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "compiled", result.stderr[-2000:]
