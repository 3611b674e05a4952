"""The playground's page and files over HTTP: who gets them, for how long, and under which policy."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from server.routes import playground
from tests.server.fake_engine import FakeEngine
from tests.server.harness import error_of, make_app, serving, started

pytestmark = pytest.mark.asyncio
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
FACTS = {"name", "version", "docs", "api"}
FOLDER = Path(playground.__file__).parents[1] / "playground"


def links(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="([^"#]*playground/[^"]+)"', page)


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER["accept"], True),
        ("text/html", True),
        ("TEXT/HTML; q=0.5", True),
        ("application/xhtml+xml", True),
        ("*/*", False),  # curl
        ("application/json", False),
        ("application/json, text/html;q=0", False),
        ("text/*", False),
        ("", False),
        (",;,text/htmlx", False),
    ],
)
async def test_a_browser_gets_the_page_and_others_the_facts(accept: str, html: bool) -> None:
    async with serving() as client:
        answer = await client.get("/", headers={"accept": accept})
        head = await client.head("/", headers={"accept": accept})
    assert answer.status_code == head.status_code == 200
    assert answer.headers["content-type"] == head.headers["content-type"]
    assert answer.headers["content-type"] == ("text/html; charset=utf-8" if html else "application/json")
    assert answer.headers["vary"] == "accept"
    assert html or set(answer.json()) == FACTS


async def test_every_file_of_the_page_is_there_and_may_be_kept() -> None:
    async with serving() as client:
        page = await client.get("/", headers=BROWSER)
        found = links(page.text)
        assert {link.rpartition("/")[2] for link in found} == {"icon.svg", "style.css", "theme.js", "app.js"}
        digest = found[0].split("/")[1]
        names = {path.name for path in FOLDER.iterdir()} - {"index.html"}
        for name in sorted(names):
            answer = await client.get(f"/playground/{digest}/{name}")
            assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert answer.headers["content-type"] == playground.TYPES[Path(name).suffix]
            for imported in re.findall(r'from "\./([^"]+)"', answer.text):
                assert imported in names, f"{name} imports {imported}"
        again = await client.get("/", headers={**BROWSER, "if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert page.headers["cache-control"] == "no-cache"


async def test_other_paths_are_not_files() -> None:
    async with serving() as client:
        digest = links((await client.get("/", headers=BROWSER)).text)[0].split("/")[1]
        names = ("index.html", "..%2Fapp.py", "../../app.py", "%00", "x" * 5000)
        wrong = [f"/playground/{digest}/{name}" for name in names]
        for path in (*wrong, "/playground/app.js", f"/playground/{digest[:-1]}0/app.js", f"/playground/{digest}"):
            assert (await client.get(path)).status_code == 404, path
        assert error_of(await client.post(f"/playground/{digest}/app.js"), 405)["code"] == "method_not_allowed"


async def test_the_policy_is_strict_on_all_of_it() -> None:
    async with serving() as client:
        page = await client.get("/", headers=BROWSER)
        for answer in (page, await client.get(f"/{links(page.text)[0]}"), await client.head("/", headers=BROWSER)):
            rules = dict(
                rule.strip().partition(" ")[::2] for rule in answer.headers["content-security-policy"].split(";")
            )
            assert rules == {
                "default-src": "'none'",
                **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
                "img-src": "'self' data:",
                **dict.fromkeys(("frame-ancestors", "base-uri", "form-action", "trusted-types"), "'none'"),
                "require-trusted-types-for": "'script'",
            }
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"


async def test_the_page_holds_nothing_that_the_policy_forbids() -> None:
    """No inline script or style, no handler attributes, no other host, and nothing that makes markup of text."""
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://[^\"'\s)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert hosts == set(), path.name
        if path.suffix == ".html":
            assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", text) == []
        if path.suffix == ".js":
            assert (
                re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []
            )


async def test_it_can_be_switched_off() -> None:
    async with serving(playground=False) as client:
        assert set((await client.get("/", headers=BROWSER)).json()) == FACTS
        digest = playground.page().digest
        assert (await client.get(f"/playground/{digest}/app.js")).status_code == 404


async def test_a_prefix_is_in_front_of_every_link_and_a_key_is_not_asked_for() -> None:
    app = make_app(FakeEngine(), root_path='/a/"b', api_key="sk-right")
    async with started(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        page = await client.get("/", headers=BROWSER)
        assert all(link.startswith("/a/&quot;b/playground/") for link in links(page.text.replace('&quot;"', "")))
        assert (await client.get(links(page.text)[0].replace("/a/&quot;b", ""))).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
