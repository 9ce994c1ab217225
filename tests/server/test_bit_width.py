"""Header, body field and alias name one width; every answer says which it was."""

import pytest

from anybit.engine.precision import Precision
from tests.server.fake_engine import WIDTHS, FakeEngine


def ask(server, headers=None, path="/v1/completions", **fields):
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    return server.http.post(path, json={**prompt, "max_tokens": 4, "seed": 1, **fields}, headers=headers or {})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("width", WIDTHS)
def test_three_forms_reach_the_engine_as_one(server, width, path):
    texts = set()
    for response in (
        ask(server, {"X-Bit-Width": str(width)}, path),
        ask(server, path=path, bit_width=width),
        ask(server, path=path, bit_width=str(width)),
        ask(server, path=path, model=f"tiny@{width}bit"),
        ask(server, {"X-Bit-Width": str(width)}, path, model=f"tiny@{width}bit", bit_width=width),
    ):
        assert response.status_code == 200, response.text
        assert response.headers["x-bit-width"] == str(width)
        assert response.headers["x-kv-format"] == "bf16"
        assert response.json()["usage"]["bit_width"] == width
        assert response.json()["system_fingerprint"].endswith(f"-w{width}")
        assert server.engine.requests[-1].precision.bit_width == width
        texts.add(str(response.json()["choices"]))
    assert len(texts) == 1


def test_at_least_a_width_is_asked_for_in_all_three_forms(server):
    for response in (
        ask(server, {"X-Bit-Width": "at-least-4"}),
        ask(server, bit_width="at-least-4"),
        ask(server, model="tiny@at-least-4bit"),
    ):
        assert response.status_code == 200, response.text
        assert response.headers["x-bit-width"] == "at-least-4"
        assert response.json()["usage"]["bit_width"] == 4
        assert server.engine.requests[-1].precision == Precision(4, at_least=True)
    assert ask(server, {"X-Bit-Width": "at-least-4"}, bit_width=4).status_code == 400
    assert ask(server, {"X-Bit-Width": "at-least-5"}).status_code == 400
    assert 'bit_width="at-least-4"' in server.http.get("/metrics").text


def test_default_width_is_the_engines(server):
    response = ask(server)
    assert response.headers["x-bit-width"] == "4"
    assert server.engine.requests[-1].precision.bit_width == 4


def test_stream_carries_the_width(server):
    response = ask(server, {"X-Bit-Width": "3"}, stream=True)
    assert response.headers["x-bit-width"] == "3"
    assert "x-request-id" in response.headers


def test_answer_names_the_model_as_asked(server):
    assert ask(server, model="tiny@3bit").json()["model"] == "tiny@3bit"
    assert ask(server, model="tiny").json()["model"] == "tiny"
    assert ask(server).json()["model"] == "tiny"


def test_errors_after_the_width_is_known_carry_it(server):
    response = ask(server, bit_width=3, max_tokens=100_000)
    assert response.status_code == 400
    assert response.headers["x-bit-width"] == "3"


@pytest.mark.parametrize(
    ("headers", "fields", "param"),
    [
        ({"X-Bit-Width": "5"}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": "garbage"}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": ""}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": "-4"}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": "04"}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": "4.0"}, {}, "X-Bit-Width"),
        ({"X-Bit-Width": "9" * 5000}, {}, "X-Bit-Width"),
        ({}, {"bit_width": 5}, "bit_width"),
        ({}, {"bit_width": -4}, "bit_width"),
        ({}, {"bit_width": 10**30}, "bit_width"),
        ({}, {"bit_width": "four"}, "bit_width"),
        ({}, {"model": "tiny@5bit"}, "model"),
        ({}, {"model": "tiny@bit"}, "model"),
        ({}, {"model": "tiny@٤bit"}, "model"),
    ],
)
def test_unknown_width_names_those_on_offer(server, headers, fields, param):
    response = ask(server, headers, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "on offer are 2, 3, 4, 8." in error["message"]
    assert error["param"] == param
    assert len(error["message"]) < 300


@pytest.mark.parametrize("bit_width", [True, 4.0, [4], {}])
def test_width_of_another_type_is_refused(server, bit_width):
    response = ask(server, bit_width=bit_width)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "bit_width"


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"X-Bit-Width": "3"}, {"bit_width": 4}),
        ({"X-Bit-Width": "3"}, {"model": "tiny@4bit"}),
        ({}, {"model": "tiny@4bit", "bit_width": 8}),
    ],
)
def test_widths_that_disagree_are_refused(server, headers, fields):
    response = ask(server, headers, **fields)
    assert response.status_code == 400
    assert "disagrees with itself" in response.json()["error"]["message"]


def test_header_given_twice_must_agree(server):
    body = {"prompt": "Hi", "max_tokens": 1}
    response = server.http.post("/v1/completions", json=body, headers=[("X-Bit-Width", "3"), ("X-Bit-Width", "4")])
    assert response.status_code == 400
    response = server.http.post("/v1/completions", json=body, headers=[("X-Bit-Width", "3"), ("X-Bit-Width", "3")])
    assert response.headers["x-bit-width"] == "3"


@pytest.mark.parametrize("model", ["other", "tiny2", "tiny@", "tiny@4", "other@4bit", "", "tiny@4bit@4bit"])
def test_unknown_model_is_404(server, model):
    response = ask(server, model=model)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        ({}, {}, "bf16"),
        ({"X-KV-Format": "bf16"}, {"kv_format": "bf16"}, "bf16"),
        ({"X-KV-Format": "qet4"}, {}, "qet4"),
        ({}, {"kv_format": "qet4"}, "qet4"),
    ],
)
def test_served_kv_formats_are_accepted_in_both_forms(start, headers, fields, expected):
    engine = FakeEngine()
    server = start(engine)
    response = ask(server, headers, **fields)
    assert response.status_code == 200
    assert response.headers["X-KV-Format"] == expected
    assert [request.kv_format for request in engine.requests] == [expected]


def test_forms_that_disagree_about_the_kv_format_are_refused(server):
    response = ask(server, {"X-KV-Format": "bf16"}, kv_format="qet4")
    assert response.status_code == 400
    assert "bf16 and qet4" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "fields"), [({"X-KV-Format": "qet3"}, {}), ({}, {"kv_format": "int8"}), ({"X-KV-Format": ""}, {})]
)
def test_other_kv_formats_are_refused(server, headers, fields):
    response = ask(server, headers, **fields)
    assert response.status_code == 400
    assert "on offer are bf16, qet4" in response.json()["error"]["message"]
