"""Processor time of one thread's decode step after 4,096 tokens, by KV format, and of sealing a page of all layers.

Other work on the machine stretches the clock, and this far less. Pages hold random numbers: no prompt is computed. From
the repository's root: `python -m tests.bench.decode_kv_processor_time CHECKPOINT [bf16,qet4,...]`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.sequence import Sequence
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.cpu import bindings
from anybit.kvcache.sealed_pool import Seals
from tests.fixtures.engine import make_cache, make_request
from tests.fixtures.tiny_llama import decoder_of

CONTEXT = 4096
PAGES = CONTEXT // 64 + 2
WIDTH = 4
ROUNDS = 15
STEPS = 4


def milliseconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return (time.process_time() - begin) * 1e3


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@torch.inference_mode()
def main() -> None:
    checkpoint = Path(sys.argv[1])
    formats = sys.argv[2].split(",") if len(sys.argv) > 2 else ["bf16", "qet4", "qet3", "qet2"]
    torch.set_num_threads(1)
    config = json.loads((checkpoint / "config.json").read_text())
    decoder = decoder_of(config, NestedLoader(CheckpointReader(checkpoint), (WIDTH,), WIDTH, "cpu"))
    bindings.set_threads(1)
    steps, seals = {}, {}
    for name in formats:
        _, pool = make_cache(decoder, PAGES, (name,), 1)
        for layer in range(config["num_hidden_layers"]):
            for part in (pool.keys(layer), pool.values(layer)):
                part.copy_(torch.randn(part.shape))
        sequence = Sequence(make_request(name, [5] * (CONTEXT + 1), bit_width=WIDTH), arrived_at=0.0, kv_format=name)
        sequence.num_computed = CONTEXT
        sequence.pages = list(range(PAGES - 1, 0, -1))
        for sealed in pool.sealed.values():
            sequence.own_slots = [0]
            slots = Seals(ids(0), ids(0), ids(0), ids(1), ids(0))
            seals[name] = lambda pool=pool, name=name, slots=slots: decoder.native.seal(pool, name, slots)
            seals[name]()
            for layer in sealed.layers:
                for records in (layer.pages.keys, layer.pages.values):
                    records.copy_(records[:1].expand_as(records).clone())
        plan = plan_batch([Chunk(sequence, 1)], decoder.device)
        steps[name] = lambda plan=plan, pool=pool: decoder.logits(decoder.forward(plan, pool))
    step_times = {name: [] for name in steps}
    seal_times = {name: [] for name in seals}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step_times[name] += [milliseconds(step) for _ in range(STEPS)]
        for name, seal in seals.items():
            seal_times[name].append(milliseconds(seal))
    for name, times in step_times.items():
        sealing = f", sealing a page {statistics.median(seal_times[name]):.1f} ms" if name in seal_times else ""
        print(f"{name}: a step {statistics.median(times):.1f} ms{sealing} ({bindings.selected_instruction_set()})")


if __name__ == "__main__":
    main()
