"""Checks before a multi-process start: each failure is one line within the time-out, never a hang.

Process 0 listens at the address of jax's coordinator, every process (0 included) sends it a hello, and it sends all of
them one result. jax itself would wait, and then end each process with a stack trace that names no process.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.section import InputError
from gptjax.parallel.cluster import Cluster, RetryableError
from gptjax.storage import probe_in

MAGIC = "gptjax preflight 1"
CONNECT_SECONDS, RETRY_SECONDS = 3.0, 0.3
PROBE_SECONDS = 10.0  # to see a file of another host: the time that a network file system may cache a listing
LATE_SECONDS = 5.0  # that process 0 stays to answer those who come after a failure
LOOPBACK = ("127.", "localhost", "::1", "[::1]")


class CheckResult(NamedTuple):
    """The result that process 0 sends to all: the problem in one line, "" for none, and whether to try again."""

    problem: str
    again: bool


def preflight(
    cluster: Cluster, versions: Mapping[str, str], settings: Mapping[str, Any], folder: Path | None, seconds: float
) -> None:
    """Returns once all processes are connected and agree; all of them return or none.

    Compares the number of processes, their ids, `versions` and `settings` (values that JSON can hold), and whether all
    see the same `folder`, which process 0 makes. Raises InputError, or RetryableError where the same command may work
    later, after at most about twice `seconds`.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.hosts > 1 and host.startswith(LOOPBACK):
        raise InputError(
            f"the coordinator {cluster.coordinator} is a loopback address, which each of the {cluster.hosts} hosts "
            "takes for itself; give the name of process 0's host in GPTJAX_COORDINATOR"
        )
    probe = None
    with contextlib.ExitStack() as stack:
        if cluster.process == 0:
            if folder is not None:
                probe = _write_probe(folder)
                stack.callback(probe.unlink, missing_ok=True)
            server = stack.enter_context(contextlib.closing(RendezvousServer(cluster, int(port), probe, seconds)))
            thread = threading.Thread(target=server.serve, name="preflight", daemon=True)
            thread.start()
            stack.callback(thread.join, LATE_SECONDS + CONNECT_SECONDS)  # ends after it answered the others
        hello = {
            "magic": MAGIC, "process": cluster.process, "processes": cluster.processes, "host": socket.gethostname(),
            "pid": os.getpid(), "versions": dict(versions), "settings": dict(settings),
        }  # fmt: skip
        result = _connect(cluster, hello, folder, seconds)
    if result.problem:
        raise RetryableError(result.problem) if result.again else InputError(result.problem)


