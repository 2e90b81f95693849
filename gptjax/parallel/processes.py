"""The processes of a job: joining, agreement on values, and a common exit.

jax.distributed does the work; added here are detection (cluster.py), checks before the start (preflight.py), values
that process 0 decides for all, and exits: a process that fails names itself and ends the others instead of leaving them
waiting. With one process every function does nothing.
"""

import atexit
import collections
import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptjax.config.section import InputError, one_line
from gptjax.parallel.cluster import Cluster, find_cluster, given_rank
from gptjax.runtime.process import expected_platform
from gptjax.runtime.status import status, write_line
from gptjax.runtime.versions import versions

T = TypeVar("T")

WAIT_SECONDS, HEARTBEAT_SECONDS = 300.0, 60.0
BARRIER_SECONDS = 7 * 24 * 3600.0  # longer than any stage; a lost process ends the wait sooner
POLL_SECONDS, EXIT_SECONDS, REPORT_SECONDS = 1.0, 10.0, 60.0

_EXIT_CODE = "gptjax/exit_code"
_uses: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)  # the same in all: each key is used once

_cluster: Cluster | None = None
_stop_watch: threading.Event | None = None  # set once this process exits by itself; None where it is alone


def join_processes(settings: Mapping[str, Any], folder: str | Path | None = None) -> None:
    """Joins the processes of this job, if there are several. Call it before anything asks jax for its devices.

    All must have the same `settings` and see the same `folder` (the run's), which is made. Environment variables, in
    seconds: GPTJAX_WAIT_SECONDS (300) is the wait for the others, GPTJAX_HEARTBEAT_SECONDS (60) the silence after
    which a process counts as lost. Raises InputError where processes do not agree or a single process has no devices,
    and RetryableError where the same command may work later. Does nothing in a process that has joined already.
    """
    import jax

    global _cluster, _stop_watch
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
        except (RuntimeError, AssertionError) as e:  # its platform is missing, or the driver is
            raise InputError(no_devices(str(e))) from e
        return
    _cluster = cluster
    from gptjax.parallel.preflight import preflight

    path = None if folder is None or "://" in str(folder) else Path(folder).absolute()
    preflight(cluster, versions(), settings, path, wait)
    # Its handler would take SIGTERM from ours, and knows no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    _keep_stdout()
    job = (cluster.coordinator, cluster.processes, cluster.process, cluster.local_devices)
    limits: dict[str, Any] = {"initialization_timeout": int(wait), "heartbeat_timeout_seconds": int(heartbeat)}
    jax.distributed.initialize(*job, cluster_detection_method="deactivate", **limits)
    _stop_watch = threading.Event()
    sys.excepthook = functools.partial(_fail, heartbeat)
    atexit.register(_stop_watch.set)  # before jax's own handler, which shuts the client down
    threading.Thread(target=_exit_with_others, args=(_stop_watch,), name="exit-watch", daemon=True).start()
    if cluster.process == 0:
        print(f"{cluster.processes} processes, found by {cluster.kind}", file=sys.stderr, flush=True)


def no_devices(reason: str) -> str:
    """The error message for a jax without devices, with the extra that installs the plugin of the wanted platform."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    extra = "" if asked == "rocm" else {"gpu": "cuda12", "tpu": "tpu"}.get(expected_platform(), "")
    install = f"install its plugin (pip install 'gptjax[{extra}]') and its driver, or " if extra else ""
    if not reason or "list of known backends" in reason:
        reason = f"it has no plugin for JAX_PLATFORMS={asked}"
    return f"jax can't start: {one_line(reason)}; {install}set JAX_PLATFORMS=cpu; see gptjax doctor"


def is_multi_process() -> bool:
    """True once this process has joined others."""
    return _stop_watch is not None


def is_main_process() -> bool:
    """True in process 0, which prints and decides, and in a process that is alone."""
    return _cluster is None or _cluster.process == 0


def say(line: str) -> None:
    """Prints a line to stderr, in the main process alone."""
    if is_main_process():
        write_line(line)


def working(text: str) -> contextlib.AbstractContextManager[None]:
    """Says what is being done meanwhile, in the main process alone; see runtime.status."""
    first = is_main_process() and (is_multi_process() or not given_rank())
    return status(text) if first else contextlib.nullcontext()


def process_label() -> str:
    """The name of this process in errors: "process 1 of 4 on host"; "" where it is alone."""
    if _cluster is None:
        return ""
    return f"process {_cluster.process} of {_cluster.processes} on {os.uname().nodename}"


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process is here, on the host alone; a lost process ends the wait."""
    if is_multi_process():
        key = f"gptjax/{name}/{next(_uses[name])}"
        _in_thread(lambda: _client().wait_at_barrier(key, int(seconds * 1000)))


