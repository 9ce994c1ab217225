"""How many bits of each weight a request reads."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Precision:
    """One request's weight precision; today a uniform bit-width, later also a named plan.

    A width enters the server as a header, a body field or a model alias; it becomes this value at the server's
    border and never travels as a string again.
    """

    bit_width: int

    @property
    def label(self) -> str:
        """The value of the `bit_width` metric label and of the `X-Bit-Width` response header."""
        return str(self.bit_width)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of what is computed under this precision: equal for equal plans, whatever they are called."""
        return hashlib.sha256(f"every layer: {self.bit_width}".encode()).hexdigest()