def _write_probe(folder: Path) -> Path:
    """Makes the folder and a probe file in it, which the other processes must see."""
    probe = probe_in(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as e:
        raise InputError(f"{folder}: a run can't be written there ({e.strerror}); give another --run-dir") from e
    return probe


class RendezvousServer:
    """Process 0's side: collects a hello from every process, and sends all of them one result."""

    def __init__(self, cluster: Cluster, port: int, probe: Path | None, seconds: float):
        self._cluster, self._probe = cluster, probe
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._socket = _listen(port, cluster.given, min(seconds, 30.0))
        self._hellos: dict[socket.socket, dict] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def close(self) -> None:
        self._socket.close()

    def serve(self) -> None:
        """Sends the result to every process and closes the connections."""
        try:
            result = self._collect()
            self._send({"result": result})
            if result.problem:
                self._answer_late(result)
        except Exception as e:  # nobody would see a thread's error
            self._send({"result": CheckResult(f"process 0 failed in the preflight: {e!r}", True)})
        finally:
            for connection in list(self._buffers):
                connection.close()

    def _answer_late(self, result: CheckResult) -> None:
        """Sends the result to processes that connect a little later, which would otherwise wait for a time-out."""
        until = time.monotonic() + LATE_SECONDS
        seen = {hello["process"] for hello in self._hellos.values()}
        while len(seen) < self._cluster.processes and time.monotonic() < until:
            self._hellos = dict(self._messages())
            self._send({"result": result})
            seen |= {hello.get("process") for hello in self._hellos.values()}

    def _collect(self) -> CheckResult:
        while len(self._hellos) < self._cluster.processes:
            if time.monotonic() > self._until:
                return self._missing()
            problem = ""
            for connection, message in self._messages():
                if message.get("magic") != MAGIC:
                    self._drop(connection)
                    continue
                problem = problem or self._compare(message)
                self._hellos[connection] = message  # also after a problem: every sender must get the result
            if problem:
                return CheckResult(problem, False)
        return CheckResult(self._check_folder(self._probe) if self._probe else "", False)

    def _missing(self) -> CheckResult:
        seen = {hello["process"] for hello in self._hellos.values()}
        missing = [i for i in range(self._cluster.processes) if i not in seen]
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        line = (
            f"{len(seen)} of {self._cluster.processes} processes connected to {self._cluster.coordinator} within "
            f"{self._seconds:g} s; missing: {shown}"
        )
        if self._cluster.coordinator.startswith(LOOPBACK):
            line += " (that is a loopback address: only processes on process 0's host reach it)"
        return CheckResult(f"{line}; look at their logs, or give more time with GPTJAX_WAIT_SECONDS", True)

    def _compare(self, hello: dict) -> str:
        """The problem of one more hello beside those before it; empty where there is none."""
        sender = _process_name(hello)
        if hello["processes"] != self._cluster.processes:
            return (
                f"{sender} is set to {hello['processes']} processes, process 0 to {self._cluster.processes}; "
                "give all the same number"
            )
        for other in self._hellos.values():
            if other["process"] == hello["process"]:
                pid = hello["pid"]
                return f"{_process_name(other)} and {sender} (pid {pid}) have the same number; give each its own"
        hellos = [*self._hellos.values(), hello]
        reference = next((h for h in hellos if h["process"] == 0), hellos[0])
        if reference is hello:
            hello, sender = hellos[0], _process_name(hellos[0])
        for kind, verb in (("versions", "installed"), ("settings", "set")):
            for name in sorted(reference[kind].keys() | hello[kind].keys()):
                wanted, got = reference[kind].get(name), hello[kind].get(name)
                if wanted != got:
                    theirs = f"{_process_name(reference)} has {wanted!r}"
                    return f"{sender} has {name} {got!r}, {theirs}; all must have the same {verb}"
        return ""

    def _check_folder(self, probe: Path) -> str:
        """Asks every process whether it sees the probe file in the run's folder; returns the problem, if any."""
        self._send({"probe": probe.name})
        answers: dict[int, bool] = {}
        until = time.monotonic() + PROBE_SECONDS + CONNECT_SECONDS
        while len(answers) < len(self._hellos) and time.monotonic() < until:
            for connection, message in self._messages():
                if connection in self._hellos:
                    answers[self._hellos[connection]["process"]] = bool(message.get("sees"))
        for hello in self._hellos.values():
            if not answers.get(hello["process"], False):
                return (
                    f"{_process_name(hello)} does not see the run folder of process 0 on {socket.gethostname()}, "
                    f"{probe.parent}; put --run-dir on a file system that all hosts share"
                )
        return ""

    def _messages(self) -> list[tuple[socket.socket, dict]]:
        """The whole lines that arrive within a moment, as JSON; a closed connection loses its hello."""
        messages = []
        for key, _ in self._selector.select(0.2):
            if key.fileobj is self._socket:
                with contextlib.suppress(OSError):
                    connection, _ = self._socket.accept()
                    connection.settimeout(CONNECT_SECONDS)
                    self._buffers[connection] = b""
                    self._selector.register(connection, selectors.EVENT_READ)
                continue
            connection: Any = key.fileobj
            try:
                received = connection.recv(1 << 16)
            except OSError:
                received = b""
            self._buffers[connection] += received
            if not received or len(self._buffers[connection]) > 1 << 22:
                self._drop(connection)
            elif self._buffers[connection].endswith(b"\n"):
                text, self._buffers[connection] = self._buffers[connection], b""
                messages.append((connection, _json(text)))
        return messages

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._buffers.pop(connection)
        self._hellos.pop(connection, None)
        connection.close()

    def _send(self, message: dict) -> None:
        for connection in self._hellos:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")


def _listen(port: int, given: bool, seconds: float) -> socket.socket:
    """Listens on all addresses, and retries while a process that is about to end may still hold the port."""
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


def _connect(cluster: Cluster, hello: dict, folder: Path | None, seconds: float) -> CheckResult:
    """Every process's side: connects to process 0, sends its hello, and returns the result."""
    host, _, port = cluster.coordinator.rpartition(":")
    until, reason = time.monotonic() + seconds, "no attempt was made"
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
                reason = "what answers there is no process 0 of gptjax"
                # Process 0 may have begun to wait later than this one, and then checks the folder.
                result = _converse(connection, hello, folder, seconds + PROBE_SECONDS + 2 * CONNECT_SECONDS)
                if result is not None:
                    return result
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


def _converse(connection: socket.socket, hello: dict, folder: Path | None, seconds: float) -> CheckResult | None:
    """Sends the hello, answers for the probe file, and returns the result; None where the connection was closed."""
    connection.settimeout(seconds)
    with connection.makefile("rwb") as line:
        _write(line, hello)
        while answer := _json(line.readline(1 << 22)):
            if "result" in answer:
                return CheckResult(*answer["result"])
            if "probe" in answer:
                _write(line, {"sees": folder is not None and _sees(folder / answer["probe"])})
    return None


def _sees(path: Path) -> bool:
    """True once the file exists, within PROBE_SECONDS."""
    until = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes some network file systems refresh their cache
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


def _process_name(hello: dict) -> str:
    return f"process {hello['process']} on {hello['host']}"