def wait_for_reports() -> None:
    """Waits until every process has printed its report, at most REPORT_SECONDS, since one may hang in a check.

    Without it the first process to exit with a problem ends the others in the middle of their reports.
    """
    with contextlib.suppress(Exception):
        barrier("reported", REPORT_SECONDS)


def broadcast_from_main(name: str, value: T) -> T:
    """Returns process 0's `value`, which JSON can hold, in every process; others may see its files only later."""
    if not is_multi_process():
        return value
    assert _cluster is not None
    key = f"gptjax/broadcast/{name}/{next(_uses[name])}"
    if _cluster.process == 0:
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_in_thread(lambda: _client().blocking_key_value_get(key, int(BARRIER_SECONDS * 1000))))


def _in_thread(call: Callable[[], T]) -> T:
    """Returns call(), run in a thread: a signal reaches the main thread only while that waits in Python."""
    from concurrent.futures import Future

    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=run, name="wait", daemon=True).start()
    return result.result(BARRIER_SECONDS)


def all_agree(ok: bool) -> bool:
    """True where `ok` is true in every process."""
    if not is_multi_process():
        return ok
    assert _cluster is not None
    name = f"gptjax/disagree/{next(_uses['disagree'])}"
    if not ok:
        _client().key_value_set(f"{name}/{_cluster.process}", "")
    barrier("disagree")
    return not _client().key_value_dir_get(f"{name}/")


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """Runs the block in process 0 first, and then in the others, which find its files."""
    if not is_main_process():
        barrier(name)
        yield
    else:
        yield
        barrier(name)


def all_reduce_max_lagged(local: Callable[[], int]) -> Callable[[], int]:
    """Returns a function whose value is the largest that `local` gave in any process at the call before.

    Each call dispatches a small reduction over all devices and reads the result of the previous one, so the loop never
    waits for it. All processes must call it equally often.
    """
    if not is_multi_process():
        return local
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    mesh = Mesh(np.array(jax.devices()), ("all",))
    sharded = NamedSharding(mesh, jax.P("all"))
    largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, jax.P()))
    pending: list[Any] = []

    def largest_of_all() -> int:
        mine = np.array([local()], np.int32)
        numbers = jax.make_array_from_callback((jax.device_count(),), sharded, lambda index: mine)
        pending.append(largest(numbers))
        return int(jax.device_get(pending.pop(0))) if len(pending) > 1 else 0

    return largest_of_all


def exit_all(code: int) -> None:
    """Exits all processes with one code; the first caller's wins.

    Returns at once where this process is alone. Whatever is not on the disk yet is lost.
    """
    if not is_multi_process():
        return
    assert _stop_watch is not None
    _stop_watch.set()
    _exit(first_exit_code(_client(), code))


def first_exit_code(client: Any, code: int) -> int:
    """The code of the first process that asked this key-value store for its exit; this one's where it is the first."""
    with contextlib.suppress(Exception):  # another process was first
        client.key_value_set(_EXIT_CODE, json.dumps(code))
    with contextlib.suppress(Exception):
        return json.loads(client.key_value_try_get(_EXIT_CODE))
    return code


def _fail(heartbeat: float, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exits all processes after an uncaught error, and names the process that raised it."""
    if kind.__name__ == "JaxRuntimeError":  # perhaps of a lost peer: then jax ends this process, with 134
        print(f"gptjax: {process_label()}: {one_line(error)}", file=sys.stderr, flush=True)
        time.sleep(heartbeat + POLL_SECONDS)
    sys.__excepthook__(kind, error, trace)
    print(f"gptjax: {process_label()} failed", file=sys.stderr, flush=True)
    exit_all(1)


def _exit(code: int) -> None:
    """Exits once all processes are ready to: if the coordinator exits first, the others end with 134."""
    with contextlib.suppress(Exception):
        _client().wait_at_barrier("gptjax/exit", int(EXIT_SECONDS * 1000))
    if _cluster is not None and _cluster.process == 0:
        time.sleep(0.5)  # the barrier's answer to the others comes from this process
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _exit_with_others(stop: threading.Event) -> None:
    """Exits with the code of the first process that exits."""
    while not stop.wait(POLL_SECONDS):
        with contextlib.suppress(Exception):  # none does, or jax is about to end this process
            code = json.loads(_client().key_value_try_get(_EXIT_CODE))
            if not stop.is_set():
                _exit(code)


def _client() -> Any:
    client = _jax_state().client
    assert client is not None
    return client


def _jax_state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def _keep_stdout() -> None:
    """Points file descriptor 1 elsewhere: Gloo prints to it, and `generate` must print its text alone."""
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
