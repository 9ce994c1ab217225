"""How fast a device copies memory."""

import time

import torch

from anybit.kernels.cpu.threads import torch_on_all_threads

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read plus written per second by a plain copy on the device, the best of a few."""
    num_bytes = _COPY_BYTES[device.type]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    with torch_on_all_threads():
        for _ in range(5):
            started = time.perf_counter()
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best
