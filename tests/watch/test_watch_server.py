"""The verb and its server: who is answered, with what, and how it is left."""

from __future__ import annotations

import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial

import pytest
from fake_runs import healthy, lines, write_run

from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.watch.server import server
from diffdistill.watch.state import Watcher


@contextmanager
def serving(folder):
    served = server(Watcher(folder), 5.0, 0)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def get(port, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_server_answers_with_the_page_and_the_state_of_now(tmp_path):
    folder = write_run(tmp_path / "run", lines(100))
    with serving(folder) as served:
        assert served.server_address[0] == "127.0.0.1"
        status, headers, body = get(served.server_port, "/")
        assert status == 200 and b"step 100 of 1,000" in body
        assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
        with open(folder / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(healthy(110)) + "\n")
        assert b"step 110 of 1,000" in get(served.server_port, "/")[2]
        assert json.loads(get(served.server_port, "/state.json", "localhost:80")[2])["step"] == 110


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/../run/config.yaml",
        "/%2e%2e/run/config.yaml",
        "//config.yaml",
        "/samples",
        "/?x",
        "/samples/step_0000100.png",
    ],
)
def test_nothing_else_is_served(tmp_path, path):
    with serving(write_run(tmp_path / "run", lines(100), grids=[100])) as served:
        status, _, body = get(served.server_port, path)
        assert status in (400, 404) and b"dmd2" not in body


def test_pages_from_elsewhere_cannot_read_a_run_under_a_name_of_their_own(tmp_path):
    with serving(write_run(tmp_path / "run", lines(100))) as served:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example:80"):
            assert get(served.server_port, "/", host)[0] == 404
        assert get(served.server_port, "/", method="POST")[0] == 501


def test_a_port_that_is_taken_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [])
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"port \d+ cannot be had.*Choose another --port"):
            server(Watcher(folder), 5.0, other.getsockname()[1])


# The verb


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", lines(300), outcome=("stopped", "stopped by SIGTERM"))


def test_where_the_output_is_no_terminal_one_frame_is_printed(folder, capsys):
    assert main(["watch", str(folder)]) == 0
    assert capsys.readouterr().out.count("step 300 of 1,000") == 1


def test_the_state_is_printed_as_json_alone(folder, capsys):
    assert main(["watch", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "stopped"


def test_a_page_of_an_ended_run_is_written_once(folder, tmp_path, capsys):
    assert main(["watch", str(folder), "--html", "-o", str(tmp_path / "page.html")]) == 0
    assert "stopped by SIGTERM" in (tmp_path / "page.html").read_text()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "8000"], "write --html as well"),
        (["--html", "--port", "8000", "-o", "page.html"], "choose one"),
        (["--html", "--json"], "choose one"),
        (["--html", "-o", "page.png"], "Write -o page.html"),
        (["--refresh", "0"], "at least 0.2 seconds"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(folder, capsys, arguments, message):
    assert main(["watch", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def start(command, **options):
    """Start a command that hears Ctrl-C also where whoever runs the tests does not, as a shell's background job."""
    return subprocess.Popen(command, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **options)


@pytest.mark.parametrize("form", [["--html"], ["--html", "-o", "page.html"]], ids=["server", "file"])
def test_ctrl_c_leaves_with_status_0(tmp_path, form):
    folder = write_run(tmp_path / "run", lines(100))
    (folder / "lock").write_text("process 1 on elsewhere")
    os.utime(folder / "metrics.jsonl")
    command = [sys.executable, "-m", "diffdistill", "watch", str(folder), "--refresh", "0.2", *form]
    watching = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.communicate(timeout=60) == ("", "")
    assert watching.returncode == 0


def test_a_terminal_shows_what_is_new_until_ctrl_c(tmp_path):
    folder = write_run(tmp_path / "run", lines(100))
    (folder / "lock").write_text("process 1 on elsewhere")
    os.utime(folder / "metrics.jsonl")
    own, terminal = pty.openpty()
    command = [sys.executable, "-m", "diffdistill", "watch", str(folder), "--refresh", "0.2"]
    watching = start(command, stdout=terminal, env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "50"})
    os.close(terminal)
    shown = ""
    while "step 100 of 1,000" not in shown:
        shown += os.read(own, 1 << 16).decode(errors="replace")
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps(healthy(110)) + "\n")
    while "step 110 of 1,000" not in shown:
        shown += os.read(own, 1 << 16).decode(errors="replace")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 0
    os.close(own)
