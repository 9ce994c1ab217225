"""Time of GPU work without what launching it from Python costs."""

import statistics
from collections.abc import Callable, Sequence

import torch

_WARM_UPS = 2


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Seconds per call when all calls run one after the other in one CUDA graph: the median over `repeats` replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and loads what the calls need
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(_WARM_UPS):
        graph.replay()
    seconds: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds)
