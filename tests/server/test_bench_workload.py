"""What `bench serve` sends follows from the seed alone."""

import itertools
import math
import os
from pathlib import Path

import pytest

from anybit.server.bench.workload import Workload, WorkloadError, arrival_seconds, read_prompts


def test_prompts_follow_from_the_seed() -> None:
    assert Workload(seed=3).prompts(0, 5) == Workload(seed=3).prompts(0, 5)
    assert Workload(seed=3).prompts(2, 3) == Workload(seed=3).prompts(0, 5)[2:]
    assert Workload(seed=3).prompt(0) != Workload(seed=4).prompt(0)


def test_prompts_share_only_the_prefix_that_was_asked_for() -> None:
    words = [prompt.split() for prompt in Workload(prompt_tokens=40, shared_prefix_tokens=16).prompts(0, 8)]
    assert {len(prompt) for prompt in words} == {40}
    assert len({tuple(prompt[:16]) for prompt in words}) == 1
    assert len({tuple(prompt[16:24]) for prompt in words}) == 8
    unshared = [prompt.split() for prompt in Workload(prompt_tokens=40).prompts(0, 8)]
    assert len({tuple(prompt[:8]) for prompt in unshared}) == 8


def test_given_lines_begin_anew_when_they_run_out() -> None:
    assert Workload(lines=["a", "b"]).prompts(1, 3) == ["b", "a", "b"]


def test_arrivals_are_seeded_and_ascend_at_the_rate() -> None:
    arrivals = arrival_seconds(20.0, 4000, "seed")
    assert arrivals == arrival_seconds(20.0, 4000, "seed") != arrival_seconds(20.0, 4000, "other")
    assert arrivals[0] == 0
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert min(gaps) >= 0
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.1)  # exponential


def test_infinite_rate_is_all_at_once() -> None:
    assert arrival_seconds(math.inf, 3, "seed") == [0, 0, 0]


def test_prompt_file_is_read_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Grüße\n\n  two words  \n")
    assert read_prompts(path) == ["Grüße", "two words"]


@pytest.mark.parametrize(("content", "telling"), [(b"\n \n", "no prompt"), (b"caf\xe9", "UTF-8")])
def test_useless_prompt_file_is_told_in_a_sentence(content: bytes, telling: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=telling):
        read_prompts(path)


def test_unreadable_prompt_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=os.strerror(21)):
        read_prompts(tmp_path)
