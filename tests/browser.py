"""A headless Chromium, spoken to by its DevTools protocol over a pipe: nothing to install beside the browser itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60  # for an answer: the machine may be busy
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

# Which elements reach out of the window although nothing around them scrolls; which pictures have no pixels; whether a script ran.
FINDINGS = """(() => {
  document.querySelectorAll('details').forEach(element => { element.open = true; });
  const scrolls = element => element && (getComputedStyle(element).overflowX !== 'visible' || scrolls(element.parentElement));
  const name = element => element.tagName + '.' + element.className + ': ' + element.textContent.slice(0, 60);
  const all = [...document.body.querySelectorAll('*')];
  const visible = all.filter(element => element.getBoundingClientRect().width > 0);
  return {
    scroll_width: document.documentElement.scrollWidth,
    width: document.documentElement.clientWidth,
    outside: visible.filter(element => {
      const box = element.getBoundingClientRect();
      return (box.right > innerWidth + 1 || box.left < -1) && !scrolls(element.parentElement);
    }).map(name),
    missing: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
    unseen: [...document.images].filter(image => image.getBoundingClientRect().width < 20).map(image => image.alt),
    pictures: document.images.length,
    tiny: visible.filter(element => element.tagName === 'text' && element.getBoundingClientRect().height < 8).map(name),
    title: document.title,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    drawn: getComputedStyle(document.querySelector('.chart text')).fill,
    prompts: [...document.querySelectorAll('.prompts li')].map(item => item.textContent),
  };
})()"""


def find() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Seen(NamedTuple):
    """What a browser saw of a page: what went wrong, what the page asked for beside itself, and what an expression gave."""

    errors: list[str]
    requests: list[str]
    value: Any


class Browser:
    """A browser with one page.

    Args:
        path: of the program.
    """

    def __init__(self, path: str) -> None:
        self.profile = tempfile.TemporaryDirectory()
        (commands_out, self.commands), (self.answers, answers_in) = os.pipe(), os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
        ]
        # Not sh: Debian's knows files numbered by one digit only.
        line = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'
        arguments = [
            "bash",
            "-c",
            line,
            "bash",
            path,
            *flags,
            f"--user-data-dir={self.profile.name}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            arguments, pass_fds=(commands_out, answers_in), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands_out)
        os.close(answers_in)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def open(self, page: Path | str, width: int, height: int, is_dark: bool, expression: str) -> Seen:
        """Show a file or an address in a window of this size and theme, and evaluate an expression in it."""
        self.events.clear()
        self.address = page if isinstance(page, str) else page.as_uri()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        theme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[theme])
        self.ask("Page.navigate", url=self.address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next_message())
        return self.see(expression)

    def see(self, expression: str) -> Seen:
        """Evaluate an expression in the page that is shown, and return what happened since it was opened."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return Seen(self._errors(), self._requests(), answer["result"].get("value"))

    def see_in_time(self, expression: str, wanted: Any) -> Seen:
        """Evaluate an expression again and again, as the page loads itself anew, until it gives what is wanted or time is up."""
        end, seen = time.monotonic() + SECONDS, Seen([], [], None)
        while seen.value != wanted and time.monotonic() < end:
            time.sleep(0.1)
            with contextlib.suppress(RuntimeError):  # the page was just on its way
                seen = self.see(expression)
        return seen

    def screenshot(self, file: Path) -> None:
        """Write the whole page as PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**size, "scale": 1}
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(picture["data"]))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; what else the browser says is kept in `events`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def next_message(self) -> dict[str, Any]:
        """Return the browser's next message."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self.answers, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError(f"the browser says nothing (exit status {self.process.poll()}).")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _errors(self) -> list[str]:
        """Return what scripts threw and what the browser complains of."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"].get("text", "exception"))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                found.append(str(parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
        return found

    def _requests(self) -> list[str]:
        urls = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url != self.address and not url.startswith("data:")]
