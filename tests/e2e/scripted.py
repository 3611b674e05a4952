"""A real server on a loopback port, in a thread of this process, over an engine whose answers a test writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from server.launch import listen
from server.serving import Server, make_server
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.harness import make_app


class ScriptedServer:
    """uvicorn as `server.serving` runs it. As a context manager it drains at the end.

    Set `engine.answer` between requests: a text, or token ids, which may hold EOS anywhere.
    """

    def __init__(self, engine: FakeEngine | None = None, port: int = 0, **settings: Any) -> None:
        self.engine = engine or FakeEngine()
        sockets = listen("127.0.0.1", port)
        self.port: int = sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = Settings(host="127.0.0.1", port=self.port, log_requests=False, **settings)
        self._sockets = sockets
        self._started = threading.Event()
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="scripted server", daemon=True)

    def _run(self) -> None:
        asyncio.run(self._serve())

    def later(self, task: Callable[[], object]) -> None:
        """Run `task` in the server's own thread, as what touches a running engine must be."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(task)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Events of asyncio belong to the loop that first waits for them, which is this thread's.
        app = make_app(self.engine, **self._settings.model_dump(exclude_unset=True))
        self._server = make_server(app, self._settings)
        serving = asyncio.ensure_future(self._server.serve(self._sockets))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.005)
        await app.state.service.lifecycle.settled()
        self._started.set()
        await serving

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._started.wait(20), "the scripted server did not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
