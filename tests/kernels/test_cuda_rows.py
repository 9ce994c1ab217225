"""The GPU's operations on whole rows against the portable ones."""

import pytest
import torch

from anybit.kernels.cuda.activations import rms_norm
from anybit.kernels.cuda.greedy import greedy
from anybit.kernels.portable import greedy as portable_greedy
from anybit.kernels.portable import norm as portable_norm
from tests.fixtures.nested import normal

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4, 64, 576, 4096, 5120, 16384])
def test_norms_are_those_of_pytorch(columns, dtype):
    x, gain = (5 * normal(7, columns)).cuda().to(dtype), normal(columns, seed=1).cuda()
    expected = portable_norm.rms_norm(x.float(), gain, 1e-5)
    got = rms_norm(x, gain, 1e-5)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6)
    assert torch.equal(rms_norm(x[3:4], gain, 1e-5), got[3:4])


@pytest.mark.parametrize("columns", [1, 5, 2048, 2049, 49152, 151936])
def test_the_likeliest_token_is_the_first_of_equals_and_none_where_a_logit_is_not_finite(columns):
    logits = normal(9, columns).round(decimals=1).cuda()
    logits[4, columns // 2] = torch.nan
    logits[6, columns - 1] = -torch.inf
    logits[7, 0] = torch.inf
    logits[8] = -3e38
    assert torch.equal(greedy(logits), portable_greedy.greedy(logits))
