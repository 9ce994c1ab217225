"""What tells the architectures of GGUF files apart: names of tensors, and how their numbers are stored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from anybit.engine.errors import UnsupportedModelError

ROPE_DIVISORS = "rope_freqs.weight"
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one architecture differ from Hugging Face's."""

    block_names: Mapping[str, str]  # of a layer's tensors, without ".weight" or ".bias"
    permuted: bool = False  # rows of q and k are in the order of a rotation of neighbours
    norm_offset: float = 0.0  # what the file's norm weights have had added


ARCHITECTURES = {
    "gemma2": Architecture({**_COMMON, **_OUTPUT_NORMS}, norm_offset=1.0),
    "gemma3": Architecture({**_COMMON, **_OUTPUT_NORMS, **_QK_NORMS}, norm_offset=1.0),
    "llama": Architecture(_COMMON, permuted=True),
    "qwen2": Architecture(_COMMON),
    "qwen3": Architecture({**_COMMON, **_QK_NORMS}),
}


def find_architecture(name: str) -> Architecture:
    """UnsupportedModelError lists those there are."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"GGUF files of architecture {name!r} are not supported; supported: {known}.")
    return ARCHITECTURES[name]


def hugging_face_name(name: str, architecture: Architecture) -> str:
    """The Hugging Face name of a file's tensor; UnsupportedModelError if the architecture has no such tensor."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in architecture.block_names:
        raise UnsupportedModelError(f"The GGUF tensor {name!r} belongs to no supported architecture.")
    return f"model.layers.{match[1]}.{architecture.block_names[match[2]]}.{match[3]}"
