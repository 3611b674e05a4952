"""GET / and the files of the playground. Open without a key: the page asks for one and sends it with its requests.

A browser at `/` gets the page, anything else what it always got: a few facts as JSON. The page's files lie below a
folder that is named after what is in them, so that they can be kept for ever, and none is read while serving.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import ApiError
from server.service import service_of
from server.version import version

FOLDER = Path(__file__).parents[1] / "playground"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No markup can be made of text at all: `require-trusted-types-for` switches innerHTML and its like off.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SAFE = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
FOR_EVER, ALWAYS_ASK = "public, max-age=31536000, immutable", "no-cache"
PLACE = "@assets@"  # in the page: where its files lie

router = APIRouter(tags=["operations"])


@dataclass(frozen=True, slots=True)
class Page:
    """The files by their names, without the page itself, and a digest of all of them."""

    index: str
    files: Mapping[str, bytes]
    digest: str


@cache
def page() -> Page:
    found = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    whole = hashlib.sha256()
    for name, data in found.items():
        whole.update(f"{name} {len(data)} ".encode() + data)
    index = found.pop("index.html").decode("utf-8")
    return Page(index, found, whole.hexdigest()[:16])


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def root(request: Request) -> Response:
    """The playground for who reads HTML; else something to see with curl."""
    settings = service_of(request).settings
    if not (settings.playground and _reads_html(request.headers.get("accept", ""))):
        facts = {"name": "slipstream", "version": version(), "docs": "/docs", "api": "/v1"}
        return JSONResponse(facts, headers={"vary": "accept"})
    shown = page()
    # Relative where nothing is known of a proxy, so that a prefix which it takes away does no harm.
    place = f"{settings.root_path}/playground/{shown.digest}".lstrip("" if settings.root_path else "/")
    body = shown.index.replace(PLACE, html.escape(place)).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {**SAFE, "cache-control": ALWAYS_ASK, "etag": tag, "vary": "accept"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers={**headers, "content-type": TYPES[".html"]})


@router.api_route("/playground/{digest}/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(digest: str, name: str, request: Request) -> Response:
    """One of the page's files. Another digest is that of another version: its parts would not fit together."""
    shown = page()
    if not service_of(request).settings.playground or digest != shown.digest or name not in shown.files:
        raise ApiError(404, "Not Found", code="not_found")
    headers = {**SAFE, "cache-control": FOR_EVER, "etag": f'"{digest}"', "content-type": TYPES[Path(name).suffix]}
    return Response(shown.files[name], headers=headers)


def _reads_html(accept: str) -> bool:
    """Does the header name HTML, with any weight but 0? `*/*`, as curl sends it, does not."""
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        if kind in ("text/html", "application/xhtml+xml"):
            return not any(
                parameter.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for parameter in parameters
            )
    return False
