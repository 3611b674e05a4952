"""The playground when the server wants a key, goes away, or fails in the middle; and parts of it by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import EngineDead
from tests.e2e.browser import DESKTOP, Browser
from tests.e2e.scripted import ScriptedServer
from tests.server.fake_engine import FakeEngine
from tests.server.test_reasoning import thinker

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.look(DESKTOP, dark=False)
    yield chromium
    chromium.log()


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(browser: Browser) -> None:
    with ScriptedServer(FakeEngine(), api_key="sk-right") as server:
        browser.driver.get(f"{server.url}/")
        browser.until(lambda: browser.find("#key-dialog").is_displayed(), "the dialog")
        assert "API key" in browser.text("#key-note")
        browser.find("#key").send_keys("sk-wrong\n")
        browser.until(lambda: "Incorrect" in browser.text("#key-note"), "the refusal")
        browser.find("#key").clear()
        browser.find("#key").send_keys("sk-right\n")
        browser.until(lambda: not browser.js("document.getElementById('send').disabled"), "the models")
        browser.ask("hi")
        browser.finished()
        assert browser.text(".answer .said") == "Hello, wörld!"
        assert browser.js("Object.values(sessionStorage)") == ["sk-right"] and browser.js("localStorage.length") == 0
        assert browser.js("document.cookie") == "" and "sk-right" not in browser.js(
            "document.documentElement.outerHTML"
        )
        assert "sk-right" not in browser.text(".request")
        browser.open(server.url)  # again, in the same tab
        browser.find("#open-key").click()
        browser.find("#key-forget").click()
        browser.until(lambda: browser.find("#key-dialog").is_displayed(), "the dialog, for there is no key any more")
        assert browser.js("sessionStorage.length") == 0


def test_a_failure_in_the_middle_keeps_what_came(browser: Browser) -> None:
    engine = FakeEngine(answer="word " * 300, stands=(4,), max_model_len=4096)
    with ScriptedServer(engine) as server:
        browser.open(server.url)
        server.later(engine.flowing.clear)
        browser.ask("hi")
        browser.until(lambda: engine.submitted, "the request")
        server.later(lambda: engine.fail("the engine died"))
        browser.finished()
        assert browser.find(".answer").get_attribute("data-state") == "failed"
        assert "not available" in browser.text(".alert p") and browser.text(".alert button") == "Try again"
        server.later(engine.flowing.set)


def test_a_server_that_shuts_down_or_is_gone_is_told(browser: Browser) -> None:
    with ScriptedServer(FakeEngine()) as server:
        browser.open(server.url)
        browser.until(lambda: browser.text("#status-text") == "ready", "the state")
    browser.ask("anybody there?")
    browser.finished()
    assert "does not answer" in browser.text(".alert") and browser.text(".alert button") == "Try again"
    browser.until(lambda: browser.text("#status-text") == "not reachable", "the state")
    assert browser.find("#status").get_attribute("data-state") == "gone"
    with ScriptedServer(FakeEngine(), port=server.port) as server:
        browser.until(lambda: browser.text("#status-text") == "ready", "the server is back")
        browser.find(".alert button").click()
        browser.until(lambda: browser.text(".answer .said") == "Hello, wörld!", "the answer")
        server.engine.refusal = EngineDead("x")
        browser.ask("again")
        browser.finished()
        assert "not available" in browser.text(".turn:last-child .alert")


def test_thoughts_are_folded_and_tool_calls_are_shown(browser: Browser) -> None:
    """A thought is apart from the answer, both by tokens; and so is what it calls, which is never run."""
    with ScriptedServer(thinker()) as server:
        browser.open(server.url)
        browser.ask("Why?")
        browser.finished()
        assert browser.text(".answer .said") == "Because." and browser.text(".reasoning .text") == "Why? Ünd so."
        assert browser.js("document.querySelector('.reasoning').open") is False
        browser.find(".reasoning summary").click()
        marked = "[...document.querySelectorAll(arguments[0])].map((token) => token.textContent).join('')"
        assert browser.js(marked, ".answer .said .t") == "Because."
        assert browser.js(marked, ".reasoning .t") == "Why? Ünd so."
        assert browser.text(".reasoning summary") == f"Reasoning, {len('Why? Ünd so.'.encode()) + 1} tokens"
        browser.driver.execute_script(
            "const read = JSON.parse; const call = {name: 'f<b>', arguments: '{\"x\": 1}'};"
            "const calls = [{index: 0, id: 'c', function: call}];"
            "JSON.parse = (text) => { const found = read(text); for (const choice of found.choices ?? []) "
            "if (choice.finish_reason) choice.delta = {...choice.delta, tool_calls: calls}; return found; }"
        )
        browser.ask("Call it.")
        browser.finished()
        assert browser.text(".turn:last-child .calls") == 'Calls f<b>{"x": 1}'


def run_in_page(browser: Browser, script: str) -> Any:
    """`script` is the body of an async function, in which `load(name)` imports one of the page's modules."""
    wrapped = f"""
    const done = arguments[arguments.length - 1];
    const folder = new URL('.', document.querySelector('script[type=module]').src);
    const load = (name) => import(new URL(name, folder));
    (async () => {{ {script} }})().then(done, (error) => done(`failed: ${{error.stack}}`));
    """
    return browser.driver.execute_async_script(wrapped)


