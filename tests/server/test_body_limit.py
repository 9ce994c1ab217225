"""The size and the patience of a request body."""

import json
import socket
import time

import httpx


def test_60_mb_body_is_413_before_it_is_read(server):
    body = b'{"prompt": "' + b"x" * 60_000_000 + b'"}'
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["message"] == "The request body is larger than the 2097152 bytes this server takes."
    assert error["code"] == "body_too_large"
    assert response.headers["x-request-id"]


def test_60_mb_body_without_a_length_is_413_too(server):
    chunks = (b"x" * 1_000_000 for _ in range(60))
    response = server.http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_refusal_does_not_wait_for_the_body(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_body_at_the_limit_is_read(start):
    server = start(max_body_bytes=4096)
    for size, status in ((4096, 400), (4097, 413)):
        body = json.dumps({"prompt": ""}).ljust(size).encode()
        response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status


def test_limit_holds_on_every_route(server):
    assert server.http.request("GET", "/health", content=b"x" * 3_000_000).status_code == 413


def test_slow_body_is_given_up(start):
    server = start(body_timeout_seconds=0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = connection.makefile("rb")
        assert answer.readline().startswith(b"HTTP/1.1 400 ")
        assert any(b"did not arrive in time" in line for line in answer)


def test_client_that_leaves_inside_its_body_is_forgotten(server):
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    time.sleep(0.05)
    assert server.complete().status_code == 200


def test_chunked_body_is_put_together(server):
    chunks = (part for part in (b'{"prom', b'pt": "Hel', b'lo"}'))
    response = server.http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_connection_is_reused_after_ordinary_requests(server):
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
        assert client.get("/health").status_code == 200
