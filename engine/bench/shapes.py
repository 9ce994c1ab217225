"""The shapes of linear layers to measure, by a model's name or as numbers. Loads no torch."""

import re
from dataclasses import dataclass

_INPUT_MULTIPLE = 32  # the smallest group
_MAX_WEIGHTS = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight [out, in]."""

    out_features: int
    in_features: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


# The linear layers of one decoder layer as they are served, queries, keys and values (and gate and up) fused into one
# weight; the largest last. SmolLM2's table is here too, as it is half of that model.
MODEL_SHAPES = {
    "llama-3-8b": (Shape(4096, 4096), Shape(6144, 4096), Shape(4096, 14336), Shape(28672, 4096)),
    "smollm2-135m": (Shape(576, 576), Shape(960, 576), Shape(576, 1536), Shape(3072, 576), Shape(49152, 576)),
    "qwen2.5-0.5b": (Shape(896, 896), Shape(1152, 896), Shape(896, 4864), Shape(9728, 896)),
}
DEFAULT_SHAPES = "4096x4096,4096x14336"  # of llama-3-8b: all widths in well under a minute


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """ "llama-3-8b,64x128" -> all shapes named, each once; ValueError is one sentence that says what is wrong."""
    shapes = [shape for part in text.split(",") for shape in _parse_part(part.strip())]
    return tuple(dict.fromkeys(shapes))


def _parse_part(text: str) -> tuple[Shape, ...]:
    if text in MODEL_SHAPES:
        return MODEL_SHAPES[text]
    if not re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not a shape such as 4096x14336 (OUTxIN) nor one of {', '.join(MODEL_SHAPES)}.")
    out_features, in_features = map(int, text.split("x"))
    if not 1 <= out_features * in_features <= _MAX_WEIGHTS:
        raise ValueError(f"The shape {text} does not have 1 to {_MAX_WEIGHTS} weights.")
    if in_features % _INPUT_MULTIPLE:
        raise ValueError(f"The input size of {text} is not a multiple of {_INPUT_MULTIPLE}, the smallest group.")
    return (Shape(out_features, in_features),)
