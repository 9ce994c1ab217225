"""The thread that compiles kernels of mixed steps: in which order, and that it ends when it shall."""

import dataclasses
import logging
import threading

from anybit.engine.compile_ahead import CompileAhead, mixed_steps
from tests.server.fake_engine import model_info
from tests.waiting import wait_until


def served(bit_widths, max_num_seqs=128):
    info = model_info()
    widths = [width for width in info.widths if width.bit_width in bit_widths]
    return dataclasses.replace(info, widths=widths, max_num_seqs=max_num_seqs)


def test_two_widths_and_few_rows_come_first():
    steps = mixed_steps(served((2, 4, 8)))
    assert steps[:4] == [((2, 4), 8), ((2, 8), 8), ((4, 8), 8), ((2, 4), 16)]
    assert steps[-1] == ((2, 4, 8), 64)
    assert len(set(steps)) == len(steps) == 4 * 5


def test_as_many_widths_meet_as_there_are_sequences():
    assert mixed_steps(served((4,))) == mixed_steps(served((2, 4, 8), max_num_seqs=1)) == []
    assert {len(widths) for widths, _ in mixed_steps(served((2, 4, 8), max_num_seqs=2))} == {2}


def test_all_steps_are_compiled_beside_the_caller(caplog):
    caplog.set_level(logging.INFO, "anybit.engine")
    seen = []
    CompileAhead(
        lambda widths, rows: seen.append((widths, rows, threading.current_thread())), [((2, 4), 8), ((4, 8), 8)]
    )
    wait_until(lambda: "are there" in caplog.text, "nothing was said")
    assert [step[:2] for step in seen] == [((2, 4), 8), ((4, 8), 8)]
    assert threading.current_thread() not in {thread for *_, thread in seen}


def test_it_ends_after_what_is_being_compiled():
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def compile_step(widths, rows):
        begun.set()
        may_end.wait(10)
        seen.append(rows)

    compiling = CompileAhead(compile_step, [((2, 4), 8), ((2, 4), 16)])
    begun.wait(10)
    stopping = threading.Thread(target=compiling.stop)
    stopping.start()
    assert stopping.is_alive()
    may_end.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert seen == [8]


def test_a_compiler_that_fails_is_told_once_and_does_no_harm(caplog):
    seen = []

    def compile_step(widths, rows):
        seen.append(rows)
        raise RuntimeError("no compiler")

    CompileAhead(compile_step, [((2, 4), 8), ((2, 4), 16)])
    wait_until(lambda: "were not compiled ahead" in caplog.text, "nothing was said")
    assert seen == [8]
