"""Wires a server together: engine process, application, listening socket, signals."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from anybit.engine.client import EngineClient
from anybit.engine.config import EngineConfig
from anybit.engine.errors import AnyBitError
from anybit.engine.logs import DEFAULT_LOGS, LogSettings
from anybit.engine.process_client import ProcessEngine
from anybit.engine.replaceable_engine import ReplaceableEngine
from anybit.engine.types import ModelInfo
from anybit.server.app import build_app
from anybit.server.config import ConfigError, ServerConfig
from anybit.server.service import Service
from anybit.server.upgrade import Upgrade, UpgradePlan

logger = logging.getLogger("anybit.server")
logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop lines say nothing a user needs


class DrainingServer(uvicorn.Server):
    """Finishes what it has accepted before it stops; a second signal stops at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or self._loop is None:
            super().handle_exit(sig, frame)
            return
        logger.info("Stopping: no new requests, waiting for those in progress (again to stop at once).")
        self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


async def run_server(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    logs: LogSettings = DEFAULT_LOGS,
    on_ready: Callable[[ModelInfo, str], None] = lambda model, url: None,
    plan: UpgradePlan | None = None,
) -> None:
    """Serve until a signal arrives. Raises an AnyBitError if the port is taken or the model cannot be loaded.

    What `plan` says is prepared meanwhile and then takes over, with the same settings.
    """
    failures: list[Exception] = []
    listener = _listen(server_config.host, server_config.port)

    async def start_engine(checkpoint: Path) -> EngineClient:
        config = replace(engine_config, checkpoint=checkpoint.as_posix())
        started = ProcessEngine(config, server_config.stall_seconds, logs)
        await started.start()
        return started

    engine = ReplaceableEngine(await start_engine(Path(engine_config.checkpoint)))
    upgrade = None if plan is None else Upgrade(plan, engine, start_engine, server_config.request_timeout_seconds)

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = build_app(engine, server_config, on_load_failure=stop, upgrade=upgrade)
    service: Service = app.state.service
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, server_header=False)
    server = DrainingServer(config, service)
    host, port = listener.getsockname()[:2]
    announcing = asyncio.create_task(_announce(engine, f"http://{host}:{port}", on_ready))
    # uvicorn raises the signal that stopped it once more when it is done; being told to stop is no failure.
    with contextlib.suppress(KeyboardInterrupt):
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            await server.serve(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)
            announcing.cancel()
            if upgrade is not None:
                await upgrade.stop()
            await engine.close()
    if failures:
        raise failures[0] if isinstance(failures[0], AnyBitError) else AnyBitError(str(failures[0]))


async def _announce(engine: EngineClient, url: str, on_ready: Callable[[ModelInfo, str], None]) -> None:
    with contextlib.suppress(AnyBitError):  # a failed start is told by the application
        on_ready(await engine.wait_ready(), url)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"The address {host}:{port} cannot be used ({error.strerror or error}); choose another --port."
        ) from error
