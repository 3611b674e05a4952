"""A headless Chromium at a page, as a person with a keyboard, a pointer and a theme would use it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
SHOTS = Path(__file__).parents[2] / "build" / "playground"  # pictures of the last run; git ignores the folder
DESKTOP, PHONE = (1280, 860), (360, 740)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
SECONDS = 30.0
# Every request that the page sends to the chat endpoint, as it sends it. `pace`: milliseconds between the events of an
# answer, as on a slow line.
LISTEN = """
window.asked = [];
window.pace = 0;
const send = window.fetch;
window.fetch = async (where, how) => {
  if (!String(where).endsWith("/v1/chat/completions")) return send(where, how);
  window.asked.push(JSON.parse(how.body));
  const answer = await send(where, how);
  if (!window.pace || !answer.ok) return answer;
  const events = (await answer.text()).split(/(?<=\\n\\n)/), bytes = new TextEncoder();
  const body = new ReadableStream({ async pull(flow) {
    if (!events.length) return flow.close();
    flow.enqueue(bytes.encode(events.shift()));
    await new Promise((go) => setTimeout(go, window.pace));
  } });
  return new Response(body, { status: answer.status, headers: answer.headers });
};
"""


class Browser:
    """One window, made new for each test that wants one. `dark`: what the system would like."""

    def __init__(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        options = Options()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.command("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
        self.look(size, dark=dark)

    def command(self, name: str, **fields: Any) -> Any:
        """One of the browser's own (Chrome DevTools Protocol)."""
        return self.driver.execute_cdp_cmd(name, fields)

    def look(self, size: tuple[int, int], *, dark: bool, calm: bool = False) -> None:
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", **screen)
        wishes = {"prefers-color-scheme": "dark" if dark else "light"}
        wishes["prefers-reduced-motion"] = "reduce" if calm else "no-preference"
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """The page, once it knows the models; what an earlier one said to the console is forgotten."""
        self.driver.get("about:blank")
        self.log()
        self.driver.get(f"{url}/")
        self.until(lambda: not self.js("document.getElementById('send').disabled"), "the models")

    def js(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """As it stands in the document, white space and all."""
        found = self.js("document.querySelector(arguments[0])?.textContent", selector)
        return str(found or "")

    def until(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except (JavascriptException, StaleElementReferenceException):
                pass
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.log()}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """To whatever has the focus; the last one is pressed while the others are held."""
        chain = webdriver.ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            chain.key_up(key)
        chain.perform()

    def ask(self, text: str) -> None:
        field = self.find("#prompt")
        field.click()
        field.send_keys(text.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL), Keys.ENTER)

    def finished(self, seconds: float = SECONDS) -> None:
        """Wait until no answer is on its way."""
        busy = "document.body.classList.contains('busy')"
        self.until(lambda: self.all(".answer") and not self.js(busy), "the end of the answers", seconds)

    def choose(self, selector: str, value: str) -> None:
        """Take an option of a list, or set a slider."""
        script = """
        const [selector, value] = arguments, control = document.querySelector(selector);
        control.value = value;
        for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, {bubbles: true}));
        """
        self.driver.execute_script(script, selector, value)

    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all chat requests so far."""
        found: list[dict[str, Any]] = self.js("window.asked")
        return found

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{re.sub(r'[^a-z0-9-]+', '-', name.lower())}.png"))

    def log(self) -> list[str]:
        """What the browser's console was told: nothing, on a good page."""
        return [f"{entry['level']} {entry['message']}" for entry in self.driver.get_log("browser")]

    def fits(self) -> bool:
        """Can all of the page be read without scrolling sideways? Charts and code may scroll by themselves."""
        wide = "[document.scrollingElement, ...document.querySelectorAll('#scroll, #settings, .answer, .composer')]"
        return bool(self.js(f"{wide}.every((part) => part.scrollWidth <= part.clientWidth + 1)"))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.shot("failed")
        self.driver.quit()
