"""The verb `watch`: which of its forms is asked for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from diffdistill.errors import UserError
from diffdistill.files import write_atomic
from diffdistill.watch.state import Watcher

LEAST_REFRESH_SEC = 0.2


def watch(
    folder: Path, *, once: bool, refresh_sec: float, html: bool, port: int | None, output: Path | None, as_json: bool
) -> None:
    """Show a run in the form that is asked for, until it has ended or the person leaves by Ctrl-C.

    Args:
        folder: of the run.
        once: show it once.
        refresh_sec: seconds between two looks.
        html: as a web page: in the file `output`, else on a server at `port`, None for a free one.
        as_json: print the state as JSON, once.
    Raises:
        UserError: no run, or settings that do not go together.
    """
    if refresh_sec < LEAST_REFRESH_SEC:
        raise UserError(f"--refresh is at least {LEAST_REFRESH_SEC} seconds; got {refresh_sec:g}.")
    if not html and (port is not None or output is not None):
        raise UserError("--port and -o are of the web page; write --html as well.")
    if port is not None and output is not None:
        raise UserError("--port serves the web page and -o writes it to a file; choose one.")
    if html and as_json:
        raise UserError("--html and --json are two forms; choose one. The server of --html has the state at /state.json.")
    watcher = Watcher(folder)
    try:
        if as_json:
            print(json.dumps(watcher.look().to_json(), indent=2, default=str))
        elif output is not None:
            _write_page(watcher, output, refresh_sec, once)
        elif html:
            _serve_page(watcher, refresh_sec, port or 0)
        else:
            _show(watcher, refresh_sec, once)
    except KeyboardInterrupt:
        pass  # the way to leave


def _show(watcher: Watcher, refresh_sec: float, once: bool) -> None:
    from rich.console import Console

    from diffdistill.watch import terminal

    console = Console(highlight=False)
    if once or not sys.stdout.isatty():
        console.print(terminal.frame(watcher.look(), console))
    else:
        terminal.show(watcher, console, refresh_sec)


def _write_page(watcher: Watcher, output: Path, refresh_sec: float, once: bool) -> None:
    from diffdistill.watch.page import Page

    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the web page is an .html file; got {output}. Write -o {output.with_suffix('.html')}.")
    page = Page(refresh_sec)
    state = watcher.look()
    write_atomic(output, page.html(state), durable=False)
    print(f"wrote {output}", flush=True)
    while state.is_alive and not once:
        time.sleep(refresh_sec)
        state = watcher.look()
        write_atomic(output, page.html(state), durable=False)


def _serve_page(watcher: Watcher, refresh_sec: float, port: int) -> None:
    from diffdistill.watch.server import ADDRESS, server

    with server(watcher, refresh_sec, port) as serving:
        print(f"{watcher.folder} is shown at http://{ADDRESS}:{serving.server_port}/ ; Ctrl-C ends it.", flush=True)
        serving.serve_forever()
