"""Who answers a batch: a server that runs somewhere, or an engine that is started for it, in this process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import httpx

from engine.config import Config
from server.client import Client
from server.connect import open_async_client
from server.settings import Settings

NO_HURRY = httpx.Timeout(10, read=None, pool=None)  # a long queue is no error


@asynccontextmanager
async def running_server(url: str, api_key: str | None, most: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server at `url`. Raises ClientError if none is there, or it does not know the key."""
    with closing(Client(url, api_key, None, {})) as client:
        client.find_model()
    async with open_async_client(url, api_key, "/v1", NO_HURRY, most) as found:
        yield found


@asynccontextmanager
async def own_engine(config: Config, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application itself, without a socket. Raises SlipstreamError if an engine can't start."""
    from engine.async_engine import AsyncEngine
    from server.app import create_app
    from server.metrics import Metrics

    created = int(time.time())
    engines = {
        engine.model.name: AsyncEngine(engine, cache_dir=settings.cache_dir, created=created)
        for engine in config.engines()
    }
    app = create_app(engines, settings, Metrics(config.kv))
    async with app.router.lifespan_context(app):
        await app.state.service.lifecycle.settled()
        key = next(iter(settings.keys), None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://batch/v1", headers=headers) as client:
            yield client
