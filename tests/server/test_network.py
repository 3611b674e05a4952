"""TLS, unix sockets, proxies and prefixes: the real server on real sockets, over a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from engine.errors import ConfigError, SlipstreamError
from server.connect import open_client
from server.serving import Server, make_server
from server.settings import Settings
from server.startup import base_url, curl
from server.tls import Certificates
from server.unix_socket import listening_at
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, events, make_app

pytestmark = pytest.mark.asyncio


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    extra = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2", "-nodes"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", f"{name}.key"]
    openssl("req", "-x509", *key, "-out", f"{name}.pem", *extra, folder=folder)
    return folder / f"{name}.pem", folder / f"{name}.key"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_pair(folder, name) for name in ("first", "second")}


@contextlib.asynccontextmanager
async def listening(
    sockets: list[socket.socket] | None = None, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[tuple[Server, int]]:
    """A server that has started, and its port (0 for sockets of the test's own)."""
    app = make_app(engine or FakeEngine(), **settings)
    server = make_server(app, Settings(port=0, **settings))
    task = asyncio.ensure_future(server.serve(sockets))
    await app.state.service.lifecycle.settled()
    while not server.started:
        await asyncio.sleep(0)
    try:
        yield server, 0 if sockets else server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(task, 10)


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}")


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cert)


def served_name(port: int, cert: Path) -> str:
    """The common name of the certificate that a new connection is shown, trusting no other one than `cert`."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        trusting(cert).wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        shown: Any = secured.getpeercert()
        return str(dict(part[0] for part in shown["subject"])["commonName"])


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Do the two agree, without a socket between them? Raises ssl.SSLError where they do not."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (theirs, ours, theirs, ours):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ours.version() is not None and theirs.version() is not None


async def test_https(pairs: dict[str, tuple[Path, Path]]) -> None:
    cert, key = pairs["first"]
    async with listening(tls_cert=cert, tls_key=key) as (_, port):
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trusting(cert)) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            response = await client.post(CHAT_URL, json={**CHAT, "stream": True})
            assert events(response.text)[-1]["choices"][0]["finish_reason"] == "stop"

        def with_the_sdk() -> str | None:
            http = DefaultHttpxClient(verify=trusting(cert))
            with OpenAI(base_url=f"https://localhost:{port}/v1", api_key="x", http_client=http, max_retries=0) as sdk:
                return (
                    sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
                    .choices[0]
                    .message.content
                )

        assert await asyncio.to_thread(with_the_sdk) == "Hello, wörld!"
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get("/health")
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trusting(cert)) as client:
            assert (await client.get("/health")).status_code == 200  # a plain client has done no harm


async def test_old_protocols_are_refused(pairs: dict[str, tuple[Path, Path]]) -> None:
    found = Certificates(*pairs["first"], None)
    assert found.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert found.context.verify_mode is ssl.CERT_NONE


async def test_clients_show_a_certificate_where_one_is_asked_for(pairs: dict[str, tuple[Path, Path]]) -> None:
    cert, key = pairs["first"]
    authority, client_key = pairs["second"]
    async with listening(tls_cert=cert, tls_key=key, tls_client_ca=authority) as (_, port):
        known = trusting(cert)
        known.load_cert_chain(authority, client_key)
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=known) as client:
            assert (await client.get("/health")).status_code == 200
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trusting(cert)) as stranger:
            with pytest.raises(httpx.HTTPError):
                await stranger.get("/health")


async def test_a_new_certificate_is_taken_while_running(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    live = tmp_path / "live.pem", tmp_path / "live.key"

    def put(cert: Path, key: Path) -> None:
        for source, target in zip((cert, key), live, strict=True):
            fresh = target.with_suffix(".new")
            fresh.write_bytes(source.read_bytes())
            os.replace(fresh, target)

    put(*pairs["first"])
    async with listening(tls_cert=live[0], tls_key=live[1]) as (server, port):
        assert await asyncio.to_thread(served_name, port, pairs["first"][0]) == "first"
        put(*pairs["second"])

        async def told() -> str:
            with contextlib.suppress(ssl.SSLError):
                return await asyncio.to_thread(served_name, port, pairs["second"][0])
            return ""

        while await told() != "second":  # the server looks every two seconds
            await server.on_tick(0)
        assert (await server.on_tick(0)) is False


async def test_a_wrong_pair_leaves_the_old_one_in_use(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "c", tmp_path / "k"
    cert.write_bytes(pairs["first"][0].read_bytes())
    key.write_bytes(pairs["first"][1].read_bytes())
    found = Certificates(cert, key, None)
    assert found.refresh() is False
    key.write_bytes(pairs["second"][1].read_bytes())
    assert found.refresh() is False and "the key is not that of the certificate" in caplog.text
    caplog.clear()
    assert found.refresh() is False and not caplog.text  # told once
    cert.unlink()
    assert found.refresh() is False and "No such file" in caplog.text
    cert.write_bytes(pairs["second"][0].read_bytes())
    key.write_bytes(pairs["first"][1].read_bytes())
    assert found.refresh() is False
    assert shake_hands(found.context, trusting(pairs["first"][0]))
    key.write_bytes(pairs["second"][1].read_bytes())
    assert found.refresh() is True
    assert shake_hands(found.context, trusting(pairs["second"][0]))


async def test_what_is_wrong_with_a_certificate_is_told(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    cert, key = pairs["first"]
    nonsense, secret = tmp_path / "nonsense.pem", tmp_path / "secret.key"
    nonsense.write_text("nonsense")
    openssl("ec", "-in", str(key), "-out", str(secret), "-aes256", "-passout", "pass:x", folder=tmp_path)
    for wrong, message in (
        ((tmp_path / "none.pem", key, None), r"server\.tls_cert: .*none\.pem: No such file"),
        ((cert, tmp_path / "none.key", None), r"server\.tls_key: .*none\.key: No such file"),
        ((nonsense, key, None), r"server\.tls_cert, server\.tls_key: .*no PEM file"),
        ((cert, pairs["second"][1], None), "the key is not that of the certificate"),
        ((cert, secret, None), "the key is encrypted"),
        ((cert, key, nonsense), r"server\.tls_client_ca: .*nonsense\.pem: "),
        ((cert, key, tmp_path / "none"), r"server\.tls_client_ca: .*No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            Certificates(*wrong)


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path that leaves room for a socket's name."""
    folder = tmp_path_factory.mktemp("u")
    assert len(os.fsencode(folder)) < 80
    yield folder
    assert not list(folder.glob("*.sock"))  # whatever a test made is gone


