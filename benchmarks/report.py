"""What reports have in common: facts beside their numbers, the processor, spreads of measurements, their file."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


def facts(device: str | dict[str, Any], *packages: str) -> dict[str, Any]:
    """date, command, commit ("-dirty" where the tree was changed), device as given, versions of Python and packages."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or "unknown",
        "device": device,
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
    }


def processor() -> str:
    """The name of the processor, and the number of its cores that this process may use."""
    from gptjax.runtime.process import usable_cores  # the reports of other libraries have no gptjax

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {usable_cores()} cores"


def spread(values: list[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {"median": float(middle), "p5": float(low), "p95": float(high)}


def write_report(report: dict[str, Any], folder: Path, name: str) -> Path:
    """Writes DATE_name.json into the folder, which is made where it is missing, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['date']}_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
