"""The grid finds what a search of all entries finds, whichever the entries and wherever the points."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.kvcache.codec.nearest_grid import NearestGrid


@given(st.integers(0, 2**31), st.integers(1, 200), st.sampled_from((0.01, 1.0, 3.0, 30.0)))
def test_grid_finds_the_nearest(seed: int, num_entries: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(num_entries, 2, generator=generator)
    points = torch.cat((entries, torch.randn(300, 2, generator=generator) * spread, torch.tensor([[4.0, -4.0]])))
    found = NearestGrid(entries).search(points)
    distances = (points[:, None] - entries).square().sum(2)
    assert torch.allclose(distances.gather(1, found[:, None])[:, 0], distances.amin(1), rtol=1e-4, atol=1e-4)
