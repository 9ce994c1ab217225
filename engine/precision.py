"""How many bits of each weight a request reads."""

import hashlib
from dataclasses import dataclass

AT_LEAST = "at-least-"
"""Before a width: rows may be lifted to a wider one."""


@dataclass(frozen=True, slots=True, order=True)
class Precision:
    """One request's weight precision; today a uniform bit-width, later also a named plan.

    With `at_least` a step may compute the request's rows at the widest width that others in it need anyway: the bytes are
    read once in either case, but the answer depends on who else was there.

    A width enters the server as a header, a body field or a model alias; it becomes this value at the server's
    border and never travels as a string again.
    """

    bit_width: int
    at_least: bool = False

    @property
    def label(self) -> str:
        """The value of the `bit_width` metric label and of the `X-Bit-Width` response header."""
        return f"{AT_LEAST}{self.bit_width}" if self.at_least else str(self.bit_width)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of what is computed under this precision: equal for equal plans, whatever they are called."""
        return hashlib.sha256(f"every layer: {self.bit_width}".encode()).hexdigest()
