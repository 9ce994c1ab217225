"""Web pages from elsewhere may ask where the server allows their origin, and nowhere else."""

import pytest

from anybit.server.config import ConfigError, ServerConfig

CHAT = "https://chat.example.com"


def preflight(server, origin: str):
    """What a browser asks before it sends a completion."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-bit-width",
    }
    return server.http.options("/v1/chat/completions", headers=headers)


def test_without_origins_no_page_from_elsewhere_may_ask(server):
    assert "access-control-allow-origin" not in preflight(server, CHAT).headers
    answer = server.http.get("/v1/models", headers={"Origin": CHAT})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_page_may_ask_and_read_what_the_server_says(start):
    server = start(allowed_origins=(CHAT,), api_keys=("right-key",))
    allowed = preflight(server, CHAT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == CHAT
    assert "x-bit-width" in allowed.headers["access-control-allow-headers"].lower()
    refused = preflight(server, "https://elsewhere.example.com")
    assert "access-control-allow-origin" not in refused.headers

    without_key = server.http.get("/v1/models", headers={"Origin": CHAT})
    assert without_key.status_code == 401
    assert without_key.headers["access-control-allow-origin"] == CHAT

    fields = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "stream": True}
    headers = {"Origin": CHAT, "Authorization": "Bearer right-key"}
    answer = server.http.post("/v1/completions", json=fields, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == CHAT
    exposed = answer.headers["access-control-expose-headers"]
    assert {"X-Request-Id", "X-Bit-Width", "X-KV-Format"} <= {name.strip() for name in exposed.split(",")}


def test_any_page_may_be_allowed(start):
    server = start(allowed_origins=("*",))
    assert preflight(server, CHAT).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["chat.example.com", "https://chat.example.com/", "ftp://a", "", "https://a b"])
def test_an_origin_is_a_scheme_and_a_host(origin, tmp_path):
    with pytest.raises(ConfigError, match=r"is no origin of web pages, such as https://chat\.example\.com, nor \*\."):
        ServerConfig("tiny", tmp_path, allowed_origins=(origin,))


def test_proxies_are_told_to_pass_a_stream_on_as_it_comes(server):
    answer = server.complete(max_tokens=4, stream=True)
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
