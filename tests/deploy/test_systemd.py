"""systemd reads the unit without complaint and finds it well confined."""

import re
import subprocess
import sys
from pathlib import Path

from tests.fixtures.programs import require_program

UNIT = Path(__file__).parents[2] / "deploy/systemd/anybit.service"


def analyze(*arguments: str | Path) -> str:
    program = require_program("systemd-analyze", "systemd")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_unit_is_one_that_systemd_reads(tmp_path: Path) -> None:
    installed = tmp_path / UNIT.name
    program = Path(sys.executable).with_name("anybit")
    installed.write_text(UNIT.read_text().replace("ExecStart=/opt/anybit/bin/anybit", f"ExecStart={program}"))
    assert "anybit.service" not in analyze("verify", "--man=no", installed)


def test_service_is_confined() -> None:
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", analyze("security", "--offline=true", UNIT))
    assert exposure is not None
    assert float(exposure[1]) <= 4


def test_service_has_time_to_drain() -> None:
    assert "TimeoutStopSec=60" in UNIT.read_text()
    assert "KillMode=mixed" in UNIT.read_text()
