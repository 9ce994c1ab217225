"""The Dockerfile's form, and its steps from an empty folder to an answered request."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.endtoend.command import environment, free_port
from tests.fixtures.tiny_llama import save_llama, tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "deploy/without_containers"
sys.path.insert(0, str(SCRIPTS))

from dockerfile import read_dockerfile  # noqa: E402

DOCKERFILE = read_dockerfile(ROOT / "Dockerfile")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_target_serves_as_a_user_of_its_own_and_tells_its_health(target: str) -> None:
    instructions = [instruction for stage in DOCKERFILE.lineage(target) for instruction in stage.instructions]
    by_name = {instruction.name: instruction for instruction in instructions}
    assert by_name["USER"].text == "anybit"
    assert by_name["ENTRYPOINT"].words == ["anybit", "serve"]
    assert by_name["CMD"].words == ["--device", target]
    assert by_name["VOLUME"].text == "/var/cache/anybit"
    assert "/health" in by_name["HEALTHCHECK"].text
    # What compiles the kernels stays behind.
    assert [stage.name for stage in DOCKERFILE.lineage(target)] == ["base", target]


def test_cpu_is_the_default_target() -> None:
    assert list(DOCKERFILE.stages)[-1] == "cpu"


def test_context_holds_what_is_copied_and_little_else() -> None:
    copied = {
        name
        for instruction in DOCKERFILE.stages["build"].instructions
        if instruction.name == "COPY"
        for name in instruction.words[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_steps_lead_from_an_empty_folder_to_an_answered_request(tmp_path: Path) -> None:
    """Installs everything anew, PyTorch included."""
    model = save_llama(tiny_llama(intermediate_size=128, tie_word_embeddings=True), tmp_path / "tiny-llama")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "run.py", "--target", "cpu", "--port", str(free_port()), tmp_path / "image",
         "--", model, "--method", "rtn", "--device", "cpu"],
        env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "left out: apt-get" in done.stdout
    assert "answered: " in done.stdout
    # Nothing but the folder was written to: the model was prepared in the image's volume.
    assert (tmp_path / "image/cpu/var/cache/anybit/checkpoints").is_dir()
    assert not (tmp_path / "cache").exists()
