"""Whatever JSON arrives, the answer is 200 or says what is wrong, and the server goes on."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["user", "text", "auto", "tiny", "4", "bf16"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prompt", "messages", "model", "n", "best_of", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stream", "stream_options", "ignore_eos", "bit_width", "kv_format", "user",
    "metadata", "store", "logprobs", "echo", "suffix", "logit_bias", "tools", "response_format", "unheard_of",
]  # fmt: skip
VALID = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
}
# Mostly right requests with few wrong fields get further than wrong ones.
CHANGES = st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=2)


@pytest.mark.parametrize("path", VALID)
@given(changes=CHANGES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fields(server, path, changes):
    body = json.dumps({**VALID[path], **changes})
    check(server.http.post(path, content=body, headers={"Content-Type": "application/json"}))


@given(body=st.binary(max_size=60) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body(server, body):
    check(server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))


@given(
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"]),
    content=ANY_JSON | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": ANY_JSON}), max_size=3),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_message(server, role, content):
    body = json.dumps({"messages": [{"role": role, "content": content}], "max_tokens": 2})
    check(server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}))


def check(response):
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"].endswith(".")
        assert "None" not in error["message"].split()[:1]
        assert len(error["message"]) < 500
    elif not response.headers["content-type"].startswith("text/event-stream"):
        assert response.json()["choices"]
    else:
        assert response.text.endswith("data: [DONE]\n\n")
