"""What the GPU does to heads before attention, against the rotary embedding and the basis of pages in PyTorch."""

import pytest
import torch

from anybit.kernels.cuda.heads import LayerBases, ProjectedHeads, RowPlaces, rotate_and_store
from anybit.kernels.portable.hadamard import rotation_signs
from anybit.kvcache.codec.balance import PageBasis

pytestmark = pytest.mark.gpu

POSITIONS = 40


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[rows, heads, head_dim], half-split order; angles [rows, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (4, 1, 256)])
def test_rows_of_sealed_formats_are_taken_into_the_basis_of_their_pages(heads, kv_heads, head_dim, balanced):
    generator = torch.Generator().manual_seed(5)
    rows = 12
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator)
    angles = torch.rand(POSITIONS, head_dim // 2, generator=generator) * 6
    weights = torch.rand(kv_heads, head_dim, generator=generator) + 0.5 if balanced else None
    flags = [(True, True), (True, False), (False, False)]
    bases = [PageBasis(head_dim, weights, keys, values) for keys, values in flags]
    formats = torch.tensor([-1, 0, 1, 2] * 3)
    positions = torch.randperm(POSITIONS, generator=generator)[:rows]
    page_ids, offsets = torch.randperm(16, generator=generator)[:rows], torch.randint(64, (rows,), generator=generator)
    keys, values = (torch.zeros(16, kv_heads, 64, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    projected = ProjectedHeads(
        qkv.cuda(),
        RowPlaces(positions.cuda(), page_ids.cuda(), offsets.cuda(), formats.cuda()),
        angles.cos().cuda(),
        angles.sin().cuda(),
        keys,
        values,
        bases=LayerBases(
            rotation_signs(head_dim).cuda(),
            None if weights is None else weights.cuda(),
            tuple(keys for keys, _ in flags),
            tuple(values for _, values in flags),
        ),
    )
    got = rotate_and_store(projected)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    cosines, sines = angles.cos()[positions], angles.sin()[positions]
    q, k = rotated(q, cosines, sines), rotated(k, cosines, sines)
    for row, number in enumerate(formats.tolist()):
        expected = [part[row] for part in (q, k, v)]
        if number >= 0:
            basis = bases[number]
            take = (basis.queries, basis.keys, basis.values)
            expected = [into(part[:, None])[:, 0] for into, part in zip(take, expected, strict=True)]
        stored = [pages[page_ids[row], :, offsets[row]].float().cpu() for pages in (keys, values)]
        torch.testing.assert_close(got[row].cpu(), expected[0], atol=1e-5, rtol=1e-5)
        for part, exact in zip(stored, expected[1:], strict=True):
            torch.testing.assert_close(part, exact, atol=1e-2, rtol=1e-2)
