"""Serving begins with a checkpoint made quickly; this makes a better one meanwhile and lets it take over."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from anybit.engine.client import EngineClient
from anybit.engine.errors import AnyBitError, CheckpointError
from anybit.engine.replaceable_engine import ReplaceableEngine
from anybit.engine.weights.manifest import read_manifest
from anybit.engine.weights.progress_file import PreparationProgress, clear_progress, read_progress, report_progress
from anybit.engine.weights.resolve import ResolvedModel
from anybit.server.companion import run_companion

logger = logging.getLogger("anybit.server")

_LOG_SECONDS = 30.0
_LOG_SHARE = 0.1
_FOLLOW_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class UpgradePlan:
    """What shall take over: `model` as `method` quantizes it, which `command` does."""

    method: str
    model: ResolvedModel
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UpgradeStatus:
    """How far the next checkpoint is: `share` (0 to 1) of a `stage`, of which the last is "load"."""

    method: str
    stage: str
    share: float


class Upgrade:
    """One change of checkpoint in a running server; `start` it once, `stop` it with the server."""

    def __init__(
        self,
        plan: UpgradePlan,
        engine: ReplaceableEngine,
        start_successor: Callable[[Path], Awaitable[EngineClient]],
        retire_seconds: float,
    ) -> None:
        """`start_successor` begins to load a checkpoint into a second engine; the first has `retire_seconds` to end."""
        self._plan = plan
        self._engine = engine
        self._start_successor = start_successor
        self._retire_seconds = retire_seconds
        self._log = ProgressLog(plan.method)
        self._status: UpgradeStatus | None = UpgradeStatus(plan.method, "start", 0.0)
        self._running: asyncio.Task[None] | None = None

    @property
    def status(self) -> UpgradeStatus | None:
        """None once there is nothing more to come."""
        return self._status

    def start(self) -> None:
        """Begin, in a task of its own."""
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give up what has not come to its end, and leave no process behind; safe to call twice."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._status = None

    async def _run(self) -> None:
        try:
            first = await self._engine.wait_ready()
        except AnyBitError:
            return  # told by whoever loads the model
        old, new = first.method, self._plan.method
        try:
            await self._prepare(old)
            await self._take_over(Path(first.checkpoint))
        except AnyBitError as error:
            logger.error("The change to the method %s failed, so %s goes on answering: %s", new, old, error)
            return
        except Exception:
            logger.exception("The change to the method %s failed, so %s goes on answering.", new, old)
            return
        finally:
            self._status = None
        logger.info("%s answers from now on; what runs already is finished by the engine with %s.", new, old)
        await self._engine.retire(self._retire_seconds)
        logger.info("The engine with %s has ended.", old)

    async def _prepare(self, old: str) -> None:
        """Return when the checkpoint is there; AnyBitError if it cannot be made."""
        model, new = self._plan.model, self._plan.method
        logger.info("%s answers while %s is prepared in the background.", old, new)
        while not model.is_prepared:
            # Another server may be at the same work: its result is waited for, or its work taken up if it ends early.
            progress = read_progress(model.checkpoint)
            if progress is not None:
                self._note(progress)
                await asyncio.sleep(_FOLLOW_SECONDS)
                continue
            # From now on others see that the work is being done, though the command takes seconds to begin it.
            report_progress(model.checkpoint, "start", 0, 1)
            try:
                await run_companion(self._plan.command, self._poll)
            except AnyBitError:
                if not model.is_prepared:  # else another process was quicker, and ours found its place taken
                    raise
            finally:
                clear_progress(model.checkpoint)
            if not model.is_prepared:
                raise CheckpointError(f"There is no checkpoint at {model.checkpoint} after it was made.")

    def _poll(self) -> None:
        progress = read_progress(self._plan.model.checkpoint)
        if progress is not None and progress.pid != os.getpid():
            self._note(progress)

    def _note(self, progress: PreparationProgress) -> None:
        self._status = UpgradeStatus(self._plan.method, progress.stage, progress.share)
        self._log.note(progress)

    async def _take_over(self, served: Path) -> None:
        """Return when a second engine answers; AnyBitError, and nothing has changed, if that cannot be."""
        method, checkpoint = self._plan.method, self._plan.model.checkpoint
        self._status = UpgradeStatus(method, "load", 0.0)
        # Tokenizer and limits stay those of the first: nothing but the weights may be new.
        if read_manifest(checkpoint).source_sha256 != read_manifest(served).source_sha256:
            raise CheckpointError(f"{checkpoint} was made from another source; start the server again to serve it.")
        logger.info("%s is prepared; a second engine loads it.", method)
        successor = await self._start_successor(checkpoint)
        try:
            await successor.wait_ready()
            self._engine.hand_over(successor)
        except BaseException:
            await successor.close()
            raise


class ProgressLog:
    """Writes a line when a stage begins, and then for every tenth of it or half a minute in which something was done."""

    def __init__(self, method: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._method = method
        self._clock = clock
        self._stage = ""
        self._share = 0.0
        self._logged_at = 0.0

    def note(self, progress: PreparationProgress) -> None:
        now, gained = self._clock(), progress.share - self._share
        is_due = gained >= _LOG_SHARE or (gained > 0 and now >= self._logged_at + _LOG_SECONDS)
        if progress.stage == self._stage and not is_due:
            return
        self._stage, self._share, self._logged_at = progress.stage, progress.share, now
        logger.info(
            "Preparing %s: %s %d %% (%d of %d).",
            self._method, progress.stage, progress.percent, progress.done, progress.total,
        )  # fmt: skip
