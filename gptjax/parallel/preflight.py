"""What can be wrong before many processes start together, each told in one line and in time instead of a hang.

Process 0 listens where jax's coordinator will, every process (0 too) tells it who it is, and it answers all of them
with one verdict. jax itself would wait, and then end each process with a stack trace that names no one.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.section import InputError
from gptjax.parallel.cluster import Cluster, RetryableError
from gptjax.storage import MARK

MAGIC = "gptjax preflight 1"
TRY_SECONDS, RETRY_SECONDS, LOOK_SECONDS, LINGER_SECONDS = 3.0, 0.3, 10.0, 5.0
LOOPBACK = ("127.", "localhost", "::1", "[::1]")


class CheckResult(NamedTuple):
    """What process 0 tells all: a line that says what is wrong ("" where nothing is), and whether to try again."""

    problem: str
    again: bool


def preflight(
    cluster: Cluster, versions: Mapping[str, str], settings: Mapping[str, Any], folder: Path | None,
    seconds: float, clock_seconds: float,
) -> None:  # fmt: skip
    """Returns when all processes have come, and agree; all of them return or none.

    Compared are the number of processes, their ids, `versions` and `settings` (what JSON can hold), the clocks (which
    may differ by clock_seconds), and whether all see the same `folder`, which process 0 makes. Raises InputError, or
    RetryableError where the same command may work later, at the latest after about twice `seconds`.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.hosts > 1 and host.startswith(LOOPBACK):
        raise InputError(
            f"the coordinator {cluster.coordinator} is a loopback address, which each of the {cluster.hosts} hosts "
            "takes for itself; give the name of process 0's host in GPTJAX_COORDINATOR"
        )
    mark = None
    with contextlib.ExitStack() as stack:
        if cluster.process == 0:
            if folder is not None:
                mark = _leave_mark(folder)
                stack.callback(Path(mark["path"]).unlink, missing_ok=True)
            desk = stack.enter_context(_Desk(cluster, int(port), mark, seconds, clock_seconds))
            thread = threading.Thread(target=desk.serve, name="preflight", daemon=True)
            thread.start()
            stack.callback(thread.join, LINGER_SECONDS + TRY_SECONDS)  # the others are told before this process ends
        card = {
            "magic": MAGIC, "process": cluster.process, "processes": cluster.processes, "host": socket.gethostname(),
            "pid": os.getpid(), "versions": dict(versions), "settings": dict(settings),
        }  # fmt: skip
        verdict = _ask(cluster, card, folder, seconds)
    if verdict.problem:
        raise RetryableError(verdict.problem) if verdict.again else InputError(verdict.problem)


def _leave_mark(folder: Path) -> dict[str, str]:
    """Makes the folder and a file in it that the others must find."""
    name = f"{MARK}{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    except OSError as e:
        raise InputError(f"{folder}: a run can't be written there ({e.strerror}); give another --run-dir") from e
    return {"name": name, "path": str(folder / name)}


