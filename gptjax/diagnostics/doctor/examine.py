"""All probes of `gptjax doctor`: one line for each finding, and a JSON file of all.

Nothing that needs jax is imported before the versions are checked, since versions that do not fit may prevent it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gptjax.config.checks import DoctorConfig
from gptjax.config.section import one_line
from gptjax.diagnostics.doctor import versions
from gptjax.diagnostics.doctor.finding import Finding, worst
from gptjax.parallel.processes import is_main_process, wait_for_reports
from gptjax.runs.run import environment
from gptjax.storage import write_json

Probe = Callable[[], Iterable[Finding]]
SUMMARY = {"PROBLEM": "there are problems", "warning": "nothing stands in the way", "ok": "all is well"}


def examine(cfg: DoctorConfig, say: Callable[[str], None], start: Callable[[], None]) -> bool:
    """Runs every probe, reporting each finding in a line, and returns True where there is no problem.

    start() is called before jax computes anything: it tunes the process, and joins the processes of a cluster. With
    cfg.json all findings are written to that file too.
    """
    began, findings = time.perf_counter(), versions.check_versions()
    report, parts = {}, iter(())
    try:
        start()
        report = environment()
        parts = probes(cfg)
    except Exception as e:  # a finding like any other
        findings.append(_failed("start", e, "nothing that needs jax was checked"))
    first = is_main_process()
    if cfg.json and first:
        write_json(cfg.json, {"ok": False, "findings": []})  # fails now where it can't be written
    for finding in findings:
        if first:
            say(str(finding))
    for name, probe in parts:
        try:
            new = list(probe())
        except Exception as e:
            new = [_failed(name, e, "nothing is known of it; the rest was checked")]
        for finding in new:
            # Process 0 reports for all; the others report their problems alone.
            if first or finding.level == "PROBLEM":
                say(str(finding))
        findings += new
    problems, warnings = (sum(finding.level == level for finding in findings) for level in ("PROBLEM", "warning"))
    if cfg.json and first:
        entries = [dataclasses.asdict(finding) for finding in findings]
        write_json(cfg.json, report | {"ok": not problems, "findings": entries})
    if first or problems:
        seconds = time.perf_counter() - began
        say(f"doctor: {SUMMARY[worst(findings)]}: {problems} problem(s), {warnings} warning(s), {seconds:.0f} s")
    wait_for_reports()
    return not problems


def probes(cfg: DoctorConfig) -> Iterator[tuple[str, Probe]]:
    """The name and function of each probe, in order."""
    from gptjax.diagnostics.doctor import ceilings, collectives, machine

    yield "devices", lambda: [machine.devices()]
    yield "arithmetic", lambda: [machine.arithmetic()]
    yield "peak", lambda: [machine.peak()]
    yield "collectives", collectives.check_collectives
    yield "host", lambda: [machine.host()]
    yield "cache", lambda: [machine.compile_cache()]
    yield "input", lambda: [ceilings.input_ceiling()]
    yield "run folder", lambda: machine.run_folder(cfg.run_dir)


def _failed(name: str, error: Exception, then: str) -> Finding:
    data: dict[str, Any] = {"error": type(error).__name__}
    return Finding(name, "PROBLEM", f"{type(error).__name__}: {one_line(error)}", then, data)
