"""The basis of pages: products of queries and keys are kept, and errors lie where queries do not look."""

import pytest
import torch

from anybit.kernels.portable.hadamard import rotate, rotation_signs, unrotate
from anybit.kvcache.codec.balance import BalanceMoments, PageBasis, balance_weights
from anybit.kvcache.codec.pages import PairCodec
from anybit.kvcache.codec.universal import universal_table


@pytest.mark.parametrize("size", [2, 64, 128, 256])
def test_a_rotation_keeps_lengths_and_is_undone(size: int) -> None:
    x, signs = torch.randn(5, size), rotation_signs(size)
    assert torch.allclose(rotate(x, signs).norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unrotate(rotate(x, signs), signs), x, atol=1e-5)
    assert not torch.allclose(rotate(x, signs), x, atol=0.1)
    assert torch.equal(signs, rotation_signs(size))


def test_sizes_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="not 80"):
        rotate(torch.zeros(80), rotation_signs(80))


def uneven(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of 4 and 2 heads, as in a model with biases: some channels are huge in one and small in the other."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=generator)]
    keys = torch.randn(2, 2, 256, 64, generator=generator) * sizes + 5 * sizes
    queries = torch.randn(2, 4, 256, 64, generator=generator) / sizes**2
    return queries, keys


def test_weights_of_texts_in_parts_are_those_of_all_together() -> None:
    parts = [uneven(seed) for seed in range(3)]
    moments = BalanceMoments()
    for queries, keys in parts:
        moments.add(queries, keys)
    queries, keys = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert torch.allclose(moments.weights(), balance_weights(queries, keys), rtol=1e-6)
    assert not torch.allclose(moments.weights(), balance_weights(*parts[0]), rtol=1e-2)


def test_weights_need_a_page() -> None:
    with pytest.raises(ValueError, match="64 tokens at least, not 63"):
        balance_weights(torch.zeros(1, 2, 63, 8), torch.zeros(1, 2, 63, 8))
    with pytest.raises(ValueError, match="need a text"):
        BalanceMoments().weights()


def test_products_are_kept() -> None:
    queries, keys = uneven(0)
    basis = PageBasis(64, balance_weights(queries, keys))
    wanted = queries.unflatten(1, (2, 2)) @ keys[:, :, None].transpose(-1, -2)
    found = basis.queries(queries).unflatten(1, (2, 2)) @ basis.keys(keys)[:, :, None].transpose(-1, -2)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))
    assert torch.allclose(basis.restored_keys(basis.keys(keys)), keys, atol=1e-3)
    assert torch.allclose(basis.restored_values(basis.values(keys)), keys, atol=1e-3)


def test_balanced_keys_disturb_products_less() -> None:
    queries, keys = uneven(1)
    codec = PairCodec(universal_table(8), has_mean=True)

    def noise(weights: torch.Tensor | None) -> float:
        basis = PageBasis(64, weights)
        kept = basis.keys(keys).unflatten(2, (-1, 64))
        error = (codec.decode(codec.encode(kept)) - kept).flatten(2, 3)
        rotated = basis.queries(queries).unflatten(1, (2, 2))
        return float((rotated @ error[:, :, None].transpose(-1, -2)).square().mean())

    weights = balance_weights(*uneven(2))
    assert weights.shape == (2, 64)
    assert torch.allclose(weights.log().mean(1), torch.zeros(2), atol=1e-5)
    assert noise(balance_weights(queries, keys)) < 0.1 * noise(None)


def test_a_channel_that_is_never_used_gets_a_finite_weight() -> None:
    queries, keys = uneven(3)
    queries[..., 3], keys[..., 5] = 0, 0
    assert bool(torch.isfinite(balance_weights(queries, keys)).all())
    with pytest.raises(ValueError, match="page of 64 tokens"):
        balance_weights(queries[:, :, :10], keys[:, :, :10])