class _Desk:
    """Process 0's side: collects everyone's card, and answers them all."""

    def __init__(self, cluster: Cluster, port: int, mark: dict[str, str] | None, seconds: float, clock_seconds: float):
        self._cluster, self._mark, self._clock_seconds = cluster, mark, clock_seconds
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._socket = _listen(port, cluster.given, min(seconds, 30.0))
        self._cards: dict[socket.socket, dict] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def __enter__(self) -> "_Desk":
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()

    def serve(self) -> None:
        """Answers everyone, and returns; the connections stay open until then."""
        try:
            verdict = self._judge()
            self._tell({"verdict": verdict})
            if verdict.problem:
                self._tell_late(verdict)
        except Exception as e:  # a thread's error is nobody's otherwise
            self._tell({"verdict": CheckResult(f"process 0 failed in the preflight: {e!r}", True)})
        finally:
            for connection in list(self._buffers):
                connection.close()

    def _tell_late(self, verdict: CheckResult) -> None:
        """Tells the same to those who come a little later, so that they need not find out that nobody is there."""
        until = time.monotonic() + LINGER_SECONDS
        come = {card["process"] for card in self._cards.values()}
        while len(come) < self._cluster.processes and time.monotonic() < until:
            self._cards = dict(self._messages())
            self._tell({"verdict": verdict})
            come |= {card.get("process") for card in self._cards.values()}

    def _judge(self) -> CheckResult:
        while len(self._cards) < self._cluster.processes:
            if time.monotonic() > self._until:
                return self._missing()
            problem = None
            for connection, message in self._messages():
                if message.get("magic") != MAGIC:
                    self._drop(connection)
                    continue
                message["skew"] = message.get("time", 0.0) - time.time()
                problem = problem or self._wrong(message)
                self._cards[connection] = message  # also behind a problem: whoever has spoken must be told
            if problem:
                return problem
        return self._looked() if self._mark else CheckResult("", False)

    def _missing(self) -> CheckResult:
        come = {card["process"] for card in self._cards.values()}
        missing = [i for i in range(self._cluster.processes) if i not in come]
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        line = (
            f"{len(come)} of {self._cluster.processes} processes came to {self._cluster.coordinator} within "
            f"{self._seconds:g} s; missing: {shown}"
        )
        if self._cluster.coordinator.startswith(LOOPBACK):
            line += " (that is a loopback address: only processes on process 0's host can come to it)"
        return CheckResult(f"{line}; look at their logs, or give more time with GPTJAX_WAIT_SECONDS", True)

    def _wrong(self, card: dict) -> CheckResult | None:
        """What is wrong with one more card."""
        there = _who(card)
        if card["processes"] != self._cluster.processes:
            return CheckResult(
                f"{there} was told that there are {card['processes']} processes, process 0 {self._cluster.processes}; "
                "give all the same number",
                False,
            )
        for other in self._cards.values():
            if other["process"] == card["process"]:
                return CheckResult(
                    f"{_who(other)} and {there} (pid {card['pid']}) have the same number; give each its own",
                    False,
                )
        if abs(card["skew"]) > self._clock_seconds:
            way = "ahead of" if card["skew"] > 0 else "behind"
            return CheckResult(
                f"the clock of {there} is {abs(card['skew']):.0f} s {way} process 0's; set the clocks (NTP), or allow "
                "it with GPTJAX_CLOCK_SECONDS",
                False,
            )
        cards = [*self._cards.values(), card]
        here = next((c for c in cards if c["process"] == 0), cards[0])  # whom the others are compared with
        if here is card:
            card, there = cards[0], _who(cards[0])
        for what in ("versions", "settings"):
            for name in sorted(here[what].keys() | card[what].keys()):
                mine, its = here[what].get(name), card[what].get(name)
                if mine != its:
                    what = "installed" if what == "versions" else "set"
                    return CheckResult(
                        f"{there} has {name} {its!r}, {_who(here)} has {mine!r}; all must have the same {what}", False
                    )
        return None

    def _looked(self) -> CheckResult:
        """Has everyone look for the mark in the run's folder."""
        assert self._mark is not None
        self._tell({"look": self._mark["name"]})
        answers: dict[int, bool] = {}
        until = time.monotonic() + LOOK_SECONDS + TRY_SECONDS
        while len(answers) < len(self._cards) and time.monotonic() < until:
            for connection, message in self._messages():
                if connection in self._cards:
                    answers[self._cards[connection]["process"]] = bool(message.get("sees"))
        for card in self._cards.values():
            if not answers.get(card["process"], False):
                return CheckResult(
                    f"{_who(card)} does not see the run folder of process 0 on {socket.gethostname()}, "
                    f"{Path(self._mark['path']).parent}; put --run-dir on a file system that all hosts share",
                    False,
                )
        return CheckResult("", False)

    def _messages(self) -> list[tuple[socket.socket, dict]]:
        """What came within a moment: whole lines, as JSON; who went away loses its card."""
        found = []
        for key, _ in self._selector.select(0.2):
            if key.fileobj is self._socket:
                with contextlib.suppress(OSError):
                    connection, _ = self._socket.accept()
                    connection.settimeout(TRY_SECONDS)
                    self._buffers[connection] = b""
                    self._selector.register(connection, selectors.EVENT_READ)
                continue
            connection: Any = key.fileobj
            try:
                some = connection.recv(1 << 16)
            except OSError:
                some = b""
            self._buffers[connection] += some
            if not some or len(self._buffers[connection]) > 1 << 22:
                self._drop(connection)
            elif self._buffers[connection].endswith(b"\n"):
                text, self._buffers[connection] = self._buffers[connection], b""
                found.append((connection, _json(text)))
        return found

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._buffers.pop(connection)
        self._cards.pop(connection, None)
        connection.close()

    def _tell(self, message: dict) -> None:
        for connection in self._cards:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")


