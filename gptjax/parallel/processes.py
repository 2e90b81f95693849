"""Several processes as one job: their start, what they agree on, and how they end together.

jax.distributed does the work. Here is what it leaves open: the processes are found (cluster.py) and checked before
(preflight.py), one that fails names itself and takes the others along instead of leaving them waiting, and what must
be the same in all of them is told by process 0. With one process nothing here does anything.
"""

import atexit
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptjax.config.section import InputError
from gptjax.parallel.cluster import Cluster, find_cluster
from gptjax.runtime.versions import versions
from gptjax.runtime.xla_flags import platform

T = TypeVar("T")

WAIT_SECONDS, HEARTBEAT_SECONDS, CLOCK_SECONDS = 300.0, 60.0, 60.0
BARRIER_SECONDS = 7 * 24 * 3600.0  # as long as anything may take; a process that is lost ends the wait sooner
POLL_SECONDS, LEAVE_SECONDS, REPORT_SECONDS = 1.0, 10.0, 60.0

_FAILED = "gptjax/failed"

_cluster: Cluster | None = None
_watch: threading.Event | None = None


def join_processes(settings: Mapping[str, Any], folder: str | Path | None = None) -> None:
    """Joins the processes of this job, where there are several. Call it before anything asks jax for its devices.

    All must have the same `settings` and see the same `folder` (of the run), which is made. How long the others are
    waited for is GPTJAX_WAIT_SECONDS (300), after how long without a sign a process counts as lost
    GPTJAX_HEARTBEAT_SECONDS (60), how far clocks may differ GPTJAX_CLOCK_SECONDS (60). Raises InputError for what is
    wrong, also where a process that is alone has no devices, and RetryableError where the same command may work later.
    Does nothing in a process that has joined already.
    """
    import jax

    global _cluster, _watch
    if jax.distributed.is_initialized():
        if not is_multi_process() and (count := _jax_state().num_processes) > 1:
            raise InputError(
                f"jax.distributed.initialize() was called before, for {count} processes; leave it out: gptjax joins "
                "them itself, as a scheduler or GPTJAX_COORDINATOR, GPTJAX_PROCESSES and GPTJAX_PROCESS say it"
            )
        return
    wait = _seconds("GPTJAX_WAIT_SECONDS", WAIT_SECONDS)
    heartbeat = _seconds("GPTJAX_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    cluster = find_cluster(timeout=wait)
    if cluster is None:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as e:  # what JAX_PLATFORMS names is not here, or its driver is not
            raise InputError(_no_devices(str(e))) from e
        return
    _cluster = cluster
    from gptjax.parallel.preflight import preflight

    path = None if folder is None or "://" in str(folder) else Path(folder).absolute()
    preflight(cluster, versions(), settings, path, wait, _seconds("GPTJAX_CLOCK_SECONDS", CLOCK_SECONDS))
    # Its handler would take SIGTERM from ours, and knows no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    _keep_stdout()
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(wait),
        heartbeat_timeout_seconds=int(heartbeat),
    )
    _watch = threading.Event()
    sys.excepthook = functools.partial(_fail, heartbeat)
    atexit.register(_watch.set)  # before jax's own, which ends what it asks
    threading.Thread(target=_leave_with_others, args=(_watch,), name="watch", daemon=True).start()
    if cluster.process == 0:
        print(f"{cluster.processes} processes, found by {cluster.kind}", file=sys.stderr, flush=True)


def _no_devices(reason: str) -> str:
    """Returns the line for a jax without devices, with the extra that brings the plugin of those that were wanted."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    extra = "" if asked == "rocm" else {"gpu": "cuda", "tpu": "tpu"}.get(platform(), "")
    install = f"install its plugin (pip install 'gptjax[{extra}]') and its driver, or " if extra else ""
    if not reason or "list of known backends" in reason:
        reason = f"it has no plugin for JAX_PLATFORMS={asked}"
    return f"jax can't start: {' '.join(reason.split())}; {install}set JAX_PLATFORMS=cpu; see gptjax doctor"


def is_multi_process() -> bool:
    """Whether this process has joined others."""
    return _watch is not None


def is_main_process() -> bool:
    """Whether this process is the one that speaks: process 0, or one that is alone."""
    return _cluster is None or _cluster.process == 0


def process_label() -> str:
    """What this process calls itself in its errors: "process 1 of 4 on host"; "" where it is alone."""
    if _cluster is None:
        return ""
    return f"process {_cluster.process} of {_cluster.processes} on {os.uname().nodename}"


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns when every process has come here; a lost one ends the wait. No device has part in it."""
    if is_multi_process():
        key = f"gptjax/{name}/{_count(name)}"
        _waited(lambda: _client().wait_at_barrier(key, int(seconds * 1000)))


