"""Writes a checkpoint of a well-known shape with random weights: what serving costs can be measured without a download.

    python tests/bench/random_checkpoint.py --shape llama-3.1-8b [--layers 32] [--device cuda] DESTINATION

Tokens are bytes and made-up words, so that every token that such a model draws is text.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.models.config import DecoderConfig
from anybit.engine.weights.checkpoint import ShardWriter, nested_tensors
from anybit.engine.weights.manifest import Manifest, TensorEntry, file_sha256, write_manifest
from anybit.kernels.layout import BIT_WIDTHS

GROUP_SIZE = 128
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--shape", choices=[name for name in MODELS if not MODELS[name].qk_norm], required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = MODELS[arguments.shape]
    config = replace(config, layers=config.layers[: arguments.layers])
    arguments.destination.mkdir(parents=True)
    write_tokenizer(arguments.destination, config.vocab_size)
    (arguments.destination / "config.json").write_text(json.dumps(llama_config(config), indent=1))
    tensors = write_weights(arguments.destination, config, torch.device(arguments.device))
    files = {path.name: file_sha256(path) for path in sorted(arguments.destination.iterdir())}
    manifest = Manifest(
        method="rtn",
        method_options={},
        bit_widths=BIT_WIDTHS,
        group_size=str(GROUP_SIZE),
        tensors=tensors,
        source_name=f"{arguments.shape}-random",
        source_location="random",
        source_sha256="0" * 64,
        files=files,
    )
    write_manifest(arguments.destination, manifest)


def write_weights(directory: Path, config: DecoderConfig, device: torch.device) -> dict[str, TensorEntry]:
    writer = ShardWriter(directory)
    entries: dict[str, TensorEntry] = {}
    columns = {"o_proj": config.num_heads * config.head_dim, "down_proj": config.intermediate_size}

    def add(name: str, shape: Shape) -> None:
        weight = random_weight(shape, GROUP_SIZE, BIT_WIDTHS, device)
        writer.add({key: tensor.cpu() for key, tensor in nested_tensors(name, weight).items()})
        entries[name] = TensorEntry((shape.out_features, shape.in_features), GROUP_SIZE, "float16")

    table = Shape(config.vocab_size, config.hidden_size)
    add("model.embed_tokens.weight", table)
    if not config.tie_word_embeddings:
        add("lm_head.weight", table)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for block, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                shape = Shape(config.outputs_of(name), columns.get(name, config.hidden_size))
                add(f"{prefix}{block}.{name}.weight", shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add({f"{prefix}{norm}.weight": torch.ones(config.hidden_size)})
    writer.add({"model.norm.weight": torch.ones(config.hidden_size)})
    writer.close()
    return entries


def llama_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.layers[0].rope.theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.activation,
        "eos_token_id": 0,
    }


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END_OF_TEXT, *alphabet]
    words += [f"Ġw{number}" for number in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


if __name__ == "__main__":
    main()
