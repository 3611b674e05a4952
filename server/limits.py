"""How much each caller may ask for: requests and tokens a minute, and requests at once.

Every API key has an account, made at the start: what is kept does not grow with callers. A bucket fills evenly and
holds a minute's worth. A prompt's tokens are taken before it is queued, an answer's when it has ended: a long answer
may leave a debt, which the next requests wait for. Headers and errors are OpenAI's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from starlette.types import Scope

from server.auth import CALLER, caller_id
from server.errors import REQUEST_ID, ApiError
from server.limit_settings import ANONYMOUS, UNNAMED, KeyLimits
from server.settings import Settings

LEASE = "slipstream.lease"  # in the scope of an exchange that counts
LIMITS = ("requests", "tokens", "concurrency")
RATE_HEADERS = tuple(
    f"x-ratelimit-{about}-{what}" for about in ("limit", "remaining", "reset") for what in ("requests", "tokens")
)
BUSY_SECONDS = 1.0  # when to come back where nobody knows


class Bucket:
    """Holds `limit` at most and gains as much in a minute. Below 0 it is in debt."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def take(self, count: int) -> None:
        """Whether it is there or not; a negative count gives back."""
        self._level = min(self.limit, self.level - count)

    def seconds_until(self, count: float) -> float:
        return max(0.0, (count - self.level) * 60 / self.limit)


class Account:
    """What one key has left. Belongs to one event loop."""

    def __init__(self, name: str, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self.name = name
        self.leases: set[Lease] = set()
        self._most = limits.concurrent_requests
        counts = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._buckets = {what: Bucket(limit, clock) for what, limit in counts.items() if limit is not None}

    @property
    def counts_tokens(self) -> bool:
        return "tokens" in self._buckets

    def admit(self, lease: Lease) -> None:
        """Let one request in; its lease counts until it is released. Raises Limited, and counts nothing then."""
        if self._most is not None and len(self.leases) >= self._most:
            raise self._limited("concurrency", f"{len(self.leases)} of {self._most} requests at once", BUSY_SECONDS)
        requests, tokens = self._buckets.get("requests"), self._buckets.get("tokens")
        if requests is not None and requests.level < 1:
            raise self._limited("requests", _per_minute(requests, 1), requests.seconds_until(1))
        if tokens is not None and tokens.level < 1:
            raise self._limited("tokens", _per_minute(tokens, 1), tokens.seconds_until(1))
        if requests is not None:
            requests.take(1)
        self.leases.add(lease)

    def charge(self, tokens: int) -> None:
        """Take the tokens of prompts. Raises Limited, and takes nothing then."""
        bucket = self._buckets.get("tokens")
        if bucket is None:
            return
        if tokens > bucket.limit:
            message = f"Request too large: it has {tokens} prompt tokens, and this key may use {bucket.limit} a minute."
            raise Limited("tokens", self.name, message, {"x-should-retry": "false", **self.headers()})
        if bucket.level < tokens:
            raise self._limited("tokens", _per_minute(bucket, tokens), bucket.seconds_until(tokens))
        bucket.take(tokens)

    def spend(self, tokens: int) -> None:
        """Take the tokens of an answer, which are used already; a negative number gives back."""
        if (bucket := self._buckets.get("tokens")) is not None:
            bucket.take(tokens)

    def headers(self) -> dict[str, str]:
        """x-ratelimit-* of the limits that there are."""
        told = {}
        for what, bucket in self._buckets.items():
            told[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
            told[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{what}"] = duration(bucket.seconds_until(bucket.limit))
        return told

    def _limited(self, limit: str, used: str, seconds: float) -> Limited:
        wait = {
            "retry-after": str(max(1, math.ceil(seconds))),
            "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
        }
        message = f"Rate limit reached: {used}. Please try again in {duration(max(seconds, 0.001))}."
        return Limited(limit, self.name, message, {**wait, **self.headers()})


class Limited(ApiError):
    """429. `limit` is one of LIMITS; `key` the name of the account."""

    def __init__(self, limit: str, key: str, message: str, headers: Mapping[str, str]) -> None:
        kind = "tokens" if limit == "tokens" else "requests"
        super().__init__(429, message, code="rate_limit_exceeded", headers=headers, kind=kind)
        self.limit = limit
        self.key = key


@dataclass(eq=False, slots=True)
class Lease:
    """One exchange that an account has let in. `request_ids`: what it has given to engines."""

    account: Account
    exchange: str  # the X-Request-Id of its response
    path: str
    began: float = field(default_factory=time.monotonic)
    request_ids: list[str] = field(default_factory=list)

    def release(self) -> None:
        """The exchange is over, however it ended. Releasing twice is fine."""
        self.account.leases.discard(self)


class Accounts:
    """All of them, by caller (see `auth.KeyRing.check`)."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        limits, named = settings.limits, settings.limits.keys
        unnamed = settings.keys[: len(settings.keys) - len(named)]
        self._by_caller = {
            caller_id(key): Account(UNNAMED.format(place), limits.default, clock)
            for place, key in enumerate(unnamed, 1)
        }
        for name, own in named.items():
            caller = caller_id(own.api_key.get_secret_value())
            self._by_caller[caller] = Account(name, own.over(limits.default), clock)
        if not self._by_caller:
            self._by_caller[""] = Account(ANONYMOUS, limits.default, clock)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._by_caller.values())

    @property
    def leases(self) -> list[Lease]:
        """Of all requests with a body that are being answered."""
        return [lease for account in self for lease in account.leases]

    @property
    def count_tokens(self) -> bool:
        return any(account.counts_tokens for account in self)

    def admit(self, scope: Scope) -> None:
        """Let a request in whose caller is known; its lease is in the scope from then on. Raises Limited."""
        lease = Lease(self._by_caller[scope[CALLER]], scope.get(REQUEST_ID, ""), scope["path"])
        lease.account.admit(lease)
        scope[LEASE] = lease


def lease_of(scope: Scope) -> Lease | None:
    found: Lease | None = scope.get(LEASE)
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    seconds = math.ceil(seconds * 1000) / 1000
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def _per_minute(bucket: Bucket, asked: int) -> str:
    left = max(0, math.floor(bucket.level))
    return f"{left} of {bucket.limit} a minute are left, and this needs {asked}"
