"""A tiny random Llama with a working tokenizer and chat template, as a Hugging Face directory."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.server.tiny_checkpoint import byte_level_tokenizer, write_checkpoint


def write_tiny_source(directory: Path, seed: int = 0) -> Path:
    tokenizer = byte_level_tokenizer()
    write_checkpoint(directory, tokenizer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    # A model that knows nothing would repeat one token; wide weights give it something to say at every width.
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory
