"""Which AnyBit this is."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from anybit.engine.precision import Precision


@cache
def anybit_version() -> str:
    """The installed version; "0.0.0" when the package runs from a source tree that was never installed."""
    try:
        return version("anybit")
    except PackageNotFoundError:
        return "0.0.0"


def system_fingerprint(precision: Precision) -> str:
    """What a seeded answer depends on besides the request: the version and the width."""
    return f"anybit-{anybit_version()}-w{precision.label}"
