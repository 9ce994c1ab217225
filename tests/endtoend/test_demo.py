"""The demo model with real weights, from nothing to text. Downloads some 90 MB."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from anybit.engine.models.registry import parse_config
from tests.endtoend.command import ServeCommand, run_anybit

pytestmark = pytest.mark.slow

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo-cache")


@pytest.fixture(scope="module")
def demo(demo_cache: Path) -> Iterator[ServeCommand]:
    """`anybit serve` on a machine that has never seen it: download, round to nearest, serve."""
    with ServeCommand("--method", "rtn", "--kv-formats", "bf16", cache=demo_cache, ready_timeout=900) as server:
        yield server


def ask(server: ServeCommand, question: str, width: int, max_tokens: int = 16) -> str:
    answer = server.openai.chat.completions.create(
        model=f"SmolLM2-135M-Instruct@{width}bit",
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def test_demo_knows_the_capital_of_france(demo: ServeCommand) -> None:
    assert "Paris" in ask(demo, "What is the capital of France?", 8)
    assert "Paris" in ask(demo, "What is the capital of France?", 4)


def test_demo_widths_together_give_the_texts_of_each_alone(demo: ServeCommand) -> None:
    questions = ("Why do cats purr?", "What makes bread rise?")
    jobs = [(question, width) for question in questions for width in WIDTHS]
    alone = [ask(demo, *job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(demo, *job), jobs))
    assert together == alone
    assert len(set(alone)) > len(questions)


def test_demo_holds_one_copy_of_its_weights(demo: ServeCommand) -> None:
    for width in WIDTHS:
        ask(demo, "Hello", width, max_tokens=2)
    weights = demo.metric("anybit_weights_bytes")
    separate = sum(demo.metric("anybit_weights_equivalent_bytes", bit_width=str(width)) for width in WIDTHS)
    assert weights < 0.4 * separate
    # Interpreter, libraries, working memory and the few pages in use come on top of the one copy, but no second one
    # of what the widths together would need.
    assert demo.metric("anybit_engine_resident_bytes") < weights + separate


def test_demo_second_start_quantizes_nothing(demo: ServeCommand, demo_cache: Path) -> None:
    result = run_anybit("inspect", "--method", "rtn", cache=demo_cache)
    assert result.returncode == 0, result.stderr
    assert "Quantizing" not in result.stderr
    assert "every hash verified" in result.stdout


def test_demo_broken_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    result = run_anybit("serve", cache=tmp_path / "cache")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "could not be downloaded" in result.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_demo_logits_agree_with_transformers_on_real_text(demo: ServeCommand, demo_cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from anybit.engine.evaluate.text import builtin_text
    from anybit.engine.evaluate.variant import Variant, next_log_probabilities, start_sequence
    from anybit.engine.models.decoder import build_decoder
    from anybit.engine.weights.loader import DenseLoader
    from anybit.engine.weights.open_source import open_source

    gguf = next((demo_cache / "sources").rglob("*.gguf"))
    source = open_source(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer(builtin_text())["input_ids"][:200]
    peer = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(peer(torch.tensor([ids])).logits[0], -1)

    decoder = build_decoder(parse_config(source.config), DenseLoader(source), 256)
    variant = Variant("float", decoder, 8, "float32", 32.0)
    sequence = start_sequence(ids, variant)
    # A prompt of 150 tokens, then decoding with the cache.
    counts = [150] + [1] * 50
    actual = torch.cat([next_log_probabilities(variant, sequence, count) for count in counts])
    assert (actual - expected).abs().max() < 5e-4


def test_demo_scores_real_text_as_a_direct_pass_does(demo: ServeCommand, demo_cache: Path) -> None:
    from anybit.engine.evaluate.text import builtin_text
    from anybit.engine.evaluate.variant import Variant, next_log_probabilities, start_sequence
    from anybit.engine.models.decoder import build_decoder
    from anybit.engine.weights.checkpoint import CheckpointReader
    from anybit.engine.weights.loader import NestedLoader

    (checkpoint,) = (path.parent for path in demo_cache.rglob("anybit.json"))
    text = builtin_text()[:1500]
    ids = httpx.post(f"{demo.url}/tokenize", json={"prompt": text}).json()["tokens"]
    config = parse_config(json.loads((checkpoint / "config.json").read_text()))
    decoder = build_decoder(config, NestedLoader(CheckpointReader(checkpoint), WIDTHS, 8), 512)
    for width in (8, 4):
        request = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "bit_width": width}
        request["kv_format"] = "bf16"
        answer = httpx.post(f"{demo.url}/v1/completions", json=request, timeout=300).json()
        values = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)])
        variant = Variant(str(width), decoder, width, "bf16", 0.0)
        direct = next_log_probabilities(variant, start_sequence(ids, variant), len(ids))
        expected = direct[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (values - expected).abs().max() < 1e-3


def test_demo_first_start_serves_at_once_and_changes_to_the_better_weights(demo_cache: Path) -> None:
    """Runs last: the full quantization takes minutes on two cores."""
    with ServeCommand(cache=demo_cache, ready_timeout=300) as server:
        (base, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert base["method"] == "rtn"
        assert ask(server, "What is the capital of France?", 8)
        deadline = time.monotonic() + 1800
        while base["method"] != "best":
            assert time.monotonic() < deadline, server.log
            time.sleep(2)
            (base, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert base["preparing"] is None
        assert "best" in server.log
        assert "Paris" in ask(server, "What is the capital of France?", 4)
        assert "Paris" in ask(server, "What is the capital of France?", 3)
    result = run_anybit("inspect", "--json", demo_cache / "inspect.json", cache=demo_cache)
    assert result.returncode == 0, result.stderr
    report = json.loads((demo_cache / "inspect.json").read_text())
    assert report["method"] == "best"
    # Round to nearest has more than a million at 2 bits, 146 at 3 and 34 at 4.
    bounds = {2: 250, 3: 50, 4: 33, 6: 28, 8: 27}
    assert all(row["perplexity"] < bounds[row["bit_width"]] for row in report["widths"])
