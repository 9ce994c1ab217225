"""The server's process never loads torch, whatever it serves."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer

server = LiveServer(FakeEngine(), Path(sys.argv[1]))
statuses = [server.complete(stop="zzz").status_code, server.chat(stream=True).status_code]
statuses += [server.http.get(path).status_code for path in ("/", "/health", "/metrics", "/v1/models")]
server.stop()
heavy = [name for name in ("torch", "triton", "transformers", "numpy") if name in sys.modules]
print(json.dumps({"statuses": statuses, "heavy": heavy}))
"""


def test_serving_loads_no_torch(checkpoint):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '{"statuses": [200, 200, 200, 200, 200, 200], "heavy": []}'
