"""Time and memory of the method `best` on a model of Llama-3.1-8B's shape, from a few blocks with random weights.

    python tests/bench/quantize_large.py --device cuda --json tests/bench/results/quantize_large_h100.json

Solves block 0 as the method does (all widths, its own number of calibration tokens), then trains two and one blocks through
the model's head; their difference is what a block adds to a step. Hours are what 32 blocks and all steps come to.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.engine.machine import describe_device, resident_bytes, resolve_device
from anybit.engine.models.config import DecoderConfig
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.blockwise import BlockSolver, SolvedBlock
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.recipes import recipe_for
from anybit.engine.quantize.solve.end_to_end import Distillation, EndToEndOptions, QuantizedBlock, train_end_to_end
from anybit.engine.quantize.work_folder import WorkFolder

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


class RandomSource:
    """Weights drawn when they are asked for, the same ones every time; normal, as wide as such models' weights are."""

    name = "random-8b"
    location = ""
    config: Mapping[str, Any] = SHAPE

    def tensor_names(self) -> list[str]:
        return [f"model.layers.{layer}.{name}.weight" for layer in range(32) for name in (*_LINEARS, *_NORMS)]

    def tensor(self, name: str) -> Tensor:
        short = name.split(".", 3)[-1].removesuffix(".weight")
        if short in _NORMS:
            return torch.ones(SHAPE["hidden_size"])
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(*_LINEARS[short], generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    def write_tokenizer(self, directory: Path) -> None: ...

    def sha256(self) -> str:
        return ""


_LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    config = parse_config(SHAPE)
    options = QuantizeOptions(method="best")
    recipe = recipe_for(options)
    source = RandomSource()
    solver = BlockSolver(source, config, options, recipe, device)
    count = max(recipe.sequences, recipe.training_sequences)
    hidden = torch.randn(count, recipe.context, config.hidden_size, device=device)
    streams = solver.start(hidden)
    solver.solve(0, streams, 0)  # kernels are compiled, memory is taken
    _reset_peak(device)
    started = _now(device)
    solved = solver.solve(0, streams, 0)
    solver.advance(0, solved, streams)
    block_seconds = _now(device) - started
    block_peak = _peak(device)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        WorkFolder(Path(folder) / "x", {}).save_block(0, solved)
        save_seconds = time.perf_counter() - started
    one, peak_one = _step_seconds(solver, config, solved, 1, hidden, device)
    three, peak_three = _step_seconds(solver, config, solved, 3, hidden, device)
    per_block, head = (three - one) / 2, one - (three - one) / 2
    sequences = sum(options.steps * options.sequences(hidden) for options in recipe.end_to_end.values())
    layers = config.num_layers
    hours = (layers * (block_seconds + save_seconds) + sequences * (layers * per_block + head)) / 3600
    bytes_per_block = (peak_three - peak_one) // 2
    report = {
        "device": describe_device(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shape": "Llama-3.1-8B, random weights",
        "calibration_tokens": count * recipe.context,
        "block_seconds": round(block_seconds, 2),
        "block_peak_gib": round(block_peak / 2**30, 2),
        "save_seconds": round(save_seconds, 2),
        "end_to_end_sequences": sequences,
        "end_to_end_sequence_seconds_per_block": round(per_block, 4),
        "end_to_end_sequence_seconds_head": round(head, 4),
        "end_to_end_peak_gib_estimate": round((peak_one + (layers - 1) * bytes_per_block) / 2**30, 2),
        "hours_estimate": round(hours, 3),
        "host_resident_gib": round(resident_bytes() / 2**30, 2),
    }
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))


def _step_seconds(
    solver: BlockSolver,
    config: DecoderConfig,
    solved: SolvedBlock,
    num_blocks: int,
    hidden: Tensor,
    device: torch.device,
) -> tuple[float, int]:
    """Seconds of one training step through `num_blocks` copies of a block and the head, and the peak of memory."""
    table = torch.randn(config.vocab_size, config.hidden_size, device=device).mul_(0.02)

    def head(states: Tensor) -> Tensor:
        return F.linear(F.rms_norm(states, (config.hidden_size,)), table)

    blocks = [
        QuantizedBlock(
            solver.block(0),
            solved.vectors,
            {site: weight.codes_at(2) for site, weight in solved.weights.items()},
            {site: weight.parts[2] for site, weight in solved.weights.items()},
        )
        for _ in range(num_blocks)
    ]
    data = Distillation(hidden, hidden, head, range(4))
    _reset_peak(device)

    def run(steps: int) -> float:
        started = _now(device)
        train_end_to_end(blocks, 2, data, EndToEndOptions(steps), recompute=True)
        return _now(device) - started

    few = run(2)
    many = run(6)
    return (many - few) / 4, _peak(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes()


if __name__ == "__main__":
    main()
