"""Start-up check of sealed formats: what a short text's attention loses in each layer, and layers that lose too much."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.engine.kv.prompt_heads import LayerHeads
from anybit.kernels.attention_inputs import AttentionSettings, ExactPages
from anybit.kernels.portable.attention import paged_attention
from anybit.kvcache.attention import PageTables
from anybit.kvcache.formats import codec_of, parse_format
from anybit.kvcache.sealed_pool import SealedLayer, Seals, sealed_layer
from anybit.kvcache.spec import PAGE_SIZE, KVSpec

logger = logging.getLogger("anybit.engine")

RAISED_FORMAT = "uniform8"
"""Of layers for which the format asked for is not good enough."""

MOST_LOSS = 2.0
"""A layer is raised if its attention is off by more than so many times what the format's codes alone are off by.

Attention averages values whose errors have little to do with each other, so that it is off by less than these, as long as
keys are kept well enough to find the same values. Measured with SmolLM2-135M and Qwen2.5-0.5B on two texts, worst layers: at
most 1.1 times with qet4, qet3 and qet2, 1.6 times with uniform4 to uniform2. Without balance weights the first layer of
Qwen, whose keys have biases, is off by 8.3, 5.4 and 3.6 times as much, and the next worst by 1.1 times.
"""

LEAST_TOKENS = 2 * PAGE_SIZE  # a page that is read as codes, and one whose queries read it
MOST_TOKENS = 4 * PAGE_SIZE
"""Of the text; more would find the same and cost the start more time."""

_MOST_PAGES = MOST_TOKENS // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Relative errors |x − x̂| / |x| of one layer: of keys less their page's mean, which attention hardly sees, of values,
    and of attention's output over the pages."""

    keys: float
    values: float
    attention: float


@dataclass(frozen=True, slots=True)
class FormatCheck:
    """What was found for one sealed format, and the spec to serve it by: layers that lost too much are raised in it.

    `raised_errors` are those of raised layers as they are served; `hopeless` are layers that no format here keeps well.
    """

    spec: KVSpec
    errors: tuple[LayerErrors, ...]
    raised_errors: dict[int, LayerErrors]
    hopeless: tuple[int, ...]

    @property
    def doubt(self) -> str | None:
        """Why not to choose the format of one's own accord, if there is a reason."""
        layers = sorted((*self.raised_errors, *self.hopeless))
        return f"it is not good enough for {_listed(layers)} of this model." if layers else None

    def report(self) -> None:
        """Log it, a sentence each."""
        name = self.spec.format
        worst = max(range(len(self.errors)), key=lambda layer: self.errors[layer].attention)
        logger.info(
            "Self-check of KV format %s: attention is off by %.1f %% in the layer that loses most (%d), keys by %.1f %%, "
            "values by %.1f %%.",
            name,
            100 * self.errors[worst].attention,
            worst,
            100 * max(errors.keys for errors in self.errors),
            100 * max(errors.values for errors in self.errors),
        )
        if self.raised_errors:
            logger.warning(
                "KV format %s is not good enough for %s of this model, kept in %s for that reason: attention was off by up "
                "to %.0f %% there, and is now by up to %.1f %%.",
                name,
                _listed(self.raised_errors),
                RAISED_FORMAT,
                100 * max(self.errors[layer].attention for layer in self.raised_errors),
                100 * max(errors.attention for errors in self.raised_errors.values()),
            )
        if self.hopeless:
            logger.warning(
                "KV format %s loses more than its codes must in %s of this model (attention is off by up to %.1f %%), and "
                "%s is no better there; bf16 loses nothing.",
                name,
                _listed(self.hopeless),
                100 * max(self.errors[layer].attention for layer in self.hopeless),
                RAISED_FORMAT,
            )


