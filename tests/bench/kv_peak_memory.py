"""Memory of a GPU that prompts and steps over compressed pages need beside weights and pages: no history is decoded.

    python tests/bench/kv_peak_memory.py [--shape llama-3.1-8b] [--batch 16] [--context 16384] [--kv-format qet4]

Prints the most that was allocated while prompts were computed and while tokens were, less what was there before, beside what
the same history would take in bfloat16.
"""

import argparse
import json
from pathlib import Path

import torch

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.bench.random_model import random_subject
from anybit.engine.config import EngineConfig
from anybit.engine.precision import Precision
from anybit.engine.types import GenerationRequest, SamplingParams

BIT_WIDTH = 4
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--kv-format", default="qet4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options.shape, options.batch, options.context, options.kv_format)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(shape: str, batch: int, context: int, kv_format: str) -> dict[str, object]:
    config = EngineConfig(
        "", shape, (BIT_WIDTH,), BIT_WIDTH, BIT_WIDTH, kv_format, device="cuda", max_num_seqs=batch, reproducible=False
    )
    subject = random_subject(shape, config, context + 64)
    core = subject.core
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    for index in range(batch):
        prompt = torch.randint(subject.vocab_size, (context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=64, temperature=0)
        core.add(GenerationRequest(str(index), prompt, sampling, Precision(BIT_WIDTH)))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in core.step()}
    prompts = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        core.step()
    steps = torch.cuda.max_memory_allocated() - before
    model = MODELS[shape]
    in_bf16 = batch * context * model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    mib = 1 << 20
    return {
        "device": subject.device_name,
        "versions": {"torch": torch.__version__},
        "shape": shape,
        "kv_format": kv_format,
        "batch": batch,
        "context": context,
        "before_mib": before // mib,
        "prompts_mib": prompts // mib,
        "steps_mib": steps // mib,
        "history_in_bf16_mib": in_bf16 // mib,
        "history_of_a_layer_in_bf16_mib": in_bf16 // model.num_layers // mib,
    }


if __name__ == "__main__":
    main()
