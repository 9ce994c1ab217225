"""Waiting for what another thread or process does soon."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], message: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.005)
