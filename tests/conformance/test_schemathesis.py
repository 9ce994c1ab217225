"""Schemathesis against the server's own description: whatever it sends, never a 5xx, always a documented answer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_no_request_breaks_the_server(terse_server: Any, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("st")), "run", f"{terse_server.url}/openapi.json", "--url", terse_server.url,
        "--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--request-timeout", "120",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout[-8000:]
