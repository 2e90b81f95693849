"""The lease of a run in a bucket, built on one operation: create an object if it does not exist.

.lease/00000003 is the third term. The process that creates the object holds the run; the store lets one succeed. The
holder rewrites 00000003.beat every BEAT seconds. Another process takes the next term once it sees no new beat for LEASE
seconds of its own clock (clocks of two machines are never compared), or sees on the same machine that the holder is
dead. A holder that sees a higher term than its own has lost the run and stops; it checks before every commit, delete
and upload.

The limit: a process that is suspended for more than LEASE seconds between a check and the write after it still does
that write after another took over. It can damage only the step it was committing, whose digests a restore checks.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config.section import InputError
from gptjax.storage.disk import taken, this_process

if TYPE_CHECKING:
    from gptjax.storage.bucket import Bucket

BEAT, LEASE, POLL = 10.0, 60.0, 1.0  # seconds


class Lease:
    """Holds `folder` for this process from now on; raises InputError where another process holds it."""

    def __init__(self, store: "Bucket", folder: Path):
        self._store, self._run, self._folder = store, folder, folder / ".lease"
        self._me = {"holder": this_process(), **_identity()}
        self._beats, self._lost, self._ended = 0, "", threading.Event()
        newest = self._newest()
        if newest:
            self._wait_for_end(newest)
        self.term = newest + 1
        try:
            store.create(self._folder / f"{self.term:08d}", self._record())
        except FileExistsError:
            raise taken(self._run, "another process, which came first") from None
        self.check(now=True)  # a slow process may have created a term that was over and deleted long ago
        self._beat()
        for name in store.names(self._folder):
            if (number := name.split(".")[0]).isdecimal() and int(number) < self.term:
                store.remove(self._folder / name)
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        atexit.register(self.release)

    def check(self, now: bool = False) -> None:
        """Raises InputError where the run was taken over, as of the last beat, or with `now` as of this moment."""
        if now and not self._lost and (newest := self._newest()) > self.term:
            self._lost = self._read(newest).get("holder", "another process")
        if self._lost:
            raise InputError(
                f"{self._run} was taken over by {self._lost} while this process gave no sign of life for "
                f"{LEASE:.0f} seconds; the run goes on there"
            )

    def release(self) -> None:
        """Releases the run, so that the next process need not wait."""
        if not self._ended.is_set():
            self._ended.set()
            with contextlib.suppress(Exception):  # a lease that can't be released expires
                self._store.write(self._folder / f"{self.term:08d}.beat", self._record(released=True))
        atexit.unregister(self.release)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            # A store that does not answer takes no commits either, and the lease may expire.
            with contextlib.suppress(Exception):
                self.check(now=True)
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        if not self._ended.is_set():
            self._store.write(self._folder / f"{self.term:08d}.beat", self._record(beat=self._beats))

    def _record(self, **more: Any) -> bytes:
        return json.dumps({**self._me, **more}).encode()

    def _newest(self) -> int:
        return max((int(n) for n in self._store.names(self._folder) if n.isdecimal()), default=0)

    def _read(self, term: int) -> dict[str, Any]:
        """The last beat of a term's holder."""
        for name in (f"{term:08d}.beat", f"{term:08d}"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return dict(json.loads(self._store.read(self._folder / name)))
        return {}

    def _wait_for_end(self, term: int) -> None:
        """Waits until a term's holder released it, is dead, or gave no beat for LEASE seconds; InputError at a beat."""
        seen, until = self._read(term), time.monotonic() + LEASE
        if seen.get("released") or _died_here(seen):
            return
        holder = seen.get("holder", "another process")
        line = f"{self._run} is held by {holder}; waiting {LEASE:.0f} s for a sign of life"
        print(line, file=sys.stderr, flush=True)
        while time.monotonic() < until:
            time.sleep(POLL)
            now = self._read(term)
            if now.get("released"):
                return
            if now != seen:
                raise taken(self._run, holder)


def _identity() -> dict[str, Any]:
    """The identity of this process across machines, on Linux; empty elsewhere, where a dead holder is waited for."""
    try:
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": os.readlink("/proc/self/ns/pid"),  # containers of one machine number their processes anew
            "pid": os.getpid(),
            "ticks": _status(os.getpid())[1],
        }
    except OSError:
        return {}


def _status(pid: int) -> tuple[str, str]:
    """A process's state letter and start time in ticks since the boot; see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _died_here(record: dict[str, Any]) -> bool:
    """True where the holder ran on this machine and is dead; False where that is unknown."""
    mine = _identity()
    if not mine or any(record.get(k) != mine[k] for k in ("boot", "namespace")) or "ticks" not in record:
        return False
    try:
        state, ticks = _status(int(record["pid"]))
    except (OSError, ValueError, IndexError):
        return True
    return state in "ZX" or ticks != record["ticks"]
