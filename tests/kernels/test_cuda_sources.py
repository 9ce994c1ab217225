"""CUDA C++ compiles to machine code for Ampere and Hopper; no GPU is needed."""

import pytest
import torch

from anybit.kernels import fallbacks
from anybit.kernels.cuda import compiler
from anybit.kernels.cuda.compiler import CompileError, cached_cubin, can_compile, compile_source
from anybit.kernels.cuda.linear import product_constants
from anybit.kernels.cuda.seal import PairEntries, UniformLevels, seal_constants
from anybit.kernels.cuda.tuning import default_tiling
from anybit.kernels.cuda.warpgroup_linear import batch_constants, values_constants
from anybit.kernels.cuda.warpgroup_tuning import BatchTiling, RingOperands, ValuesTiling
from anybit.kernels.layout import BIT_WIDTHS

pytestmark = pytest.mark.skipif(not can_compile(), reason="NVRTC is packaged for Linux on x86-64 only")
ARCHITECTURES = ["sm_80", "sm_90"]
ELF = b"\x7fELF"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
@pytest.mark.parametrize(
    ("group_size", "token_tiles", "dtype"), [(128, 1, torch.bfloat16), (64, 2, torch.float16), (32, 8, torch.float32)]
)
def test_products_compile(architecture, bit_width, group_size, token_tiles, dtype):
    tiling = default_tiling(4096, 4096, bit_width, token_tiles)
    part_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    constants = product_constants(tiling, bit_width, group_size, part_dtype, dtype, token_tiles)
    assert compile_source("linear_decode", architecture, constants).startswith(ELF)


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
@pytest.mark.parametrize(("group_size", "pass_tiles", "cluster"), [(128, 16, 1), (64, 8, 4), (32, 16, 2)])
def test_products_of_warpgroups_compile(bit_width, group_size, pass_tiles, cluster):
    tiling = BatchTiling(2, cluster, 4, 4)
    operands = RingOperands((bit_width,), group_size, 2, pass_tiles)
    constants = batch_constants(tiling, operands, torch.float16, torch.bfloat16)
    assert compile_source("linear_batch", "sm_90a", constants).startswith(ELF)


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
@pytest.mark.parametrize(
    ("group_size", "pass_tiles", "tiling", "dtype"),
    [
        (128, 16, ValuesTiling(4, 3), torch.bfloat16),
        (64, 8, ValuesTiling(2, 4), torch.float16),
        (32, 32, ValuesTiling(3, 2), torch.bfloat16),
        (128, 2, ValuesTiling(2, 4), torch.bfloat16),
        (64, 4, ValuesTiling(3, 4), torch.bfloat16),
    ],
)
def test_products_of_values_compile(bit_width, group_size, pass_tiles, tiling, dtype):
    constants = values_constants(tiling, RingOperands((bit_width,), group_size, 2, pass_tiles), torch.float16, dtype)
    assert compile_source("linear_values", "sm_90a", constants).startswith(ELF)


@pytest.mark.parametrize("widths", [(2,), (2, 4, 8), (3, 6), (4, 8), BIT_WIDTHS])
@pytest.mark.parametrize(("group_size", "pass_tiles", "dtype"), [(128, 8, torch.bfloat16), (32, 4, torch.float16)])
def test_products_of_values_at_several_widths_compile(widths, group_size, pass_tiles, dtype):
    operands = RingOperands(widths, group_size, 2, pass_tiles, has_sums=True)
    constants = values_constants(ValuesTiling(2, 3), operands, torch.float16, dtype)
    assert compile_source("linear_values", "sm_90a", constants).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("widths", [(2, 3), (2, 4, 8), (4, 6), BIT_WIDTHS])
def test_products_of_several_widths_compile(architecture, widths):
    for token_tiles, group_size in [(1, 128), (8, 64)]:
        tiling = default_tiling(4096, 4096, max(widths), token_tiles)
        constants = product_constants(tiling, max(widths), group_size, torch.float16, torch.bfloat16, token_tiles)
        constants["WIDTHS"] = sum(1 << width for width in widths)
        assert compile_source("linear_decode", architecture, constants).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_compiles(architecture):
    assert compile_source("greedy", architecture, {}).startswith(ELF)
    for group_size, value in [(128, 2), (64, 1), (32, 0)]:
        assert compile_source("activations", architecture, {"GROUP": group_size, "VALUE": value}).startswith(ELF)
        if value:
            for form in (1, 2):
                defines = {"GROUP": group_size, "VALUE": value, "AS_VALUES": form}
                assert compile_source("activations", architecture, defines).startswith(ELF)
        for gate in (1, 2):
            defines = {"GROUP": group_size, "VALUE": value, "GATE": gate}
            assert compile_source("activations", architecture, defines).startswith(ELF)
        for hidden, flag in [(576, 0), (4096, 1), (16384, 1)]:
            defines = {
                "GROUP": group_size,
                "VALUE": value,
                "HIDDEN": hidden,
                "HAS_DELTA": flag,
                "HAS_OUTPUT_NORM": flag,
            }
            assert compile_source("norm", architecture, defines).startswith(ELF)
        for head_dim, page_value in [(64, 2), (256, 0)]:
            for has_bases in (0, 1):
                defines = {
                    "HEAD_DIM": head_dim,
                    "VALUE": value,
                    "PAGE_VALUE": page_value,
                    "HAS_NORM": 1,
                    "HAS_BASES": has_bases,
                }
                assert compile_source("rotate", architecture, defines).startswith(ELF)
        for bit_width in BIT_WIDTHS:
            defines = {"GROUP": group_size, "BITS": bit_width}
            assert compile_source("embedding", architecture, defines).startswith(ELF)
            assert compile_source("dequantize", architecture, defines).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "value", "flag"), [(64, 0, 0), (128, 2, 1), (256, 1, 1)])
