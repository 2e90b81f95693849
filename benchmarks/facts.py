"""What must stand beside the numbers of a report: date, command, commit and versions."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
