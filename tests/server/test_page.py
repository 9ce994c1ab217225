"""The page's files: served with headers that keep everything on this server, and asking for nothing elsewhere."""

import re
from pathlib import Path

import pytest

import anybit.server

WEB = Path(anybit.server.__path__[0]) / "web"
FILES = sorted(path.name for path in WEB.iterdir() if path.name != "index.html")
NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_page_is_served_with_strict_headers(server, path):
    response = server.http.get(path)
    assert response.status_code == 200
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert all(source in ("'none'", "'self'") for source in policy.values())
    assert response.headers["x-content-type-options"] == "nosniff"
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == kinds.get(Path(path).suffix, "text/html")


def test_every_link_of_the_page_is_local_and_answers(server):
    links = re.findall(r'(?:href|src)="([^"]*)"', server.http.get("/").text)
    assert {"page/style.css", "page/page.js", "openapi.json"} <= set(links)
    for link in links:
        assert re.fullmatch(r"[a-z][a-z0-9/._]*", link)  # relative, so that it works behind a prefix
        assert server.http.get(f"/{link}").status_code == 200


@pytest.mark.parametrize("name", FILES)
def test_files_name_no_other_place_and_import_what_is_there(name):
    text = (WEB / name).read_text().replace(NAMESPACE, "")
    assert "//" not in re.sub(r"(^|\s)// .*", "", text)
    for imported in re.findall(r'^import .* from "(.*)";$', text, re.MULTILINE):
        assert imported.removeprefix("./") in FILES


def test_page_needs_no_inline_code():
    text = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*src=)", text)


@pytest.mark.parametrize("name", ["missing.js", "index.html", "..%2fapp.py", "%2e%2e/app.py", ""])
def test_nothing_else_is_served(server, name):
    assert server.http.get(f"/page/{name}").status_code == 404
