"""Keys guard every path but the page and two others, whatever else a request says about itself."""

import socket

import openai
import pytest

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(checkpoint):
    from tests.server.fake_engine import FakeEngine
    from tests.server.live_server import LiveServer

    live = LiveServer(FakeEngine(), checkpoint, api_keys=KEYS)
    yield live
    live.stop()


def raw_status(server, target: str, *headers: str) -> int:
    """The status for a request line and headers exactly as given."""
    lines = [f"GET {target} HTTP/1.1", *headers, "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/style.css", "/health", "/ready"])
def test_open_paths_need_no_key(guarded, path):
    assert guarded.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/metrics", "/version", "/openapi.json", "/nothing", "/v1/completions"]
)
def test_every_other_path_needs_one(guarded, path):
    response = guarded.http.get(path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(guarded, key):
    client = guarded.client(key)
    assert client.models.list().data
    assert client.completions.create(model="tiny", prompt="a").choices


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer FIRST-KEY",
        "Bearer first-key second-key",
        "Bearer first-ke",
        "Basic first-key",
        "first-key",
        "Bearer first-key\u00e9",
    ],
)
def test_wrong_keys_do_not(guarded, value):
    assert guarded.http.get("/v1/models", headers={"Authorization": value.encode("latin-1")}).status_code == 401


def test_two_keys_in_one_request_are_refused(guarded):
    headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")]
    assert guarded.http.get("/v1/models", headers=headers).status_code == 401


def test_scheme_is_case_insensitive(guarded):
    assert guarded.http.get("/v1/models", headers={"Authorization": "bearer first-key"}).status_code == 200


def test_official_client_sees_an_authentication_error(guarded):
    client = guarded.client("wrong")
    with pytest.raises(openai.AuthenticationError, match="Send a valid API key"):
        client.models.list()


@pytest.mark.parametrize(
    "host", ["x", "x/health?", "x/health#", "x/../health", "localhost/health", "x?/", "health", "x:80/ready?a="]
)
def test_host_header_does_not_change_the_path(guarded, host):
    assert raw_status(guarded, "/v1/models", f"Host: {host}") == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/health/../v1/models",
        "/page/../v1/models",
        "/page/page.js/",
        "/page/",
        "/page/missing.js",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "//health",
        "/health/",
        "/health/x",
        "/HEALTH",
        "/%2fv1/models",
        "/v1%2fmodels",
        "/health%00",
        "/health;/v1/models",
        "http://x/v1/models",
        "//x/v1/models",
    ],
)
def test_other_spellings_of_a_path_are_guarded(guarded, target):
    assert raw_status(guarded, target, "Host: x") == 401


def test_forwarding_headers_do_not_change_the_path(guarded):
    status = raw_status(
        guarded, "/v1/models", "Host: x", "X-Forwarded-Prefix: /health", "X-Original-URL: /health", "X-Rewrite-URL: /"
    )
    assert status == 401


def test_rejections_are_counted_without_the_key(guarded):
    guarded.http.get("/v1/models", headers={"Authorization": "Bearer guess-me"})
    text = guarded.http.get("/metrics", headers={"Authorization": "Bearer first-key"}).text
    assert 'anybit_rejections_total{model="tiny",reason="unauthorized"}' in text
    assert "guess-me" not in text
    assert "first-key" not in text


def test_body_is_not_read_without_a_key(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_server_without_keys_is_open(server):
    assert server.http.get("/v1/models").status_code == 200


def test_open_api_description_names_the_key(guarded):
    description = guarded.http.get("/openapi.json", headers={"Authorization": "Bearer first-key"}).json()
    assert description["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
