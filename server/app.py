"""The application: routes, middleware and lifespan around an engine that somebody else has made."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from anybit.engine.client import EngineClient
from anybit.engine.errors import AnyBitError
from anybit.server.auth import BearerAuthMiddleware
from anybit.server.config import ServerConfig
from anybit.server.errors import APIError, handle_api_error, handle_http_exception
from anybit.server.middleware import REQUEST_ID_HEADER, BodyLimitMiddleware, RequestContextMiddleware
from anybit.server.openapi import DescribedApp
from anybit.server.precision_request import BIT_WIDTH_HEADER, KV_FORMAT_HEADER
from anybit.server.routes import chat, completions, models, ops, page, tokens
from anybit.server.service import Service
from anybit.server.upgrade import Upgrade
from anybit.server.version import anybit_version


def build_app(
    engine: EngineClient,
    config: ServerConfig,
    on_load_failure: Callable[[Exception], None] | None = None,
    upgrade: Upgrade | None = None,
) -> FastAPI:
    """An application that serves `engine`; its Service is `app.state.service`.

    The lifespan loads in the background, so that /health answers meanwhile, and closes the engine at the end.
    `on_load_failure` is told when loading failed, for a caller that wants to stop then. `upgrade` runs beside it.
    """
    service = Service(engine, config, on_load_failure, upgrade)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        if upgrade is not None:
            upgrade.start()
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            if upgrade is not None:
                await upgrade.stop()
            await service.close()
            await engine.close()

    app = DescribedApp(
        title="AnyBit",
        version=anybit_version(),
        description="One nested checkpoint served at any bit-width, behind an OpenAI-compatible API.",
        lifespan=lifespan,
        # The interactive pages load scripts from elsewhere, and a redirect would be built from the Host header.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.guarded = bool(config.api_keys)
    for router in (completions.router, chat.router, models.router, tokens.router, ops.router, page.router):
        app.include_router(router)
    app.add_exception_handler(APIError, handle_api_error)
    app.add_exception_handler(AnyBitError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_exception)

    # The last one added is the outermost: context, then origin (browsers ask about it without a key), then key, then body.
    count_rejection = service.metrics.count_rejection
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=config.max_body_bytes,
        timeout_seconds=config.body_timeout_seconds,
        count_rejection=count_rejection,
    )
    if config.api_keys:
        app.add_middleware(
            BearerAuthMiddleware,
            keys=config.api_keys,
            open_paths=ops.OPEN_PATHS | page.OPEN_PATHS,
            count_rejection=count_rejection,
        )
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, BIT_WIDTH_HEADER, KV_FORMAT_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestContextMiddleware)
    return app
