"""/tokenize, /detokenize, the root and the version; the OpenAPI document against its snapshot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.types import Health
from tests.server.fake_engine import BOS, HELLO, VOCAB, WORLD, FakeEngine, make_tokenizer
from tests.server.harness import error_of, make_app, serving

pytestmark = pytest.mark.asyncio
SNAPSHOT = Path(__file__).with_name("openapi.json")


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_and_back(prefix: str) -> None:
    async with serving(FakeEngine(tokenizer=make_tokenizer(bos=True))) as client:
        body = {"model": "tiny", "prompt": "Hello world", "return_token_strs": True}
        answer = (await client.post(f"{prefix}/tokenize", json=body)).json()
        plain = (await client.post(f"{prefix}/tokenize", json={"prompt": "Hello", "add_special_tokens": False})).json()
        chat = {"messages": [{"role": "user", "content": "Hello"}]}
        asked = (await client.post(f"{prefix}/tokenize", json=chat)).json()
        back = (await client.post(f"{prefix}/detokenize", json={"tokens": asked["tokens"]})).json()
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [BOS, HELLO, WORLD],
        "token_strs": ["<bos>", "Hello", " world"],
    }
    assert plain["tokens"] == [HELLO] and plain["token_strs"] is None
    assert back == {"prompt": "<user>Hello<assistant>"}


@pytest.mark.parametrize(
    "url, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "a" * (512 * 128 + 1)}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [[1]]}, "tokens[0]"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_what_is_refused(url: str, body: dict[str, object], param: str) -> None:
    async with serving() as client:
        assert error_of(await client.post(url, json=body), 400)["param"] == param


async def test_empty_inputs_are_fine_here() -> None:
    async with serving() as client:
        assert (await client.post("/tokenize", json={"prompt": ""})).json()["count"] == 0
        assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_root_and_version() -> None:
    async with serving() as client:
        assert (await client.get("/")).json()["name"] == "slipstream"
        assert list((await client.get("/version")).json()) == ["version"]
        assert (await client.get("/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_openapi_matches_its_snapshot() -> None:
    """After a change that is meant: delete the file, run this test twice and look at the difference."""
    schema = json.loads(json.dumps(make_app(FakeEngine()).openapi()))
    schema["info"].pop("version")
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
        pytest.fail("the snapshot was missing and has been written")
    assert schema == json.loads(SNAPSHOT.read_text())
    assert "422" not in SNAPSHOT.read_text()


async def test_metrics_tell_whether_the_engine_is_healthy() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        healthy = (await client.get("/metrics")).text
        engine.health_now = Health(False, False, "no step for 120 s")
        stuck = (await client.get("/metrics")).text
    series = 'slipstream:engine_healthy{engine="0",model_name="tiny"}'
    assert f"{series} 1.0" in healthy and f"{series} 0.0" in stuck


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
async def test_probes_may_use_head(path: str) -> None:
    async with serving(FakeEngine()) as client:
        seen, asked = await client.get(path), await client.head(path)
    assert asked.status_code == seen.status_code == 200
    assert asked.headers["content-type"] == seen.headers["content-type"]
