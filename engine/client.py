"""The one door from the server to an engine. Importing this module loads no torch."""

from collections.abc import AsyncIterator
from typing import Protocol

from anybit.engine.types import EngineHealth, EngineStats, GenerationRequest, ModelInfo, TokenEvent


class EngineClient(Protocol):
    """An engine as the server sees it. All methods are called on one event loop.

    Errors are those of `anybit.engine.errors`: EngineLoadingError, EngineDrainingError, EngineLostError and
    CapacityError from `generate`; a failure of one row arrives as a TokenEvent with FinishReason.ERROR.
    """

    @property
    def model(self) -> ModelInfo | None:
        """What is served; None until the engine is ready."""
        ...

    async def wait_ready(self) -> ModelInfo:
        """Return once weights are loaded; raises what the engine reported if loading failed."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Yield the sequence's events; closing the iterator early aborts the request."""
        ...

    async def abort(self, request_id: str) -> None:
        """Stop a sequence; unknown or finished ids are ignored. Its iterator ends with FinishReason.ABORT."""
        ...

    def stats(self) -> EngineStats:
        """The newest snapshot received."""
        ...

    def take_step_tokens(self) -> list[int]:
        """Tokens of every step since the previous call (bounded; for the step histogram)."""
        ...

    def health(self) -> EngineHealth: ...

    async def drain(self, timeout_seconds: float) -> None:
        """Accept nothing new and wait until all sequences ended or the time is up (then they are aborted)."""
        ...

    async def close(self) -> None:
        """End the engine; safe to call twice."""
        ...