def test_attention_compiles(architecture, head_dim, value, flag):
    defines = {"HEAD_DIM": head_dim, "VALUE": value, "HAS_WINDOW": flag, "HAS_SOFTCAP": flag}
    for source in ("attend_rows", "attend_splits", "merge_splits"):
        assert compile_source(source, architecture, defines).startswith(ELF)
    projected = {"STAGED": 1 - flag, "FROM_PROJECTION": 1, "HAS_NORM": flag}
    assert compile_source("attend_splits", architecture, defines | projected).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("key_bits", "value_bits", "clusters"), [(8, 6, 1), (6, 4, 1), (4, 8, 1), (8, 8, 8)])
def test_sealing_compiles(architecture, head_dim, key_bits, value_bits, clusters):
    keys, values = (
        PairEntries(torch.empty(1 << (bits - 1), 2), torch.empty(clusters, 2)) for bits in (key_bits, value_bits)
    )
    assert compile_source("seal", architecture, dict(seal_constants(head_dim, keys, values))).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("head_dim", "keys", "values"),
    [(64, "uniform", "uniform"), (128, "pairs", "uniform"), (256, "uniform", "pairs")],
)
def test_sealing_of_evenly_spaced_levels_compiles(architecture, head_dim, keys, values):
    parts = {"uniform": UniformLevels(), "pairs": PairEntries(torch.empty(8, 2), torch.empty(1, 2))}
    constants = dict(seal_constants(head_dim, parts[keys], parts[values]))
    assert compile_source("seal", architecture, constants).startswith(ELF)


def test_a_source_that_does_not_compile_says_where(monkeypatch, tmp_path):
    (tmp_path / "broken.cu").write_text("int f() { return nothing; }")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    with pytest.raises(CompileError, match=r"broken\.cu.*nothing"):
        compile_source("broken", "sm_90", {})


def test_what_is_compiled_is_kept_until_a_source_changes(monkeypatch, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "small.cu").write_text('extern "C" __global__ void f(int* x) { *x = VALUE; }')
    monkeypatch.setattr(compiler, "SOURCES", source)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    first = cached_cubin("small", "sm_90", {"VALUE": 1})
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"kept")
    assert cached_cubin("small", "sm_90", {"VALUE": 1}) == b"kept"
    assert cached_cubin("small", "sm_90", {"VALUE": 2}) not in (b"kept", first)
    (source / "small.cu").write_text('extern "C" __global__ void f(int* x) { *x = 2 * VALUE; }')
    assert cached_cubin("small", "sm_90", {"VALUE": 1}) not in (b"kept", first)


def test_a_cache_that_cannot_be_written_is_counted_and_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file"))
    before = fallbacks.snapshot()
    assert cached_cubin("activations", "sm_90", {"GROUP": 64}).startswith(ELF)
    (added,) = fallbacks.snapshot().keys() - before.keys()
    assert added.startswith("kernel_cache:")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("head_dim", "key_bits", "value_bits", "tile_heads"),
    [
        (64, 8, 8, 4),
        (128, 6, 6, 8),
        (128, 4, 4, 4),
        (128, 8, 4, 8),
        (256, 8, 8, 4),
        (64, 16, 4, 8),
        (128, 16, 16, 4),
        (256, 6, 16, 8),
    ],
)
def test_attention_over_sealed_pages_compiles(architecture, head_dim, key_bits, value_bits, tile_heads):
    """Codes of 16 bits are two evenly spaced levels."""
    defines = {"HEAD_DIM": head_dim, "KEY_BITS": key_bits, "VALUE_BITS": value_bits, "VALUE": 2}
    defines |= {"HAS_WINDOW": 1, "HAS_SOFTCAP": 1, "TILE_HEADS": tile_heads}
    for source in ("attend_sealed_pages", "attend_sealed_splits", "attend_sealed_rows"):
        assert compile_source(source, architecture, defines).startswith(ELF)
    projected = {"FROM_PROJECTION": 1, "HAS_BASES": 1}
    assert compile_source("attend_sealed_pages", architecture, defines | projected).startswith(ELF)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "together"), [(64, 8), (128, 32), (256, 16)])
def test_merging_splits_of_sealed_pages_compiles(architecture, head_dim, together):
    defines = {"HEAD_DIM": head_dim, "VALUE": 2, "MERGED_TOGETHER": together}
    assert compile_source("merge_sealed", architecture, defines).startswith(ELF)
