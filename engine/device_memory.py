"""What this engine holds of its device's memory."""

import torch

from anybit.engine.machine import free_bytes, resident_bytes
from anybit.kvcache.books import PageBooks


class DeviceMemory:
    """Measures one device, for which `weights_bytes` have been loaded."""

    def __init__(self, device: torch.device, weights_bytes: int) -> None:
        self._device = device
        self._weights_bytes = weights_bytes

    def held_bytes(self, books: PageBooks) -> dict[str, int]:
        """By kind: "weights", "kv_cache", and "workspace", which is all else.

        The sum is what PyTorch has reserved on a GPU, and the resident memory of this process on a CPU. A GPU's pages of
        keys and values are held from the start; a CPU's are held once something is in them.
        """
        if self._device.type == "cuda":
            held, pages = torch.cuda.memory_reserved(self._device), sum(books.bytes_total().values())
        else:
            held, pages = resident_bytes(), sum(books.bytes_used().values()) + sum(books.bytes_cached().values())
        workspace = max(0, held - self._weights_bytes - pages)
        return {"weights": self._weights_bytes, "kv_cache": pages, "workspace": workspace}

    def free_bytes(self) -> int:
        """Memory of the device that nobody holds."""
        return free_bytes(self._device)
