"""TLS: the certificate of the server, checked before a model is loaded, and read anew when its files change."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from engine.errors import ConfigError
from server.settings import Settings

log = logging.getLogger(__name__)

ENCRYPTED = "the key is encrypted; give one that is not"


class Certificates:
    """The context of all connections. Those that are open keep what they began with."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Raises ConfigError naming the setting at fault."""
        self._cert, self._key = cert, key
        self._seen = self._stamp()
        self.context = _context()
        _load(self.context, cert, key)
        if client_ca is not None:
            try:
                self.context.load_verify_locations(client_ca)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"server.tls_client_ca: {client_ca}: {_reason(error)}") from error
            self.context.verify_mode = ssl.CERT_REQUIRED

    def refresh(self) -> bool:
        """Take the files' new content, if they have changed and fit together. True if it was taken."""
        found = self._stamp()
        if found == self._seen:
            return False
        self._seen = found
        try:
            _load(_context(), self._cert, self._key)  # a wrong pair must not spoil the one in use
            _load(self.context, self._cert, self._key)
        except ConfigError as error:
            log.warning("the old certificate stays in use: %s", error)
            return False
        log.info("a new certificate is in use from now on: %s", self._cert)
        return True

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Something that differs when a file was written or another one put in its place."""
        return tuple(_file_stamp(path) for path in (self._cert, self._key))


def certificates(settings: Settings) -> Certificates | None:
    """None where the settings have no certificate. Raises ConfigError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"server.{name}: {path}: {_reason(error)}") from error
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"server.tls_cert, server.tls_key: {cert}, {key}: {_reason(error)}") from error


def _no_password() -> str:
    """Without this a key that is encrypted would be asked for on the terminal."""
    raise ssl.SSLError(0, ENCRYPTED)


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        said = str(error.args[-1])
        if "KEY_VALUES_MISMATCH" in said:
            return "the key is not that of the certificate"
        return said if said == ENCRYPTED else f"no PEM file of that kind: {said}"
    return error.strerror or str(error)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
