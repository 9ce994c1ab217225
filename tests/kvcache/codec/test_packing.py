"""Codes as bytes: what is packed comes back, in exactly the bits that codes have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.kvcache.codec.packing import CODE_SIZES, pack_codes, unpack_codes


@given(st.sampled_from(CODE_SIZES), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_codes_come_back(bits: int, eights: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, 8 * eights), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, bits * eights)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_the_first_code_has_a_bytes_lowest_bits() -> None:
    assert pack_codes(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).tolist() == [33, 67, 101, 135]
    # Six bits: the high four of each code, then the low two.
    codes = torch.tensor([0b111101, 0, 0, 0, 0, 0, 0, 0b000110], dtype=torch.uint8)
    assert pack_codes(codes, 6).tolist() == [0b1111, 0, 0, 0b00010000, 0b01, 0b10000000]


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 3, 4, 6, 8 bits, not 5"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), 5)
