"""GGUF files as source models: names, row order and tokenizer translated to Hugging Face's."""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.weights.manifest import file_sha256
from anybit.engine.weights.source import first_sentence

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
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
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ARCHITECTURES = ("llama",)
# End-of-generation markers by text, for files that name only one of theirs.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")


class GGUFSource:
    """One .gguf file; tensors are dequantized to float32 when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        try:
            self._reader = GGUFReader(path)
            self._tensors = {_translate(tensor.name): tensor for tensor in self._reader.tensors}
        except UnsupportedModelError:
            raise
        except Exception as error:  # the parser meets a broken file with whatever it stumbles over
            raise SourceError(f"{path} is not a complete GGUF file: {first_sentence(error)}.") from error
        architecture = self._field("general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UnsupportedModelError(
                f"GGUF files of architecture {architecture!r} are not supported; supported: {known}."
            )
        if any(name.endswith(".bias") for name in self._tensors):
            raise UnsupportedModelError(f"{path} has biases, which are not supported in GGUF files.")
        if self._field(f"{architecture}.rope.scaling.type") not in (None, "none"):
            raise UnsupportedModelError(f"{path} scales its rotary embeddings, which is not supported in GGUF files.")

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def location(self) -> str:
        return str(self._path)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        from transformers import AutoConfig  # noqa: PLC0415 - seconds to import, needed only when quantizing

        try:
            config = AutoConfig.from_pretrained(self._path.parent, gguf_file=self._path.name, local_files_only=True)
        except Exception as error:
            raise SourceError(f"The metadata of {self._path} cannot be used: {first_sentence(error)}.") from error
        entries = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
        entries["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        entries["architectures"] = ["LlamaForCausalLM"]
        return entries

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors.get(name)
        if stored is None:
            raise SourceError(f"{self._path} lacks the tensor {name}.")
        try:
            weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        except (NotImplementedError, ValueError) as error:  # what the gguf library raises for a type it cannot decode
            raise SourceError(
                f"The tensor {name} of {self._path} cannot be decoded: {first_sentence(error)}."
            ) from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self._field("llama.attention.head_count" + ("" if "q_proj" in name else "_kv"))
            return _unpermute(weight, int(heads))
        return weight

    def write_tokenizer(self, directory: Path) -> None:
        from tokenizers import pre_tokenizers  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._path.parent, gguf_file=self._path.name, local_files_only=True
            )
            if self._field("tokenizer.ggml.pre") == "smollm":
                # The converter knows only GPT-2's splitting; this tokenizer also splits off every digit.
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            tokenizer.save_pretrained(directory)
        except Exception as error:
            raise SourceError(f"The tokenizer of {self._path} cannot be used: {first_sentence(error)}.") from error
        ends = [tokenizer.eos_token_id]
        ends += [token_id for text, token_id in tokenizer.get_added_vocab().items() if text in _END_TOKENS]
        generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(dict.fromkeys(ends))}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=1))

    def sha256(self) -> str:
        return file_sha256(self._path)

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()


def _translate(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise UnsupportedModelError(f"The GGUF tensor {name!r} belongs to no supported architecture.")
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo the row order GGUF gives q and k of Llama files (pairs interleaved) in favour of split halves."""
    rows = weight.shape[0]
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