async def test_a_unix_socket(short_folder: Path) -> None:
    path = short_folder / "s.sock"
    with listening_at(path, 0o600) as bound:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with listening([bound], trusted_proxies=("*",)):
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                response = await client.post(CHAT_URL, json={**CHAT, "stream": True})
                assert events(response.text)

            def by_our_own_client(url: str) -> int:
                with open_client(url, None, "/v1") as client:
                    return client.get("models").status_code

            assert await asyncio.to_thread(by_our_own_client, f"unix:{path}") == 200
            assert await asyncio.to_thread(by_our_own_client, f"unix://{path}") == 200
    assert not path.exists()


async def test_the_image_s_health_check_finds_the_server(
    pairs: dict[str, tuple[Path, Path]], short_folder: Path
) -> None:
    script = Path(__file__).parents[2] / "deploy/container/healthcheck.py"

    async def check(**environment: str) -> int:
        return await asyncio.to_thread(
            lambda: subprocess.run([sys.executable, "-I", script], env=environment, timeout=30).returncode
        )

    cert, key = pairs["first"]
    async with listening(tls_cert=cert, tls_key=key) as (_, port):
        assert await check(SLIPSTREAM_PORT=str(port), SLIPSTREAM_TLS_CERT=str(cert)) == 0
        assert await check(SLIPSTREAM_PORT=str(port)) == 1
    path = short_folder / "s.sock"
    with listening_at(path, 0o600) as bound:
        async with listening([bound]):
            assert await check(SLIPSTREAM_UDS=str(path)) == 0
    assert await check(SLIPSTREAM_UDS=str(path)) == 1