@pytest.fixture(scope="module")
def quiet() -> Iterator[ScriptedServer]:
    with ScriptedServer(FakeEngine()) as server:
        yield server


def test_events_are_read_however_the_bytes_are_cut(browser: Browser, quiet: ScriptedServer) -> None:
    """Every ending of lines, comments, several data lines, characters of several bytes; cut at each byte."""
    browser.open(quiet.url)
    text = ': hi\\n\\ndata: {"a": "wörld 🎈"}\\n\\nevent: x\\r\\ndata:two\\r\\ndata: lines\\r\\n\\r\\n'
    text += "id: 5\\rdata: cr\\r\\rdata: [DONE]\\n\\ndata: unfinished"
    script = f"""
    const {{ events }} = await load('sse.js');
    const bytes = new TextEncoder().encode('{text}');
    const read = async (cuts) => {{
      const body = new ReadableStream({{ start(flow) {{
        let from = 0;
        for (const cut of [...cuts, bytes.length]) {{ flow.enqueue(bytes.slice(from, cut)); from = cut; }}
        flow.close();
      }} }});
      const found = [];
      for await (const event of events(body)) found.push(event);
      return JSON.stringify(found);
    }};
    const all = new Set([await read([]), await read([...bytes.keys()].slice(1))]);
    for (let cut = 1; cut < bytes.length; cut += 1) all.add(await read([cut]));
    return [...all];
    """
    (found,) = run_in_page(browser, script)
    assert json.loads(found) == ['{"a": "wörld 🎈"}', "two\nlines", "cr", "[DONE]"]


def test_reading_is_linear_enough_and_never_more_than_text(browser: Browser, quiet: ScriptedServer) -> None:
    """Hostile Markdown is done with at once, and nothing of it is lost that a reader would miss."""
    browser.open(quiet.url)
    script = """
    const { reading } = await load('markdown.js');
    const hostile = ['>'.repeat(20000), '*'.repeat(20000), '`'.repeat(20000), '[a]('.repeat(5000), '**a '.repeat(5000),
      '# '.repeat(9000), '- '.repeat(9000), '1. '.repeat(9000), '\\n'.repeat(20000), '```', '> '.repeat(9000) + '`x'];
    const began = performance.now();
    for (const text of hostile) reading(text);
    const spent = performance.now() - began;
    const page = document.createElement('div');
    const text = '# Title\\n\\nA *b* **c** `d` [e](f)\\n- one\\n- two\\n\\n3. three\\n\\n> quote\\n\\n```\\n<x>\\n```';
    page.append(...reading(text));
    return [spent, page.textContent, [...page.querySelectorAll('*')].map((e) => e.localName).join(' ')];
    """
    spent, text, names = run_in_page(browser, script)
    assert spent < 10_000
    assert text == "TitleA b c d e (f)onetwothreequote<x>"
    assert names == "h3 p em strong code span ul li li ol li blockquote p pre code"


def test_two_texts_part_where_their_characters_do(browser: Browser, quiet: ScriptedServer) -> None:
    browser.open(quiet.url)
    pairs = [["same", "same"], ["", ""], ["a🎈b", "a🎈c"], ["ab", "abc"], ["", "x"], ["🎈", "🎉"]]
    script = (
        f"const {{ parting }} = await load('compare.js'); return {json.dumps(pairs)}.map(([a, b]) => parting(a, b));"
    )
    assert run_in_page(browser, script) == [-1, -1, 2, 2, 0, 0]