@torch.inference_mode()
def check_format(
    spec: KVSpec,
    heads: Sequence[LayerHeads],
    settings: Sequence[AttentionSettings],
    weights: Sequence[Tensor] | None,
    device: torch.device | str = "cpu",
) -> FormatCheck:
    """Read each layer's heads through pages of the spec's format; layers beyond MOST_LOSS are raised where that helps.

    heads and settings of each layer, of LEAST_TOKENS tokens at least; weights [kv_heads, head_dim] balance its keys.
    """
    limit = MOST_LOSS * _code_error(spec.format, spec.head_dim)

    def errors_of(layer: int, spec: KVSpec) -> LayerErrors:
        return layer_errors(
            heads[layer], sealed_layer(spec, layer, _MOST_PAGES, weights, device), settings[layer], device
        )

    errors = tuple(errors_of(layer, spec) for layer in range(spec.num_layers))
    # Not a number is beyond every limit.
    beyond = [layer for layer in range(spec.num_layers) if not errors[layer].attention <= limit]
    raised = {layer: errors_of(layer, spec.of_format(RAISED_FORMAT)) for layer in beyond}
    better = {layer: found for layer, found in raised.items() if found.attention < errors[layer].attention}
    return FormatCheck(
        replace(spec, layer_formats=dict.fromkeys(better, RAISED_FORMAT)),
        errors,
        better,
        tuple(layer for layer in beyond if layer not in better),
    )


def layer_errors(
    heads: LayerHeads, layer: SealedLayer, settings: AttentionSettings, device: torch.device | str = "cpu"
) -> LayerErrors:
    """Errors of a text's first whole pages in a layer with _MOST_PAGES empty sealed pages; attention's are those of the last
    page's queries, which read all others as codes."""
    num_pages = min(heads.num_tokens // PAGE_SIZE, _MOST_PAGES)
    queries, keys, values = (
        rows[:, : num_pages * PAGE_SIZE].to(device) for rows in (heads.queries, heads.keys, heads.values)
    )
    own = ExactPages(_by_page(layer.basis.keys(keys)), _by_page(layer.basis.values(values)))
    ids = torch.arange(num_pages, device=device)
    first, last = ids[:1], num_pages - 1
    # The last page stays exact, so its place is free for the first tokens.
    layer.seal(own, Seals(ids[:last], ids[:last], first, ids[last:], torch.zeros_like(ids[:last])))
    read_keys, read_values = (rows.transpose(0, 1).flatten(1, 2) for rows in layer.pages.read(ids[:last]))
    positions = torch.arange(last * PAGE_SIZE, num_pages * PAGE_SIZE, device=device)
    newest = queries[:, positions].transpose(0, 1)[None]
    tables = PageTables(sealed=ids[None, :last], first=ids[last:], own=ids[None, last:], first_own=ids[last:])
    attended = layer.attend(newest, own, tables, positions[None], settings)
    exact = paged_attention(
        newest,
        _by_page(keys),
        _by_page(values),
        ids[None],
        positions[None],
        settings.scale,
        settings.window,
        settings.softcap,
    )
    sealed_keys, sealed_values = (rows[:, : last * PAGE_SIZE] for rows in (keys, values))
    by_page = _by_page(sealed_keys)
    return LayerErrors(
        _relative(layer.basis.restored_keys(read_keys) - sealed_keys, by_page - by_page.mean(2, keepdim=True)),
        _relative(layer.basis.restored_values(read_values) - sealed_values, sealed_values),
        _relative(attended - exact, exact),
    )


@functools.cache
def _code_error(kv_format: str, head_dim: int) -> float:
    """What codes of the format are off by on normally distributed numbers: keys' or values', whichever is larger."""
    rows = torch.randn(_MOST_PAGES, PAGE_SIZE, head_dim, generator=torch.Generator().manual_seed(0))
    names = parse_format(kv_format)
    codecs = codec_of(names.keys, True), codec_of(names.values, False)
    return max(_relative(codec.decode(codec.encode(rows)) - rows, rows) for codec in codecs)


def _by_page(rows: Tensor) -> Tensor:
    """[kv_heads, tokens, head_dim] -> [pages, kv_heads, 64, head_dim]."""
    kv_heads, _, head_dim = rows.shape
    return rows.reshape(kv_heads, -1, PAGE_SIZE, head_dim).transpose(0, 1).contiguous()


def _relative(errors: Tensor, exact: Tensor) -> float:
    return float(errors.norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))


def _listed(layers: Sequence[int] | dict[int, LayerErrors]) -> str:
    numbers = ", ".join(map(str, layers))
    return f"layer {numbers}" if len(layers) == 1 else f"layers {numbers}"