def wait_for_reports() -> None:
    """Waits until every process has said all it has to say, at most REPORT_SECONDS: one may hang in what it examines.

    Without it the first to leave with a problem ends the others in the middle of their reports.
    """
    with contextlib.suppress(Exception):
        barrier("reported", REPORT_SECONDS)


def broadcast_from_main(name: str, value: T) -> T:
    """Process 0's `value`, which JSON can hold, in every process; where files are seen later by some, it decides."""
    if not is_multi_process():
        return value
    assert _cluster is not None
    key = f"gptjax/told/{name}/{_count(name)}"
    if _cluster.process == 0:
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_waited(lambda: _client().blocking_key_value_get(key, int(BARRIER_SECONDS * 1000))))


def _waited(call: Callable[[], T]) -> T:
    """call(), in a thread: a signal reaches the main thread only while that waits in Python."""
    from concurrent.futures import Future

    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(call())
        except BaseException as e:
            made.set_exception(e)

    threading.Thread(target=run, name="wait", daemon=True).start()
    return made.result(BARRIER_SECONDS)


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds in every process."""
    if not is_multi_process():
        return ok
    assert _cluster is not None
    name = f"gptjax/objects/{_count('objects')}"
    if not ok:
        _client().key_value_set(f"{name}/{_cluster.process}", "")
    barrier("objects")
    return not _client().key_value_dir_get(f"{name}/")


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """The block runs in process 0 first, and then in the others, which find what it made."""
    if not is_main_process():
        barrier(name)
        yield
    else:
        yield
        barrier(name)


def all_reduce_max_lagged(local: Callable[[], int]) -> Callable[[], int]:
    """A function that gives every process the largest number that `local` gave any of them, one call later.

    Each call is a small reduction over all devices, which runs behind what was dispatched before; its result is read at
    the next call. So all processes must call it equally often.
    """
    if not is_multi_process():
        return local
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    mesh = Mesh(np.array(jax.devices()), ("all",))
    where = NamedSharding(mesh, jax.P("all"))
    largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, jax.P()))
    before: list[Any] = []

    def of_all() -> int:
        mine = np.array([local()], np.int32)
        numbers = jax.make_array_from_callback((jax.device_count(),), where, lambda index: mine)
        before.append(largest(numbers))
        return int(jax.device_get(before.pop(0))) if len(before) > 1 else 0

    return of_all


def exit_all(code: int) -> None:
    """Ends this process and the others with this code, or with that of another that was first to leave.

    Those that wait for this one would not find out alone.

    Returns where this process is alone. What is not on the disk by now is lost.
    """
    if not is_multi_process():
        return
    assert _watch is not None
    _watch.set()
    with contextlib.suppress(Exception):  # another process was first
        _client().key_value_set(_FAILED, json.dumps(code))
    with contextlib.suppress(Exception):  # the first one's code counts
        code = json.loads(_client().key_value_try_get(_FAILED))
    _end(code)


def _fail(heartbeat: float, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends all processes for an error that nobody caught, and says in which one it was."""
    if kind.__name__ == "JaxRuntimeError":  # a collective may have failed for a lost peer: then jax ends us, with 134
        print(f"gptjax: {process_label()}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        time.sleep(heartbeat + POLL_SECONDS)
    sys.__excepthook__(kind, error, trace)
    print(f"gptjax: {process_label()} failed", file=sys.stderr, flush=True)
    exit_all(1)


def _end(code: int) -> None:
    """Ends the process when all are ready for it: the coordinator's end would end the others with 134."""
    with contextlib.suppress(Exception):
        _client().wait_at_barrier("gptjax/leaving", int(LEAVE_SECONDS * 1000))
    if _cluster is not None and _cluster.process == 0:
        time.sleep(0.5)  # the others get the barrier's answer from here
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _leave_with_others(stop: threading.Event) -> None:
    """Ends this process with the code of one that has left."""
    while not stop.wait(POLL_SECONDS):
        with contextlib.suppress(Exception):  # none has, or jax is about to end this process
            code = json.loads(_client().key_value_try_get(_FAILED))
            if not stop.is_set():
                _end(code)


def _client() -> Any:
    client = _jax_state().client
    assert client is not None
    return client


def _jax_state() -> Any:
    from jax._src import distributed

    return distributed.global_state


_counts: dict[str, int] = {}


def _count(name: str) -> int:
    """How often this name was used before: all processes use each name equally often."""
    _counts[name] = _counts.get(name, -1) + 1
    return _counts[name]


def _keep_stdout() -> None:
    """Leaves stdout to Python: Gloo writes to it that it is connected, and `generate` owes it the text alone."""
    sys.stdout.flush()
    try:
        kept = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file, in a notebook or a test
        return
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, buffering=1)


def _seconds(name: str, default: float) -> float:
    value = os.environ.get(name, "")
    try:
        seconds = float(value) if value else default
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e7:
        raise InputError(f"{name}={value!r}: wanted a number of seconds, at least 1")
    return seconds