def _listen(port: int, given: bool, seconds: float) -> socket.socket:
    """Listens on all addresses; a process that is about to end may hold the port for a moment."""
    until = time.monotonic() + (0 if given else seconds)
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as e:
            if time.monotonic() < until:
                time.sleep(RETRY_SECONDS)
                continue
            line = f"process 0 can't listen on port {port} of {socket.gethostname()} ({e.strerror})"
            if given:
                raise InputError(f"{line}; give another port in GPTJAX_COORDINATOR") from e
            raise RetryableError(f"{line}; wait for what holds it, or set JAX_COORDINATOR_PORT to another") from e


def _ask(cluster: Cluster, card: dict, folder: Path | None, seconds: float) -> CheckResult:
    """A process's side: comes to process 0 with its card and returns the verdict."""
    host, _, port = cluster.coordinator.rpartition(":")
    until, reason = time.monotonic() + seconds, "nothing was tried"
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), TRY_SECONDS) as connection:
                reason = "something answers there that is no process 0 of gptjax"
                # Process 0 may have begun to wait later than this one, and then looks at the folder.
                verdict = _converse(connection, card, folder, seconds + LOOK_SECONDS + 2 * TRY_SECONDS)
                if verdict is not None:
                    return verdict
        except socket.gaierror as e:
            reason = f"its name does not resolve ({e.strerror})"
        except TimeoutError:
            reason = "no answer: is the host up, and does a firewall let the port through?"
        except ConnectionRefusedError:
            reason = "nothing listens there: has process 0 started, and on that host?"
        except OSError as e:
            reason = e.strerror or str(e)
        if time.monotonic() > until:
            line = f"the coordinator {cluster.coordinator} can't be reached within {seconds:g} s: {reason}"
            if host.startswith(LOOPBACK):
                line += " (that is a loopback address, which each host takes for itself)"
            unknown = cluster.given and "resolve" in reason
            return CheckResult(line + ("; set GPTJAX_COORDINATOR to a host that does" if unknown else ""), not unknown)
        time.sleep(RETRY_SECONDS)


def _converse(connection: socket.socket, card: dict, folder: Path | None, seconds: float) -> CheckResult | None:
    """Gives the card, looks at the folder when asked, and returns the verdict; None where the other end went away."""
    connection.settimeout(seconds)
    with connection.makefile("rwb") as line:
        _write(line, {**card, "time": time.time()})
        while answer := _json(line.readline(1 << 22)):
            if "verdict" in answer:
                return CheckResult(*answer["verdict"])
            if "look" in answer:
                _write(line, {"sees": folder is not None and _sees(folder / answer["look"])})
    return None


def _sees(path: Path) -> bool:
    """Whether the file is there, given the time that a network file system's cache takes."""
    until = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # has some network file systems look anew
        if path.exists():
            return True
        time.sleep(RETRY_SECONDS)
    return False


def _write(line: Any, message: dict) -> None:
    line.write(json.dumps(message).encode() + b"\n")
    line.flush()


def _json(text: bytes) -> dict:
    try:
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


def _who(card: dict) -> str:
    return f"process {card['process']} on {card['host']}"