async def test_what_an_earlier_server_has_left(short_folder: Path) -> None:
    path = short_folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with listening_at(path, 0o660):
        with pytest.raises(SlipstreamError, match="Address already in use"), listening_at(path, 0o660):
            pass
        assert path.exists()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    assert not path.exists()


async def test_what_is_no_socket_is_left_alone(short_folder: Path) -> None:
    for name, make in (("file", lambda p: p.write_text("keep")), ("folder", lambda p: p.mkdir())):
        path = short_folder / name
        make(path)
        with pytest.raises(SlipstreamError, match="a file which is no socket"), listening_at(path, 0o660):
            pass
        assert path.exists()
    with pytest.raises(SlipstreamError, match="at most 107 bytes"), listening_at(short_folder / ("x" * 120), 0o660):
        pass
    missing = short_folder / "no" / "s.sock"
    with pytest.raises(SlipstreamError, match="No such file"), listening_at(missing, 0o660):
        pass


async def test_the_file_of_a_server_that_came_later_stays(short_folder: Path) -> None:
    path = short_folder / "s.sock"
    with listening_at(path, 0o660):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()
    path.unlink()


@pytest.mark.parametrize(
    "trusted, forwarded, address",
    [
        ((), "9.9.9.9", "127.0.0.1"),
        (("10.0.0.0/8",), "9.9.9.9", "127.0.0.1"),
        (("127.0.0.1",), "9.9.9.9", "9.9.9.9"),
        (("127.0.0.0/8", "8.8.8.8"), "1.2.3.4, 9.9.9.9, 8.8.8.8", "9.9.9.9"),
    ],
)
async def test_forwarded_addresses_count_from_trusted_proxies_alone(
    trusted: tuple[str, ...], forwarded: str, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(trusted_proxies=trusted, admin_key="root") as (_, port):
        headers = {"authorization": "Bearer root", "x-forwarded-for": forwarded, "x-forwarded-proto": "https"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            with caplog.at_level("INFO", "server.audit"):
                assert (await client.post("/admin/undrain")).status_code == 200
    assert f" by '{address}': done" in caplog.text


async def test_points_67_and_68_prefixes_slashes_and_compression() -> None:
    async with listening(root_path="/llm") as (_, port), client_of(port) as client:
        for url in ("/v1/models", "/v1/models/", "/llm/v1/models", "/llm/v1/models/", "/llm/load"):
            assert (await client.get(url)).status_code == 200, url
        for encoding in ("gzip", "br", "gzip, deflate, br, zstd", "identity;q=0, *;q=0", "nonsense"):
            headers = {"accept-encoding": encoding}
            response = await client.post("/llm" + CHAT_URL, json={**CHAT, "stream": True}, headers=headers)
            assert events(response.text) and "content-encoding" not in response.headers
            response = await client.post(CHAT_URL + "/", json=CHAT, headers=headers)
            assert response.json()["choices"] and "content-encoding" not in response.headers
        for url in ("/", "/health", "/ready", "/load", "/ping", "/version", "/metrics", "/is_sleeping"):
            response = await client.head(url)
            assert (response.status_code, response.content) == (200, b""), url


async def test_cors_tells_what_limits_say() -> None:
    limits = {"default": {"requests_per_minute": 5}}
    async with listening(cors_origins=("https://a.example",), limits=limits) as (_, port), client_of(port) as client:
        origin = {"origin": "https://a.example"}
        preflight = {**origin, "access-control-request-method": "DELETE"}
        assert (await client.options("/v1/models", headers=preflight)).status_code == 200
        response = await client.post(CHAT_URL, json=CHAT, headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        exposed = response.headers["access-control-expose-headers"]
        assert all(name in exposed for name in ("x-ratelimit-remaining-requests", "retry-after-ms"))
        assert response.headers["x-ratelimit-remaining-requests"] == "4"


async def test_where_a_client_finds_the_server() -> None:
    assert base_url("0.0.0.0", 1, True) == "https://127.0.0.1:1"
    assert base_url("::", 1, True) == "https://[::1]:1"
    line = curl("unix:/run/s p.sock", "m", needs_key=False)
    assert line.startswith("curl --unix-socket '/run/s p.sock' http://localhost/v1/chat/completions -H ")
