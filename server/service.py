"""What a route may use: made once by `create_app` and kept on the application's state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from server.auth import KeyRing
from server.contract import Engine, Metrics
from server.errors import ApiError
from server.flights import Flights
from server.idempotency import Replays
from server.lifecycle import Lifecycle
from server.limits import Accounts
from server.responses.store import ResponseStore
from server.settings import Settings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class UnknownFields:
    """Says once per name that a request field was ignored; a client can't fill the log or the memory with it."""

    limit: int = 256
    _seen: set[str] = field(default_factory=set)

    def note(self, name: str) -> None:
        name = name[:64]
        if name not in self._seen and len(self._seen) < self.limit:
            self._seen.add(name)
            log.warning("ignored the unknown request field %s", ascii(name))


@dataclass(frozen=True, slots=True)
class Service:
    engines: Mapping[str, Engine]
    settings: Settings
    metrics: Metrics
    lifecycle: Lifecycle
    keys: KeyRing
    admins: KeyRing
    unknown_fields: UnknownFields
    responses: ResponseStore
    accounts: Accounts
    flights: Flights
    replays: Replays

    def engine(self, name: str | None) -> Engine:
        """The engine of a model; the first one when no name is given. Raises ApiError 404."""
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            message = f"The model '{name[:100]}' does not exist; this server has: {', '.join(self.engines)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.engines[name]


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
