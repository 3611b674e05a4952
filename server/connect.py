"""How our own commands reach a server: over TCP, with TLS, or at a unix socket."""

from __future__ import annotations

import httpx

UNIX = "unix:"


def open_client(url: str, api_key: str | None, path: str = "", timeout: httpx.Timeout | float = 10.0) -> httpx.Client:
    """A client of the server at `url`: http://..., https://..., HOST:PORT, or unix:PATH of a socket's file.

    `path` is put behind it, unless it ends so already. Raises httpx.InvalidURL.
    """
    base, socket = _target(url, path)
    transport = httpx.HTTPTransport(uds=socket) if socket else None
    return httpx.Client(base_url=base, headers=_headers(api_key), timeout=timeout, transport=transport)


def open_async_client(url: str, api_key: str | None, path: str, timeout: httpx.Timeout, most: int) -> httpx.AsyncClient:
    """The same for an event loop, with at most `most` connections."""
    base, socket = _target(url, path)
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    transport = httpx.AsyncHTTPTransport(uds=socket or None, limits=limits)
    return httpx.AsyncClient(base_url=base, headers=_headers(api_key), timeout=timeout, transport=transport)


def _target(url: str, path: str) -> tuple[str, str]:
    """The base of all URLs, and the file of a unix socket; empty where it is none."""
    socket = ""
    if url.startswith(UNIX):
        socket = url.removeprefix(UNIX)
        socket = f"/{socket.lstrip('/')}" if socket.startswith("//") else socket
        url = "http://localhost"
    url = url.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    return f"{url}{'' if url.endswith(path) else path}/", socket


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
