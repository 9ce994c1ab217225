"""Parts of a problem's rows, a thread for each: of a pass's many small operations two threads together make hardly less."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from anybit.engine.quantize.solve.problem import NestedProblem
from anybit.kernels.cpu.threads import one_thread

_MOST_THREADS = 4  # the native integer steps of all parts take turns
_TOGETHER = 3 << 19  # weights of all widths in one part: what a core's caches can do with
_FEWEST_ROWS = 64

Result = TypeVar("Result")


def each_part(problem: NestedProblem, work: Callable[[slice], Result]) -> list[Result]:
    """What `work` makes of each part of the rows, in their order; on GPUs and on many cores all rows are one part."""
    rows = problem.targets.shape[1]
    threads = torch.get_num_threads()
    if problem.targets.device.type != "cpu" or threads > _MOST_THREADS:
        return [work(slice(0, rows))]
    parts = _parts(rows, problem.targets[:, 0].numel(), threads)
    if threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    with (
        one_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(work, parts))


def _parts(rows: int, row_weights: int, threads: int) -> list[slice]:
    """Equal parts, as many for each thread."""
    rounds = -(-rows * row_weights // (_TOGETHER * threads))
    together = max(_FEWEST_ROWS, -(-rows // (rounds * threads)))
    return [slice(start, start + together) for start in range(0, rows, together)]
