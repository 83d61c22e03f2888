"""When one of several processes ends before the run does, the others end too, and say which one it was.

Every process holds a connection to the main one, over which nothing is said while all is well. The system closes it when a process
ends, however it ends, and probes find out when a machine is gone; so a death is noticed at once or within `PROBES` seconds, and a
process that is merely slow is left alone. The main process passes the news on. A process that hears it has `GRACE` seconds to
end by itself, which it does where the communication library reports the loss; one that waits in a collective for ever is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from diffdistill.errors import MachineError, UserError
from diffdistill.training.stopping import Stopped

GRACE = 5.0  # seconds
NEWS = 2.0  # seconds in which the news of a death arrives where the communication library was quicker
OPENING = 60.0  # seconds in which the connections must be made, once every process is there
PROBES = 30  # seconds after which a machine that answers no probe is gone


@dataclass(frozen=True)
class Member:
    """A process as the others call it.

    Attributes:
        index: of how many it is which.
        process: its process id.
        host: its machine.
        log: the file that its messages go to, None where that is a terminal or the launcher.
    """

    index: int
    process: int
    host: str
    log: str | None

    @staticmethod
    def this(index: int) -> Member:
        """Return this process."""
        target = Path(f"/proc/self/fd/{sys.__stderr__.fileno()}" if sys.__stderr__ else "/dev/null")
        log = os.path.realpath(target) if target.exists() and target.is_file() else None
        return Member(index, os.getpid(), platform.node(), log)

    def __str__(self) -> str:
        return f"process {self.index} (pid {self.process} on {self.host})"


class Lifeline:
    """While entered, in every process of a run, the death of one ends all.

    Args:
        index, count: of how many processes this is which.
        device: of the process group's tensors.
        advice: what to do next, asked for when it is needed.
    """

    def __init__(self, index: int, count: int, device: torch.device, advice: Callable[[], str]) -> None:
        self.index, self.count, self.device, self.advice = index, count, device, advice
        self._known, self._left = threading.Event(), threading.Event()
        self._news = ""  # what has happened to another process
        self._own: socket.socket  # to the main process, or there to the thread that leads
        self._members: dict[socket.socket, Member] = {}  # in the main process
        self._thread = threading.Thread(target=self._lead if index == 0 else self._follow, name="lifeline", daemon=True)

    def __enter__(self) -> Lifeline:
        if self.count > 1:
            self._connect()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.count == 1:
            return
        ours = error is None or isinstance(error, UserError | MachineError | Stopped)
        if not ours and self._known.wait(NEWS):  # the error is what the death of another looks like from here
            self._left.set()
            raise MachineError(self._message()) from error
        self._left.set()
        over = error is None or isinstance(error, Stopped)
        self._tell({"over": None if over else f"{type(error).__name__}: {error}"[:2000]})
        if self.index == 0:
            self._thread.join(GRACE)  # it passes the end on to all

    # --- connections --------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Open the connections; all processes call it together."""
        told = torch.zeros(2, dtype=torch.int64)
        if self.index == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=self.count, dualstack_ipv6=dual)
            server.settimeout(OPENING)
            told = torch.tensor([server.getsockname()[1], secrets.randbits(62)])
        told = told.to(self.device)
        torch.distributed.broadcast(told, 0)
        port, token = told.tolist()
        if self.index == 0:
            with server:
                self._own, heard = socket.socketpair()  # how the main thread speaks to the one that leads
                self._members = {heard: Member.this(0)} | _admitted(server, self.count - 1, token)
            return
        host = os.environ["MASTER_ADDR"]
        try:
            self._own = socket.create_connection((host, port), timeout=OPENING)
        except OSError as error:
            raise MachineError(f"process {self.index} cannot reach the main one at {host}, port {port}: {error}.") from error
        _probe(self._own)
        self._tell({"token": token, "member": vars(Member.this(self.index))})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the other end may be gone; who watches it says so
            self._own.sendall(_line(message))

    # --- the main process ---------------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        """Listen to all until one has died, or this one is over, and pass that on."""
        with selectors.DefaultSelector() as selector:
            for connection in self._members:
                selector.register(connection, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    speaker: Any = key.fileobj
                    selector.unregister(speaker)  # whatever it says, it is the last that is heard of it
                    said = _read(speaker)
                    end = _SILENT if said is None else said["over"]
                    if end is not None or self._members[speaker].index == 0:
                        self._pass_on(speaker, end)
                        return

    def _pass_on(self, ended: socket.socket, end: str | None) -> None:
        """Tell every other process how one has ended; None for the good end of this one."""
        member = self._members[ended]
        news = None if end is None else _news(member, end)
        for connection, other in self._members.items():
            if other.index not in (0, member.index):
                with contextlib.suppress(OSError):
                    connection.sendall(_line({"news": news}))
        if news is not None and member.index > 0:
            self._learn(news)

    # --- the others ---------------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Wait for news from the main process, or for its end."""
        said = _read(self._own)
        news = f"process 0 (the main one, on {os.environ['MASTER_ADDR']}) {_SILENT}" if said is None else said["news"]
        if news is not None:
            self._learn(news)

    # --- the end ------------------------------------------------------------------------------------------------------------

    def _message(self) -> str:
        return f"{self._news} So this run cannot go on. {self.advice()}"

    def _learn(self, news: str) -> None:
        """Let the main thread end by itself, or end the process."""
        self._news = news
        self._known.set()
        if not self._left.wait(GRACE):
            print(self._message(), file=sys.stderr, flush=True)
            os._exit(1)


_LONGEST = 1 << 16  # bytes of a message
_SILENT = "ended without a word: it was killed, perhaps for lack of memory, or its machine is gone."


def _admitted(server: socket.socket, number: int, token: int) -> dict[socket.socket, Member]:
    """Wait for that many processes to call; whoever does not know the token is none."""
    members: dict[socket.socket, Member] = {}
    while len(members) < number:
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            known = ", ".join(str(member.index) for member in members.values()) or "none"
            raise MachineError(f"of {number} other processes only these have called the main one: {known}.") from error
        connection.settimeout(OPENING)
        hello = _read(connection)
        if hello is None or hello.get("token") != token:
            connection.close()
            continue
        _probe(connection)
        members[connection] = Member(**hello["member"])
    return members


def _news(member: Member, what: str) -> str:
    where = "in the output of its launcher" if member.log is None else f"in {member.log}"
    said = what if what is _SILENT else f"ended with {what.rstrip('.')}."
    return f"{member} {said} What it said last is {where}."


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read(connection: socket.socket) -> Any:
    """Return the next message, None at the end of the connection, however it ended, and for what is none."""
    heard = b""
    with contextlib.suppress(OSError):
        while not heard.endswith(b"\n") and len(heard) < _LONGEST:
            if not (more := connection.recv(1)):  # no byte of the next message, which waits in the connection
                break
            heard += more
    try:
        message = json.loads(heard)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _probe(connection: socket.socket) -> None:
    """Wait for the other end as long as it takes, and have the system find out when its machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBES // 3), ("TCP_KEEPINTVL", PROBES // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
