"""The application: engines, settings and metrics in, an ASGI app out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from engine.types import Phase
from server import errors
from server.auth import KeyRing
from server.contract import Engine, Metrics
from server.flights import Flights
from server.idempotency import Replays
from server.lifecycle import Lifecycle
from server.limits import RATE_HEADERS, Accounts
from server.messages import errors as messages
from server.middleware import Exchanges
from server.responses.store import ResponseStore
from server.routes import ADMIN_ROUTERS, ROUTERS
from server.service import Service, UnknownFields
from server.settings import Settings
from server.tracing import Tracer
from server.version import version


def create_app(
    engines: Mapping[str, Engine],
    settings: Settings,
    metrics: Metrics,
    *,
    on_phase: Callable[[Phase], None] = lambda _: None,
    on_ready: Callable[[], None] = lambda: None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Build the app. Its lifespan starts the engines in the background, and at the end drains and closes them.

    `on_phase` hears of every start-up phase, `on_ready` once when all engines are ready.
    """
    lifecycle = Lifecycle(engines, metrics, on_phase, on_ready)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        lifecycle.begin()
        try:
            yield
        finally:
            await lifecycle.drain(settings.drain_timeout)
            await lifecycle.close()

    app = FastAPI(
        title="Slipstream",
        version=version(),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = _service(engines, settings, metrics, lifecycle, tracer)
    routers = (*ROUTERS, *(ADMIN_ROUTERS if settings.admin_secrets else ()))
    for router in routers:
        app.include_router(router)
    errors.install(app, [*app.routes, *(route for router in routers for route in router.routes)])
    _surround(app, settings, metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # the way that FastAPI documents
    return app


def _service(
    engines: Mapping[str, Engine], settings: Settings, metrics: Metrics, lifecycle: Lifecycle, tracer: Tracer | None
) -> Service:
    accounts = Accounts(settings)
    for account in accounts:
        metrics.watch_key(account.name, partial(len, account.leases))
    flights = Flights(engines.values(), tracer, counts_tokens=accounts.count_tokens)
    return Service(
        engines,
        settings,
        metrics,
        lifecycle,
        KeyRing(settings.keys),
        KeyRing(settings.admin_secrets),
        UnknownFields(),
        ResponseStore(settings.stored_responses, settings.stored_response_bytes),
        accounts,
        flights,
        Replays(settings.idempotency_seconds),
    )


def _surround(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """The middlewares; the last one that is added is the outermost."""
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms", *RATE_HEADERS],
        )
    app.add_middleware(Exchanges, metrics=metrics, root_path=settings.root_path, log_requests=settings.log_requests)


def _openapi(app: FastAPI) -> dict[str, object]:
    """FastAPI's schema, with our errors (400, OpenAI's shape) in place of its own (422)."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        parts = schema.setdefault("components", {}).setdefault("schemas", {})
        parts.pop("HTTPValidationError", None)
        parts.pop("ValidationError", None)
        parts["Error"], parts["MessagesError"] = errors.SCHEMA, messages.SCHEMA
        for name, path in schema["paths"].items():
            shape = "MessagesError" if messages.speaks({"path": name}) else "Error"
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
            for operation in path.values():
                if operation["responses"].pop("422", None):
                    operation["responses"]["4XX"] = {"description": "The request is at fault.", "content": content}
                    operation["responses"]["5XX"] = {"description": "The server is at fault.", "content": content}
        app.openapi_schema = schema
    return app.openapi_schema
