"""Five times as many requests as there is room for: the accepted ones are answered, the rest are told to come back."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.endtoend.command import ServeCommand
from tests.endtoend.test_serving import wait_until_idle

RUNNING, QUEUED = 4, 8


def test_accepted_requests_finish_and_the_rest_get_429(tiny_checkpoint: Path, cache: Path) -> None:
    with ServeCommand(
        tiny_checkpoint, "--max-num-seqs", str(RUNNING), "--max-queued-requests", str(QUEUED), cache=cache
    ) as server:
        body = {"prompt": "Hello world", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

        def ask(_: int) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)

        num_asked = 5 * (RUNNING + QUEUED)
        with ThreadPoolExecutor(num_asked) as pool:
            responses = list(pool.map(ask, range(num_asked)))
        statuses = Counter(response.status_code for response in responses)
        assert set(statuses) == {200, 429}
        # The queue is let in; what has its first token by then, or has finished, makes room for more.
        assert QUEUED <= statuses[200] < num_asked
        texts = {response.json()["choices"][0]["text"] for response in responses if response.status_code == 200}
        assert len(texts) == 1
        for response in responses:
            if response.status_code == 429:
                assert 1 <= int(response.headers["Retry-After"]) <= 60
                assert response.json()["error"]["code"] == "queue_full"
        wait_until_idle(server)
        assert server.metric("anybit_rejections_total", reason="queue_full") == statuses[429]
        assert ask(0).status_code == 200
