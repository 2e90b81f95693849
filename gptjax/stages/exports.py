"""Exports of a run while it trains: each by a process of its own, so that no step waits and no failure ends the run."""

import contextlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.interop.export_check import partial_of
from gptjax.parallel.processes import is_main_process, say, working
from gptjax.runs.events import write_event
from gptjax.runs.run import Run

PACKAGE = Path(__file__).parents[2]
NICENESS = 10


class Exports:
    """Folders exports/step_N of a run, made of its checkpoints each `every` steps and after the last one; 0: none.

    They are made one after the other, by the verb `export`. A failed one is an event and a line. Left as a context
    after an error, and by `stop`, it ends the one that is being made; else it waits until all are there.
    """

    def __init__(self, run: Run, every: int, last: int):
        self._run, self._every, self._last = run, every, last
        self._thread = ThreadPoolExecutor(1, "export")
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False
        self.steps: set[int] = set()
        """Steps whose exports are not done, and whose checkpoints are still needed."""

    def begin(self, step: int, last: bool = False) -> None:
        """Exports a step, which is committed, where its turn has come and it is not there yet; returns at once.

        The last step's has come; it is step `last` of the settings, or one after which the run ended.
        """
        due = self._every and step and (step % self._every == 0 or step == self._last or last)
        if due and is_main_process() and not self._folder(step).exists():
            self.steps.add(step)
            self._thread.submit(self._export, step)

    def stop(self) -> None:
        """Ends what is being exported, of which nothing is left."""
        self._stopped = True
        if (child := self._child) is not None:
            child.kill()

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.stop()
        with working("exporting") if self.steps else contextlib.nullcontext():
            self._thread.shutdown()

    def _folder(self, step: int) -> Path:
        return self._run.exports / f"step_{step}"

    def _export(self, step: int) -> None:
        try:
            failure = "" if self._stopped else self._run_verb(step)
            if failure and not self._stopped:
                say(f"warning: step {step} could not be exported ({failure}); the run goes on")
                write_event(self._run.events_path, step, "export_failed", reason=failure)
            elif not self._stopped:
                write_event(self._run.events_path, step, "exported", folder=f"exports/step_{step}")
        except (InputError, OSError) as e:
            say(f"warning: the export of step {step} could not be noted ({one_line(e)})")
        finally:
            self.steps.discard(step)

    def _run_verb(self, step: int) -> str:
        """Exports a step; the reason where that failed."""
        folder = self._folder(step)
        command = [sys.executable, "-m", "gptjax", "export", str(self._run.folder), str(folder), "--step", str(step)]
        paths = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
        try:
            folder.parent.mkdir(exist_ok=True)
            # In a session of its own, for Ctrl-C is meant for the run, which ends it.
            self._child = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            os.setpriority(os.PRIO_PROCESS, self._child.pid, NICENESS)
            if self._stopped:  # while it was started
                self._child.kill()
            said = self._child.communicate()[1].strip().splitlines()
            if self._child.returncode:
                shutil.rmtree(partial_of(folder), ignore_errors=True)
                return one_line(said[-1].removeprefix("gptjax: ")) if said else f"code {self._child.returncode}"
            if self._run.local != self._run.folder:  # a bucket, of whose exports this machine keeps none
                self._run.push(self._run.exports)
                shutil.rmtree(folder)
        except (InputError, OSError) as e:
            return one_line(e)
        return ""
