"""The playground in a real browser, before a server whose model is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from selenium.webdriver.common.keys import Keys

from engine.errors import InvalidRequest
from server.errors import ApiError
from tests.e2e.browser import DESKTOP, PHONE, Browser
from tests.e2e.scripted import ScriptedServer
from tests.server.fake_engine import EOS, VERIFIERS, FakeEngine

pytestmark = pytest.mark.browser

ANSWER = "Hello, wörld!"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "<svg/onload=alert(1)> &lt; [x](javascript:alert(1)) **<b>bold</b>** `<i>code</i>`\n"
    "# <iframe src=//example.org>\n- <a href=//example.org>link</a>\n</div></body> \u202e\u0000 {{7}}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(FakeEngine(stands=(2, 0, 4), verifier="strict", max_model_len=2048)) as server:
        yield server


@pytest.fixture
def page(chromium: Browser, server: ScriptedServer) -> Iterator[Browser]:
    """The page as a new visitor gets it; at the end nothing has been said to the console."""
    server.engine.answer, server.engine.refusal = ANSWER, None
    chromium.look(DESKTOP, dark=False)
    chromium.open(server.url)
    yield chromium
    assert chromium.log() == []


def test_every_token_shows_where_it_came_from(page: Browser) -> None:
    page.ask("Greet the world.")
    page.finished()
    spans = page.all(".answer .said .t")
    kinds = [(span.get_attribute("class") or "").split()[1] for span in spans]
    # Hello | , _ w | (half of ö) | ö r l d ! | the end, which has no text
    assert kinds == ["t-p", "t-d", "t-d", "t-c", "t-d", "t-d", "t-d", "t-d", "t-b"]
    assert page.text(".answer .said") == ANSWER
    legend = page.text(".answer .legend")
    assert all(part in legend for part in ("accepted 7", "corrected 2", "bonus 1", "plain 1")), legend
    assert "7 of 16 drafted (44 %)" in page.text(".facts") and "strict · lossless" in page.text(".badge")
    bars = [bar.get_attribute("aria-label") for bar in page.all(".strip .bar")]
    assert bars[1] == "Round 2. 2 of 4 drafted tokens stood. then one corrected" and len(bars) == 5
    assert "0 accepted: 1; 1 accepted: 1; 2 accepted: 1; 3 accepted: 0; 4 accepted: 1" in (
        str(page.find(".histogram").get_attribute("aria-label"))
    )


def test_origins_differ_by_more_than_colour(page: Browser) -> None:
    page.ask("Greet the world.")
    page.finished()
    line = "getComputedStyle(document.querySelector('.answer .said .t-' + arguments[0])).textDecorationStyle"
    none = "getComputedStyle(document.querySelector('.answer .said .t-p')).textDecorationLine"
    assert [page.js(line, letter) for letter in "dcb"] == ["solid", "wavy", "double"] and page.js(none) == "none"
    page.find(".actions button:nth-of-type(2)").click()
    assert page.js("getComputedStyle(document.querySelector('.answer .said .t-c'), '::after').content") == '"c"'


def test_what_a_model_says_stays_text(page: Browser, server: ScriptedServer) -> None:
    """In the answer, formatted, in the question, in what is sent on, and in an error message."""
    server.engine.answer = HOSTILE
    page.ask("<b>hi</b><script>document.title='owned'</script>")
    page.finished()
    shown = HOSTILE.replace("\u0000", page.text(".answer .said")[len(HOSTILE.split("\u0000")[0])])
    assert page.text(".answer .said") == shown
    page.find(".actions button:nth-of-type(3)").click()
    assert "<iframe src=//example.org>" in page.text(".reading h3")
    assert page.text(".reading strong") == "<b>bold</b>" and page.text(".reading code") == "<i>code</i>"
    foreign = "document.querySelectorAll('#turns :is(img, script, iframe, a, form, style, p b, .reading svg)').length"
    assert page.js(foreign) == 0
    assert page.text(".question p").startswith("<b>hi</b>")
    server.engine.refusal = InvalidRequest(f"no {HOSTILE}", param="<img src=x onerror=alert(1)>")
    page.ask("again")
    page.finished()
    assert "<script>" in page.text(".alert p") and page.js(foreign) == 0
    assert page.driver.title == "Slipstream playground"
    page.log()  # Chromium notes the 400 that was asked for


def test_markup_cannot_be_made_of_text_at_all(page: Browser) -> None:
    """The policy refuses it, should a later change try: markup, inline code, other hosts."""
    markup = "document.body.insertAdjacentHTML('beforeend', '<i id=made></i>')"
    attempt = f"(() => {{ try {{ {markup} }} catch (error) {{ return error.name }} }})()"
    assert page.js(attempt) == "TypeError" and page.all("#made") == []
    script = (
        "const s = document.createElement('style'); s.textContent = 'body { display: none }'; document.head.append(s);"
    )
    page.driver.execute_script(script)
    assert page.find("body").is_displayed()
    reached = "return fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)"
    assert page.driver.execute_script(reached) == "TypeError"
    assert any("Content Security Policy" in line for line in page.log())


def test_settings_come_from_the_card_and_change_the_request(page: Browser) -> None:
    names = page.js(
        "[...document.querySelector('[data-path=\"speculation.verifier\"] select').options].map((o) => o.value)"
    )
    assert names == ["", *(card.name for card in VERIFIERS)]
    for card in VERIFIERS:
        page.choose('[data-path="speculation.verifier"] select', card.name)
        fields = "[...document.querySelectorAll('.field[data-path^=speculation]')]"
        shown = page.js(f"{fields}.filter((field) => !field.hidden).map((field) => field.dataset.path)")
        knobs = {f"speculation.{knob.name}" for knob in card.knobs}
        assert knobs == set(shown) - {f"speculation.{name}" for name in ("enabled", "max_draft", "verifier", "sample")}
    page.choose('[data-path="speculation.verifier"] select', "ensemble")
    page.choose('[data-path="speculation.target_weight"] input[type=range]', "0.25")
    page.choose('[data-path="speculation.max_draft"] input[type=range]', "3")
    page.choose('[data-path="temperature"] input[type=range]', "0.3")
    page.find('[data-path="seed"] input').send_keys("11")
    page.find('[data-path="max_tokens"] input[type=number]').clear()
    page.find('[data-path="max_tokens"] input[type=number]').send_keys("40")
    page.choose('[data-path="system"] textarea', "Be brief.")
    page.ask("hi")
    page.finished()
    (body,) = page.asked()
    assert body["speculation"] == {
        **{"max_draft": 3, "verifier": "ensemble", "target_weight": 0.25},
        **{"report": True, "trace": True},
    }
    assert (body["temperature"], body["seed"], body["max_tokens"], body["model"]) == (0.3, 11, 40, "tiny")
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert json.loads(page.text(".request pre")) == body
    assert "relaxed" in page.text(".badge") and "the law of a token was moved by" in page.text(".verdict")
    page.find('[data-path="temperature"] .reset').click()
    page.choose('[data-path="speculation.verifier"] select', "")
    page.find('[data-path="speculation.enabled"] input').click()
    page.ask("and again")
    page.finished()
    body = page.asked()[1]
    assert "temperature" not in body and body["speculation"] == {"enabled": False, "report": True, "trace": True}
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]


def test_side_by_side_is_one_question_to_two_settings(page: Browser, server: ScriptedServer) -> None:
    encode = server.engine.tokenizer.encode
    server.engine.answer = lambda request: [
        *encode("Same so far, " + ("yes" if request.speculation.enabled else "no")),
        EOS,
    ]
    page.find("#compare").click()
    page.ask("Which?")
    page.finished()
    first, second = page.asked()
    assert first["messages"] == second["messages"] and first["seed"] == second["seed"]
    assert "enabled" not in first["speculation"] and second["speculation"]["enabled"] is False
    line = page.text(".comparison")
    assert "First difference at character 14: A “yes”, B “no”" in line and "faster" in line
    assert len(page.all(".differs")) == 2
    server.engine.answer = ANSWER
    page.press(Keys.ALT, "r")
    page.until(lambda: "Same text" in page.text(".comparison"), "the second comparison")
    assert page.all(".differs") == [] and len(page.all(".turn")) == 1
    left, right = (answer.rect for answer in page.all(".answer"))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    page.shot("side-by-side")


def test_a_refused_field_is_named_and_its_control_shown(page: Browser, server: ScriptedServer) -> None:
    server.engine.refusal = InvalidRequest("top_p must be in (0, 1]", param="top_p")
    page.ask("hi")
    page.finished()
    assert page.text(".alert-param code") == "top_p" and "must be in" in page.text(".alert p")
    page.find(".alert button").click()
    control = page.driver.switch_to.active_element
    assert control.get_attribute("aria-invalid") == "true"
    assert control.find_element("xpath", "ancestor::*[@data-path]").get_attribute("data-path") == "top_p"
    control.send_keys("0.5")
    assert control.get_attribute("aria-invalid") is None
    assert any("400" in line for line in page.log())


def test_too_many_requests_are_tried_again_when_there_is_room(page: Browser, server: ScriptedServer) -> None:
    server.engine.refusal = ApiError(429, "Slow down.", code="rate_limit_exceeded", headers={"retry-after": "1"})
    page.ask("hi")
    page.finished()
    button = page.find(".alert button")
    assert button.text == "Try again in 1 s" and not button.is_enabled() and "Too many requests" in page.text(".alert")
    server.engine.refusal = None
    page.until(button.is_enabled, "the end of the wait")
    button.click()
    page.until(lambda: page.text(".answer .said") == ANSWER, "the answer")
    assert page.all(".alert") == [] and any("429" in line for line in page.log())


def test_with_the_keyboard_alone(page: Browser, server: ScriptedServer) -> None:
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Skip to the message field"
    page.press(Keys.ENTER)
    page.press(*"Hi")
    page.press(Keys.ENTER)
    page.finished()
    page.press(Keys.SHIFT, Keys.TAB)
    for _ in range(12):  # from the last control of the answer back to its text
        if "t" in (page.driver.switch_to.active_element.get_attribute("class") or "").split():
            break
        page.press(Keys.SHIFT, Keys.TAB)
    page.press(Keys.HOME)
    page.press(Keys.ARROW_RIGHT)
    tip = page.text("#tip")
    assert "“,”" in tip and "accepted: drafted" in tip and "Round 2: 2 of 4 drafted tokens stood" in tip
    assert page.driver.switch_to.active_element.get_attribute("aria-describedby") == "tip"
    outline = page.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" and len(page.all(".together")) == 3
    page.press(Keys.ESCAPE)
    assert not page.find("#tip").is_displayed()
    page.press(Keys.ALT, "k")
    assert page.find("#help-dialog").is_displayed() and "Alt+R" in page.text("#keys")
    page.press(Keys.ESCAPE)
    page.press(Keys.ALT, "c")
    assert page.find("#compare").get_attribute("aria-pressed") == "true"
    page.press(Keys.ALT, "s")
    assert not page.find("#settings").is_displayed()
    page.press(Keys.ALT, "m")
    page.press(*"again")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text(".comparison"), "two answers")
    page.press(Keys.ALT, "n")
    assert page.all(".turn") == []


def test_escape_stops_and_screen_readers_hear_the_answer_once(page: Browser, server: ScriptedServer) -> None:
    page.driver.execute_script(
        "window.said = []; new MutationObserver(() => window.said.push(document.getElementById('live').textContent))"
        ".observe(document.getElementById('live'), {childList: true, characterData: true, subtree: true})"
    )
    page.ask("hi")
    page.finished()
    assert page.js("window.said") == ["The answer begins.", f"Answer, 11 tokens: {ANSWER}"]
    server.engine.answer = "word " * 4000
    page.choose('[data-path="max_tokens"] input[type=range]', "2000")
    server.later(server.engine.flowing.clear)
    aborted = len(server.engine.aborted)
    page.ask("on and on")
    page.until(lambda: page.find("#stop").is_displayed(), "the stop button")
    page.press(Keys.ESCAPE)
    page.finished()
    server.later(server.engine.flowing.set)
    assert "stopped by you" in page.text(".turn:last-child .facts")
    page.until(lambda: len(server.engine.aborted) > aborted, "the server to hear of it")


def test_narrow_dark_and_still(page: Browser, server: ScriptedServer) -> None:
    server.engine.answer = f"{'A long_identifier_without_any_space' * 8} and {ANSWER}"
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for dark in (False, True):
        page.look(PHONE, dark=dark, calm=True)
        page.open(server.url)
        assert page.fits()
        page.ask("hi")
        page.finished()
        assert page.fits()
        page.find("#open-settings").click()
        assert page.fits() and page.find("#settings").is_displayed()
        page.shot(f"phone-settings-{'dark' if dark else 'light'}")
        page.find("#close-settings").click()
        page.find("#compare").click()
        page.ask("both")
        page.finished()
        assert page.fits()
        seen.add(page.js(colour))
        moving = (
            "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).animationName !== 'none').length"
        )
        assert page.js(moving) == 0
    assert len(seen) == 2
    page.find("#theme").click()  # as the system says, then light, whatever the system says
    assert page.js(colour) in seen and page.js("localStorage.getItem('slipstream-theme')") == "light"
    light = page.js(colour)
    page.open(server.url)
    assert page.js(colour) == light
    page.driver.execute_script("localStorage.clear()")
