"""How long a streamed token takes from the server's socket to the screen of a headless Chromium.

    python -m benchmarks.playground_latency http://127.0.0.1:8000 [--questions 20] [--model demo]

A relay stands between the two and notes when the first bytes of an answer pass; the page notes when the first token
stands in the document, and when the frame behind that was drawn. All three clocks are the machine's.
Needs selenium, chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,860")
WATCH = """
const now = () => performance.timeOrigin + performance.now();
window.seen = null;
new MutationObserver(() => {
  if (window.seen || !document.querySelector('.turn:last-child .said .t:not(.masked)')) return;
  window.seen = {inserted: now()};
  requestAnimationFrame(() => setTimeout(() => { window.seen.drawn = now(); }, 0));
}).observe(document.getElementById('turns'), {childList: true, subtree: true});
"""


@dataclass
class Relay:
    """Passes connections on to the server; `first` has the time of the first event with a token of each answer."""

    host: str
    port: int
    own_port: int = 0
    first: list[float] = field(default_factory=list)
    _ready: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._ready.wait(10)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.own_port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, onward = await asyncio.open_connection(self.host, self.port)
        await asyncio.gather(self._pass(reader, onward, False), self._pass(upstream, writer, True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        told = False
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if answers and b"HTTP/1.1 " in data:
                    told = False
                # The opening chunk has neither.
                if answers and not told and (b'"origins"' in data or b'"filled"' in data):
                    told = True
                    self.first.append(time.time() * 1000)
                writer.write(data)
                await writer.drain()
        writer.close()


def browser() -> webdriver.Chrome:
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def measure(driver: webdriver.Chrome, relay: Relay, model: str, questions: int) -> list[tuple[float, float]]:
    """Milliseconds from the relay to the document, and to the screen, of each question's first token."""
    driver.get(f"http://127.0.0.1:{relay.own_port}/")
    wait = WebDriverWait(driver, 60, poll_frequency=0.05)
    wait.until(lambda d: d.execute_script("return !document.getElementById('send').disabled"))
    if model:
        script = (
            "const m = document.getElementById('model-A'); m.value = arguments[0]; m.dispatchEvent(new Event('change'))"
        )
        driver.execute_script(script, model)
    found = []
    for number in range(questions):
        relay.first.clear()
        driver.execute_script(WATCH if not number else "window.seen = null")
        driver.execute_script("document.getElementById('new-chat').click()")
        field_ = driver.find_element("id", "prompt")
        field_.send_keys(f"Count from {number} to {number + 5}.", Keys.ENTER)
        wait.until(lambda d: d.execute_script("return !document.body.classList.contains('busy')"))
        seen = driver.execute_script("return window.seen")
        found.append((seen["inserted"] - relay.first[0], seen["drawn"] - relay.first[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="")
    parser.add_argument("--questions", type=int, default=20)
    arguments = parser.parse_args()
    address = urlsplit(arguments.url)
    relay = Relay(address.hostname or "127.0.0.1", address.port or 80)
    relay.start()
    driver = browser()
    try:
        found = measure(driver, relay, arguments.model, arguments.questions)
    finally:
        driver.quit()
    for name, values in (("inserted", [one for one, _ in found]), ("drawn", [one for _, one in found])):
        middle, most = statistics.median(values), max(values)
        print(
            json.dumps(
                {"first token": name, "median ms": round(middle, 1), "most ms": round(most, 1), "of": len(values)}
            )
        )


if __name__ == "__main__":
    main()
