"""All layers of a decoder in one native call: norms, linears, rotation, KV write, attention and feed-forward blocks.

One call per step leaves Python nothing to do between layers. The arithmetic is that of native/layer_kernel.h: sums go along
a row in a fixed order, attention page by page, so a row's result depends on that row and its width alone.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anybit.kernels.cpu.bindings import Segment, Weight, native_library
from anybit.kernels.cpu.packed import PackedWeight
from anybit.kernels.cpu.sealed_pages import DescribedSealedPages, StackSealedPages

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_LANES = 16
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class StackShape:
    """What all layers share; `softcap` of attention scores, None for none."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    attention_scale: float
    softcap: float | None

    @property
    def is_supported(self) -> bool:
        """Whether rows and heads are whole vectors."""
        sizes = (self.hidden_size, self.intermediate_size, self.head_dim)
        return all(size % _LANES == 0 for size in sizes) and self.head_dim <= _MAX_HEAD_DIM


@dataclass(frozen=True, slots=True)
class StackLinear:
    weight: PackedWeight
    bias: Tensor | None = None  # float32 [out]


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer; norm weights float32 [hidden_size] or, of queries and keys, [head_dim]; None where there is no such norm.

    qkv has num_heads + 2·num_kv_heads heads of outputs, gate_up twice the intermediate size.
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    attention_output_norm: Tensor | None
    mlp_output_norm: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    cosines: Tensor  # float32 [positions, head_dim / 2]
    sines: Tensor
    qkv: StackLinear
    output: StackLinear
    gate_up: StackLinear
    down: StackLinear
    window: int | None  # a query sees this many tokens, itself included


@dataclass(frozen=True, slots=True)
class StackPages:
    """Exact pages of one layer, [pages, kv_heads, 64, head_dim], bfloat16 or float32; and its sealed ones, by format."""

    keys: Tensor
    values: Tensor
    sealed: Sequence[StackSealedPages] = ()


@dataclass(frozen=True, slots=True)
class StackGroup:
    """Sequences with the same number of new tokens: int64 [seqs, tokens] rows, int64 [seqs, max_pages] pages.

    Of the sealed format number `sealed`, a sequence's new tokens lie in one page, which is exact, and pages before it are
    sealed; `first_pages` int64 [seqs] are those with the first tokens.
    """

    row_ids: Tensor
    block_tables: Tensor
    sealed: int = -1
    first_pages: Tensor | None = None


class _Linear(ctypes.Structure):
    _fields_ = [("weight", ctypes.POINTER(Weight)), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("attention_output_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp_output_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("qkv", _Linear),
        ("output", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Pages(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("number_bytes", ctypes.c_int64),
        ("sealed", ctypes.c_void_p),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        ("num_seqs", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("max_pages", ctypes.c_int64),
        ("row_ids", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("sealed", ctypes.c_int64),
        ("first_pages", ctypes.c_void_p),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("page_ids", ctypes.c_void_p),
        ("page_offsets", ctypes.c_void_p),
        ("row_formats", ctypes.c_void_p),
        ("segments", ctypes.POINTER(Segment)),
        ("num_segments", ctypes.c_int64),
        ("groups", ctypes.POINTER(_Group)),
        ("num_groups", ctypes.c_int64),
    ]


class _Seals(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("exact_pages", ctypes.c_void_p),
        ("sealed_pages", ctypes.c_void_p),
        ("sealed", ctypes.c_int64),
    ]


class DescribedPages:
    """Addresses of all layers' pages; keeps the sealed ones' memory alive."""

    def __init__(self, pages: Sequence[StackPages]) -> None:
        self._alive = [DescribedSealedPages(layer.sealed) for layer in pages]
        self.layers = (_Pages * len(pages))(
            *(
                _Pages(layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.itemsize, sealed.address)
                for layer, sealed in zip(pages, self._alive, strict=True)
            )
        )


class LayerStack:
    """Addresses of a decoder's layers, gathered once; keeps their memory alive."""

    def __init__(self, shape: StackShape, layers: Sequence[StackLayer]) -> None:
        native = native_library()
        if native is None:
            raise RuntimeError("The native CPU kernels were not built.")
        self._native = native
        self._shape = shape
        self._layers = tuple(layers)
        self._descriptors = (_Layer * len(layers))(*(_describe(layer) for layer in layers))
        self._model = _Model(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            len(layers),
            ACTIVATIONS[shape.activation],
            shape.norm_eps,
            shape.attention_scale,
            shape.softcap or 0.0,
            self._descriptors,
        )

    def describe_pages(self, pages: Sequence[StackPages]) -> "DescribedPages":
        """The pages of all layers, as `run` wants them; good as long as the exact ones' memory lives."""
        return DescribedPages(pages)

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        page_ids: Tensor,
        page_offsets: Tensor,
        segments: Sequence[tuple[int, int, int]],
        groups: Sequence[StackGroup],
        pages: "DescribedPages",
        row_formats: Tensor | None = None,
    ) -> Tensor:
        """float32 [rows, hidden_size] through all layers, in place; the rows' keys and values are written to their pages.

        positions, page_ids, page_offsets int64 [rows]; segments (bit_width, start, stop) and groups cover all rows;
        row_formats int64 [rows] are their groups' `sealed`, None where all are exact.
        """
        described = [
            _Group(
                *group.row_ids.shape,
                group.block_tables.shape[1],
                group.row_ids.data_ptr(),
                group.block_tables.data_ptr(),
                group.sealed,
                _address(group.first_pages),
            )
            for group in groups
        ]
        batch = _Batch(
            hidden.shape[0],
            positions.data_ptr(),
            page_ids.data_ptr(),
            page_offsets.data_ptr(),
            _address(row_formats),
            (Segment * len(segments))(*(Segment(*segment) for segment in segments)),
            len(segments),
            (_Group * len(described))(*described),
            len(described),
        )
        self._native.anybit_stack(ctypes.byref(self._model), ctypes.byref(batch), pages.layers, hidden.data_ptr())
        return hidden

    def seal(self, exact_pages: Tensor, sealed_pages: Tensor, sealed: int, pages: "DescribedPages") -> None:
        """Encode exact pages int64 [pages] of all layers to sealed ones of format number `sealed`."""
        seals = _Seals(len(exact_pages), exact_pages.data_ptr(), sealed_pages.data_ptr(), sealed)
        self._native.anybit_seal(ctypes.byref(self._model), pages.layers, ctypes.byref(seals))


def _describe(layer: StackLayer) -> _Layer:
    return _Layer(
        _address(layer.attention_norm),
        _address(layer.attention_output_norm),
        _address(layer.mlp_norm),
        _address(layer.mlp_output_norm),
        _address(layer.query_norm),
        _address(layer.key_norm),
        _address(layer.cosines),
        _address(layer.sines),
        _linear(layer.qkv),
        _linear(layer.output),
        _linear(layer.gate_up),
        _linear(layer.down),
        layer.window or 0,
    )


def _linear(linear: StackLinear) -> _Linear:
    return _Linear(ctypes.pointer(linear.weight.descriptor), _address(linear.bias))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
