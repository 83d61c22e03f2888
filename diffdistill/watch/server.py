"""The page of a run on this machine's own address: it serves the page and the state as JSON, and nothing else."""

from __future__ import annotations

import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from diffdistill.errors import UserError
from diffdistill.watch.page import POLICY, Page
from diffdistill.watch.state import Watcher

ADDRESS = "127.0.0.1"


def server(watcher: Watcher, refresh_sec: float, port: int) -> ThreadingHTTPServer:
    """Return a server of the page, bound to 127.0.0.1; `serve_forever` runs it.

    Only requests that name this machine are answered, so that no page from elsewhere can read the run through a name of its own.

    Args:
        port: 0 for any that is free.
    Raises:
        UserError: the port is taken.
    """
    page, lock = Page(refresh_sec), threading.Lock()

    def html() -> str:
        with lock:  # the watcher and the page keep what they have read and drawn
            return page.html(watcher.look())

    def state() -> str:
        with lock:
            return json.dumps(watcher.look().to_json(), default=str)

    answers = {"/": ("text/html; charset=utf-8", html), "/state.json": ("application/json", state)}

    class Handler(BaseHTTPRequestHandler):
        """Answers GET of the two names."""

        def do_GET(self) -> None:
            """Send what stands under the name."""
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (ADDRESS, "localhost") or self.path not in answers:
                self.send_error(404)
                return
            kind, answer = answers[self.path]
            body = answer().encode()
            self.send_response(200)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("Content-Security-Policy", POLICY),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"port {port} cannot be had: {error.strerror}. Choose another --port, or leave it out.") from error
        raise
