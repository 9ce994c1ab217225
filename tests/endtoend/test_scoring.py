"""lm-evaluation-harness's way of scoring: token ids in, echo, one token out. The server gives what the model itself does."""

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from anybit.engine.models.decoder import Decoder
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from tests.endtoend.command import ServeCommand
from tests.fixtures.engine import cached_logits
from tests.fixtures.tiny_llama import decoder_of

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Path) -> Decoder:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8))


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(4, 512), k=length)


def score(server: ServeCommand, prompts: list[list[int]], width: int) -> list[dict[str, Any]]:
    """The harness's request, field by field; choices in the order of the prompts."""
    response = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": f"tiny@{width}bit", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True,
        },
        timeout=300,
    )  # fmt: skip
    assert response.status_code == 200, response.text
    return sorted(response.json()["choices"], key=lambda choice: choice["index"])


def direct_log_probabilities(decoder: Decoder, prompt: list[int], width: int) -> torch.Tensor:
    """After every token of the prompt, by one pass over the same weights and a cache of the same type."""
    return torch.log_softmax(cached_logits(decoder, prompt, len(prompt), width, "bf16"), -1)


@pytest.mark.parametrize("width", WIDTHS)
def test_scores_are_those_of_a_direct_pass(tiny_server: ServeCommand, decoder: Decoder, width: int) -> None:
    prompts = [prompt_of(length) for length in (1, 2, 63, 64, 65, 300, 511)]
    for prompt, choice in zip(prompts, score(tiny_server, prompts, width), strict=True):
        expected = direct_log_probabilities(decoder, prompt, width)
        values, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert values[0] is None
        assert len(values) == len(tops) == len(prompt) + 1
        for position in range(1, len(prompt)):
            wanted = expected[position - 1]
            assert abs(values[position] - float(wanted[prompt[position]])) < 1e-3
            assert abs(max(tops[position].values()) - float(wanted.max())) < 1e-3
        # The harness finds out whether a token was the greedy choice by comparing for equality.
        greedy = [value == max(top.values()) for value, top in zip(values[1:-1], tops[1:-1], strict=True)]
        assert greedy == (expected.argmax(-1)[:-1] == torch.tensor(prompt[1:])).tolist()


def test_a_multiple_choice_is_decided_as_directly(tiny_server: ServeCommand, decoder: Decoder) -> None:
    rng = random.Random(5)
    questions = [
        (rng.choices(range(4, 512), k=20), [rng.choices(range(4, 512), k=rng.randint(1, 6)) for _ in range(4)])
        for _ in range(12)
    ]
    through_server, directly = [], []
    for context, endings in questions:
        choices = score(tiny_server, [context + ending for ending in endings], 4)
        sums = [sum(choice["logprobs"]["token_logprobs"][len(context) : -1]) for choice in choices]
        through_server.append(sums.index(max(sums)))
        sums = []
        for ending in endings:
            expected = direct_log_probabilities(decoder, context + ending, 4)
            sums.append(sum(float(expected[len(context) + i - 1, token]) for i, token in enumerate(ending)))
        directly.append(sums.index(max(sums)))
    assert through_server == directly
    assert len(set(directly)) > 1
