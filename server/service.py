"""What the routes share: the engine, the model's text side, the queue and the metrics of one server."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from starlette.requests import Request

from anybit.engine.client import EngineClient
from anybit.engine.errors import AnyBitError
from anybit.engine.types import EngineHealth, EngineState, ModelInfo
from anybit.server.admission import Admission
from anybit.server.chat_template import ChatTemplate, load_chat_template
from anybit.server.config import ServerConfig
from anybit.server.errors import Rejection, UnavailableError
from anybit.server.live_quality import LiveQuality
from anybit.server.metrics.exposition import Metrics
from anybit.server.request_record import log_request
from anybit.server.tokenizer import PromptTokenizer, load_tokenizer
from anybit.server.tracing import build_request_tracer
from anybit.server.upgrade import Upgrade

logger = logging.getLogger("anybit.server")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can answer: what the engine serves, and how text becomes its tokens."""

    info: ModelInfo
    tokenizer: PromptTokenizer
    chat_template: ChatTemplate


class Service:
    """One server's parts and its state; lives on the event loop."""

    def __init__(
        self,
        engine: EngineClient,
        config: ServerConfig,
        on_load_failure: Callable[[Exception], None] | None = None,
        upgrade: Upgrade | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.upgrade = upgrade
        self.admission = Admission(config.max_queued_requests, config.max_queued_tokens)
        self.metrics = Metrics(config.model_name, engine, lambda: self.ready)
        self.live_quality = (
            LiveQuality(engine, config.shadow_rate, self.metrics.quality) if config.shadow_rate > 0 else None
        )
        self.tracer = build_request_tracer(config.otlp_endpoint) if config.otlp_endpoint else None
        self.observers = [log_request] if self.tracer is None else [log_request, self.tracer.record]
        self.created = int(time.time())
        self._on_load_failure = on_load_failure
        self._model: LoadedModel | None = None
        self._failure = ""

    async def load(self) -> None:
        """Wait for the engine and read the tokenizer; a failure is kept for /health and given to on_load_failure."""
        try:
            # The tokenizer first: when it is missing, nobody should wait for gigabytes of weights to learn so.
            tokenizer, template = await asyncio.to_thread(self._load_text)
            info = await self.engine.wait_ready()
        except Exception as error:
            self._failure = str(error) if isinstance(error, AnyBitError) else "The model could not be loaded."
            logger.error("loading failed: %s", error, exc_info=not isinstance(error, AnyBitError))
            if self._on_load_failure is not None:
                self._on_load_failure(error)
            return
        self._model = LoadedModel(info, tokenizer, template)
        logger.info("%s is ready after %.1f s", self.config.model_name, info.load_seconds)

    def _load_text(self) -> tuple[PromptTokenizer, ChatTemplate]:
        tokenizer = load_tokenizer(self.config.checkpoint_dir)
        return tokenizer, load_chat_template(self.config.checkpoint_dir, tokenizer.special_tokens)

    @property
    def health(self) -> EngineHealth:
        """The engine's health, as far as this server can tell better than the engine itself."""
        health = self.engine.health()
        if self._failure:
            return EngineHealth(EngineState.LOST, self._failure, health.seconds_since_heartbeat)
        if health.state not in (EngineState.READY, EngineState.DRAINING):
            return health
        if health.seconds_since_heartbeat > self.config.stall_seconds:
            detail = f"The engine has been silent for {health.seconds_since_heartbeat:.0f} s."
            return EngineHealth(EngineState.STALLED, detail, health.seconds_since_heartbeat)
        if health.state is EngineState.READY and self._model is None:
            return EngineHealth(EngineState.LOADING, "", health.seconds_since_heartbeat)
        return health

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be let in."""
        return self.health.state is EngineState.READY and not self.admission.full

    def require_model(self) -> LoadedModel:
        """The model, if requests are accepted; raises UnavailableError."""
        health = self.health
        if health.state is EngineState.READY and self._model is not None:
            # After an upgrade the same text side belongs to other weights.
            info = self.engine.model or self._model.info
            return self._model if info is self._model.info else replace(self._model, info=info)
        match health.state:
            case EngineState.LOADING | EngineState.READY:
                raise UnavailableError(
                    "The model is still loading; try again later.", code="loading", reason=Rejection.LOADING
                )
            case EngineState.DRAINING:
                raise UnavailableError(
                    "The server is shutting down and accepts nothing new.", code="draining", reason=Rejection.DRAINING
                )
            case _:
                raise UnavailableError("The engine does not answer; the server must be restarted.", code="engine_lost")

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those accepted, as long as the configuration allows."""
        if self.live_quality is not None:
            await self.live_quality.stop()
        stopping = [] if self.upgrade is None else [self.upgrade.stop()]
        await asyncio.gather(self.engine.drain(self.config.drain_timeout_seconds), *stopping)

    async def close(self) -> None:
        """End what this server does beside answering."""
        if self.live_quality is not None:
            await self.live_quality.stop()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


def service_of(request: Request) -> Service:
    """The service that answers `request`."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the application was not made by build_app")
    return service
