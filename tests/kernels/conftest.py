from collections.abc import Iterator

import pytest

from tests.fixtures.threads import torch_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield
