"""The whole stack on a tiny checkpoint: `anybit serve`, the engine process, and the official client."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import APIStatusError

from tests.endtoend.command import ServeCommand

WIDTHS = (2, 3, 4, 6, 8)
PROMPTS = ("The quick brown fox", "Hello world, hello there", "One two three four", "jumps over the lazy dog. " * 8)


def complete(server: ServeCommand, prompt: str, width: int, max_tokens: int = 24, **fields: object) -> str:
    answer = server.openai.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"bit_width": width, "ignore_eos": True, **fields},
    )
    assert answer.usage is not None
    assert answer.usage.model_extra == {"bit_width": width}
    return answer.choices[0].text


def test_serve_widths_together_give_the_texts_of_each_alone(tiny_server: ServeCommand) -> None:
    jobs = [(prompt, width) for prompt in PROMPTS for width in WIDTHS]
    alone = [complete(tiny_server, prompt, width) for prompt, width in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: complete(tiny_server, *job), jobs))
    assert together == alone
    for prompt in PROMPTS:
        assert len({text for (asked, _), text in zip(jobs, alone, strict=True) if asked == prompt}) > 1


def test_serve_kv_formats_together_give_the_texts_of_each_alone(tiny_checkpoint: Path, cache: Path) -> None:
    formats = ("bf16", "qet4", "qet2")
    jobs = [(PROMPTS[3], width, name) for width in (4, 8) for name in formats]
    serve = ("--kv-format", "qet4", "--kv-formats", "bf16,qet2", "--model-name", "tiny", "--kv-cache-mib", "8")
    with ServeCommand(tiny_checkpoint, *serve, cache=cache) as server:
        alone = [complete(server, prompt, width, 96, kv_format=name) for prompt, width, name in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            together = list(pool.map(lambda job: complete(server, *job[:2], 96, kv_format=job[2]), jobs))
        assert together == alone
        assert complete(server, PROMPTS[3], 4, 96) == alone[1]  # what the server was started with
        with pytest.raises(APIStatusError, match="on offer are qet4, bf16, qet2"):
            complete(server, PROMPTS[3], 4, 96, kv_format="qet3")
        metrics = httpx.get(f"{server.url}/metrics").text
        assert httpx.get(f"{server.url}/version").json()["kv_formats"] == ["qet4", "bf16", "qet2"]
        assert "Balance weights of the keys were estimated" in server.log
        for name in ("qet4", "qet2"):
            assert server.metric("anybit_kv_sealed_pages_total", kv_format=name) > 0
            assert server.metric("anybit_kv_seal_seconds_total", kv_format=name) > 0
    for name in formats:
        assert f'anybit_kv_capacity_tokens{{kv_format="{name}",model="tiny"}}' in metrics


@pytest.mark.parametrize("width", WIDTHS)
def test_serve_streams_the_text_it_gives_whole(tiny_server: ServeCommand, width: int) -> None:
    whole = complete(tiny_server, PROMPTS[0], width)
    stream = tiny_server.openai.completions.create(
        model=f"tiny@{width}bit", prompt=PROMPTS[0], max_tokens=24, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_serve_logit_bias_forces_a_token_and_a_penalty_then_forbids_it(tiny_server: ServeCommand) -> None:
    forced = complete(tiny_server, PROMPTS[0], 4, max_tokens=6, logit_bias={"40": 100})
    assert forced == 6 * forced[:1]
    assert complete(tiny_server, PROMPTS[0], 4, max_tokens=6, logit_bias={"41": 100}) != forced
    varied = complete(tiny_server, PROMPTS[0], 4, max_tokens=6, logit_bias={"40": 1, "41": 1}, frequency_penalty=2)
    assert varied != forced


def test_serve_chat_says_the_width_it_served(tiny_server: ServeCommand) -> None:
    for width in WIDTHS:
        raw = tiny_server.openai.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            extra_headers={"X-Bit-Width": str(width)},
        )
        assert raw.headers["X-Bit-Width"] == str(width)
        assert raw.parse().system_fingerprint.endswith(f"-w{width}")  # type: ignore[union-attr]


def test_serve_seed_repeats_a_sampled_text(tiny_server: ServeCommand) -> None:
    def draw(seed: int) -> str:
        answer = tiny_server.openai.completions.create(
            model="tiny", prompt=PROMPTS[1], max_tokens=24, temperature=1.0, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    first = draw(7)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, [7] * 4)) == [first] * 4
    assert draw(8) != first


def test_serve_stop_string_ends_the_text_and_frees_the_pages(tiny_server: ServeCommand) -> None:
    text = complete(tiny_server, PROMPTS[2], 8, max_tokens=64)
    stop = text[10:13]
    cut = tiny_server.openai.completions.create(
        model="tiny@8bit", prompt=PROMPTS[2], max_tokens=64, temperature=0, stop=[stop], extra_body={"ignore_eos": True}
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    wait_until_idle(tiny_server)


def test_serve_disconnect_frees_the_pages(tiny_server: ServeCommand) -> None:
    with httpx.stream(
        "POST", f"{tiny_server.url}/v1/completions",
        json={"prompt": "Hello", "max_tokens": 400, "stream": True, "ignore_eos": True}, timeout=60,
    ) as response:  # fmt: skip
        next(response.iter_lines())
    wait_until_idle(tiny_server)
    assert tiny_server.metric("anybit_requests_total", outcome="abort") >= 1


def test_serve_too_long_prompt_is_refused_with_both_numbers(tiny_server: ServeCommand) -> None:
    with pytest.raises(APIStatusError) as caught:
        complete(tiny_server, "Hello world " * 400, 4)
    assert caught.value.status_code == 400
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message


def test_serve_sigterm_finishes_what_it_has_accepted(tiny_checkpoint: Path, cache: Path) -> None:
    with ServeCommand(tiny_checkpoint, cache=cache) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, server, PROMPTS[0], 4, 256)
        wait_for(lambda: server.metric("anybit_requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert len(running.result(60)) > 0
        assert server.process.wait(30) == 0


def test_serve_engine_killed_is_told_and_health_turns_503(tiny_checkpoint: Path, cache: Path) -> None:
    with ServeCommand(tiny_checkpoint, cache=cache) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, server, PROMPTS[0], 4, 400)
        wait_for(lambda: server.metric("anybit_requests_running") == 1)
        os.kill(engine_process(server.process.pid), signal.SIGKILL)
        with pytest.raises(APIStatusError) as caught:
            running.result(30)
        assert caught.value.status_code == 503
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/ready").status_code == 503


def test_serve_widths_option_loads_and_offers_only_those(
    tiny_checkpoint: Path, tiny_server: ServeCommand, cache: Path
) -> None:
    with ServeCommand(tiny_checkpoint, "--widths", "2,3,4", cache=cache) as server:
        assert server.metric("anybit_weights_bytes", kind="linear") < 0.6 * tiny_server.metric(
            "anybit_weights_bytes", kind="linear"
        )
        assert complete(server, PROMPTS[0], 4) == complete(tiny_server, PROMPTS[0], 4)
        with pytest.raises(APIStatusError) as caught:
            complete(server, PROMPTS[0], 8)
        assert caught.value.status_code == 400
        assert "2, 3, 4" in caught.value.message


def wait_until_idle(server: ServeCommand) -> None:
    wait_for(
        lambda: server.metric("anybit_requests_running") == 0 and server.metric("anybit_kv_cache_usage_ratio") == 0
    )


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def engine_process(server_pid: int) -> int:
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    return next(int(pid) for pid in children if "anybit.engine.process" in Path(f"/proc/{pid}/cmdline").read_text())
