"""The playground before real models: one that is drafted for, one that fills masks, one whose tokens are taken back.

Pictures of all of it, in both themes and two widths, are left in the folder that `tests/e2e/browser.py` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import yaml

from tests.e2e.browser import DESKTOP, PHONE, Browser
from tests.e2e.process import ROOT, ServerProcess
from tests.e2e.wire import Json, assert_idle

pytestmark = pytest.mark.browser

QUESTION = "List the days of the week."
SHEET = "Questions:\na) sum of 5 4 9 0 0\nb) sum of 7 3 9 8\nc) reverse 3 7 2 8 4\n"
CHECKPOINTS = ROOT / "checkpoints"
# What the page is told of a canvas, and the most masks that it ever showed.
WATCH = """
window.most = 0; window.states = new Set();
new MutationObserver(() => {
  const masks = document.querySelectorAll('.turn:last-child .t.masked:not([hidden])').length;
  window.most = Math.max(window.most, masks);
  window.states.add(masks);
}).observe(document.getElementById('turns'), {childList: true, subtree: true, attributes: true});
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model, always drafted for; the small model of configs/fast-dllm.yaml; and that one verifying what a
    block-causal one drafts."""
    full, block = str(CHECKPOINTS / "tiny-diffusion-full"), str(CHECKPOINTS / "tiny-diffusion-block")
    verified: Json = {"drafter": block, "verify": "both", "verify_threshold": 0.9, "drafter_steps": 8, "canvas": 96}
    draft: Json = {"path": str(CHECKPOINTS / "smollm2-135m-dflash"), "adaptive": False}
    config: Json = {
        "models": [
            {"id": "demo", "path": "demo", "pipeline": "speculative", "max_model_len": 1024, "draft": draft},
            {"id": "fills", "path": full, "diffusion": {"rule": "threshold", "cache": "dual", "canvas": 96}},
            {"id": "verifies", "path": full, "pipeline": "dual_diffusion", "diffusion": verified},
        ],
        "kv": {"memory": "160MiB"},
        "parallel": {"threads": 1},
    }
    for model, share in zip(config["models"], (0.6, 0.2, 0.2), strict=True):
        model["memory_share"] = share
    file = tmp_path_factory.mktemp("playground") / "models.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with ServerProcess("--config", str(file)) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


def visit(chromium: Browser, url: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False, model: str = "") -> None:
    chromium.look(size, dark=dark)
    chromium.open(url)
    if model:
        chromium.choose("#model-A", model)


def tokens_by_kind(chromium: Browser) -> Counter[str]:
    kinds = chromium.js("[...document.querySelectorAll('.said .t')].map((span) => span.dataset.mark)")
    return Counter(kinds)


def test_a_drafted_answer_streams_in_tinted_tokens(chromium: Browser, server: ServerProcess) -> None:
    visit(chromium, server.url)
    chromium.driver.execute_script("window.first = 0; window.steps = new Set(); new MutationObserver(() => {"
        " window.steps.add(document.querySelectorAll('.said .t').length); })"
        ".observe(document.getElementById('turns'), {childList: true, subtree: true})")  # fmt: skip
    chromium.choose('[data-path="max_tokens"] input[type=range]', "48")
    chromium.choose('[data-path="temperature"] input[type=range]', "0")
    chromium.ask(QUESTION)
    chromium.finished(60)
    assert chromium.js("window.steps.size") > 5, "it came in pieces"
    kinds = tokens_by_kind(chromium)
    assert kinds["d"] > 0 and kinds["p"] + kinds["c"] + kinds["b"] > 0
    facts = chromium.text(".facts")
    assert "tokens/s" in facts and "First token" in facts and "drafted" in facts
    assert chromium.all(".strip .bar") and chromium.all(".histogram rect")
    chromium.shot("demo-light")
    chromium.look(DESKTOP, dark=True)
    chromium.shot("demo-dark")
    chromium.look(PHONE, dark=True)
    assert chromium.fits()
    chromium.shot("demo-phone-dark")
    assert chromium.log() == []


def test_with_drafts_and_without_it_is_the_same_text(chromium: Browser, server: ServerProcess) -> None:
    visit(chromium, server.url, dark=True)
    chromium.choose('[data-pane="A"] [data-path="max_tokens"] input[type=range]', "40")
    chromium.choose('[data-pane="A"] [data-path="temperature"] input[type=range]', "0")
    chromium.find("#compare").click()
    chromium.ask(QUESTION)
    chromium.finished(60)
    assert "Same text" in chromium.text(".comparison") and "tokens/s" in chromium.text(".comparison")
    marks = "[...document.querySelectorAll('[data-pane={}] .said .t')].map((token) => token.dataset.mark)"
    drafted, plain = (set(chromium.js(marks.format(pane))) for pane in "AB")
    assert plain == {"p"} and "d" in drafted
    chromium.shot("compare-dark")
    assert chromium.log() == []


def test_masks_fill_in_live(chromium: Browser, server: ServerProcess) -> None:
    visit(chromium, server.url, model="fills")
    chromium.driver.execute_script(WATCH)
    chromium.choose('[data-path="diffusion.threshold"] input[type=range]', "1.1")  # one token a step
    chromium.driver.execute_script("window.pace = 50")
    chromium.ask(SHEET)
    chromium.until(lambda: chromium.js("window.states.size") > 20, "masks that become fewer")
    chromium.shot("filling-light")
    chromium.driver.execute_script("window.pace = 0")
    chromium.finished(60)
    assert chromium.js("window.most") > 60
    said = chromium.text(".said")
    body, report = chromium.asked()[0], chromium.text(".facts")
    assert body["diffusion"] == {"threshold": 1.1, "report": True, "trace": True}
    assert said.startswith("a) 5+4=9") and "Forward passes" in report
    steps = chromium.js("[...document.querySelectorAll('.said .t')].map((cell) => Number(cell.dataset.mark))")
    assert len(set(steps)) == len(steps) and steps != sorted(steps), "each came in a step of its own, in any order"
    assert chromium.all(".masked:not(.swatch)") == []
    chromium.choose('[data-path="diffusion.threshold"] input[type=range]', "0.5")
    chromium.find("#new-chat").click()
    chromium.ask(SHEET)
    chromium.finished(60)
    fewer = chromium.js("[...document.querySelectorAll('.said .t')].map((cell) => Number(cell.dataset.mark))")
    assert len(set(fewer)) < len(fewer)
    chromium.shot("filled-light")
    chromium.look(DESKTOP, dark=True)
    chromium.shot("filled-dark")
    chromium.look(PHONE, dark=False)
    assert chromium.fits()
    chromium.shot("filled-phone-light")
    assert chromium.log() == []


def test_the_canvas_comes_to_the_text_that_was_sent(chromium: Browser, server: ServerProcess) -> None:
    """Token by token, also where half a character is one; what stood behind the end is gone."""
    visit(chromium, server.url, model="fills")
    chromium.driver.execute_script(
        "window.sent = ''; const read = Response.prototype; const json = JSON.parse;"
        "JSON.parse = (text) => { const found = json(text);"
        " for (const choice of found.choices ?? []) window.sent += choice.delta?.content ?? ''; return found; }"
    )
    chromium.choose('[data-path="temperature"] input[type=range]', "1.6")  # nonsense, with all sorts of tokens
    chromium.ask(SHEET)
    chromium.finished(60)
    assert chromium.text(".said") == chromium.js("window.sent") != ""


def test_what_is_taken_back_is_seen(chromium: Browser, server: ServerProcess) -> None:
    visit(chromium, server.url, model="verifies", dark=True)
    chromium.driver.execute_script(WATCH)
    chromium.choose('[data-path="diffusion.threshold"] input[type=range]', "0.3")  # bold drafts
    chromium.ask(SHEET)
    chromium.finished(60)
    assert "Taken back" in chromium.text(".facts") and "taken back or replaced" in chromium.text(".answer .legend")
    again = chromium.all(".said .t.again")
    assert again and chromium.all(".gone-bar")
    chromium.driver.execute_script("arguments[0].focus()", again[0])
    assert "was taken back in step" in chromium.text("#tip")
    chromium.shot("taken-back-dark")
    assert chromium.log() == []


def test_two_rules_side_by_side(chromium: Browser, server: ServerProcess) -> None:
    visit(chromium, server.url, model="fills")
    chromium.find("#compare").click()
    chromium.ask(SHEET)
    chromium.finished(60)
    first, second = (body["diffusion"] for body in chromium.asked())
    assert "rule" not in first and second["rule"] == "quota"
    assert "faster" in chromium.text(".comparison")
    chromium.shot("compare-diffusion-light")
    assert chromium.log() == []
