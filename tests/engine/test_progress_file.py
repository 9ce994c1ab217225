"""The file that tells how far a checkpoint is: what is written is read, and nobody's remains are taken for work."""

import json
import os
import subprocess
import sys
import time

import pytest

from anybit.engine.weights.progress_file import clear_progress, read_progress, report_progress


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "checkpoints" / "model"


def written(checkpoint):
    return checkpoint.parent / ".model.progress.json"


def write(checkpoint, **changes) -> None:
    report_progress(checkpoint, "quantize", 12, 30)
    fields = json.loads(written(checkpoint).read_text())
    written(checkpoint).write_text(json.dumps({**fields, **changes}))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_report_is_read_back_and_nothing_else_is_left(checkpoint):
    report_progress(checkpoint, "quantize", 0, 30)
    report_progress(checkpoint, "quantize", 12, 30)
    progress = read_progress(checkpoint)
    assert (progress.stage, progress.done, progress.total) == ("quantize", 12, 30)
    assert (progress.share, progress.percent) == (0.4, 40)
    assert progress.pid == os.getpid()
    assert abs(progress.updated - time.time()) < 5
    assert [path.name for path in checkpoint.parent.iterdir()] == [".model.progress.json"]
    assert json.loads(written(checkpoint).read_text()).keys() == {"stage", "done", "total", "pid", "updated"}
    clear_progress(checkpoint)
    assert read_progress(checkpoint) is None
    assert list(checkpoint.parent.iterdir()) == []
    clear_progress(checkpoint)


@pytest.mark.parametrize(("done", "total", "share"), [(0, 0, 0), (5, 0, 0), (5, 4, 1), (-1, 4, 0), (4, 4, 1)])
def test_share_lies_between_0_and_1(checkpoint, done, total, share):
    report_progress(checkpoint, "download", done, total)
    assert read_progress(checkpoint).share == share


def test_percent_is_100_only_at_the_end(checkpoint):
    report_progress(checkpoint, "download", 9_999, 10_000)
    assert read_progress(checkpoint).percent == 99


def test_nobody_at_work_reads_as_none(checkpoint):
    assert read_progress(checkpoint) is None
    write(checkpoint, pid=dead_pid())
    assert read_progress(checkpoint) is None
    write(checkpoint, updated=time.time() - 3600)
    assert read_progress(checkpoint) is None
    write(checkpoint, pid=10**30)
    assert read_progress(checkpoint) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "quantize"}', '{"stage": 1, "done": "x"}'])
def test_damaged_file_reads_as_none_and_is_written_over(checkpoint, content):
    report_progress(checkpoint, "quantize", 1, 2)
    written(checkpoint).write_text(content)
    assert read_progress(checkpoint) is None
    report_progress(checkpoint, "quantize", 2, 2)
    assert read_progress(checkpoint).done == 2


def test_remains_of_a_dead_process_are_removed_and_a_living_one_keeps_its_file(checkpoint):
    write(checkpoint, pid=dead_pid())
    clear_progress(checkpoint)
    assert not written(checkpoint).exists()
    write(checkpoint, pid=os.getppid())
    clear_progress(checkpoint)
    assert read_progress(checkpoint).pid == os.getppid()


def test_folder_that_cannot_be_written_stops_no_work(tmp_path):
    (tmp_path / "file").write_text("")
    report_progress(tmp_path / "file" / "model", "quantize", 1, 2)
    assert read_progress(tmp_path / "file" / "model") is None
    clear_progress(tmp_path / "file" / "model")


def test_no_torch_is_loaded():
    program = "import sys, anybit.engine.weights.progress_file; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
