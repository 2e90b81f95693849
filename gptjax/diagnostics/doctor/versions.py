"""Checks of installed versions: misfits, and known bugs. Imports no jax, since a misfit may prevent that.

Requirements come from the packages' own metadata; the table holds bugs alone.
"""

import contextlib
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from gptjax.diagnostics.doctor.finding import Finding, Level
from gptjax.runtime.process import expected_platform
from gptjax.runtime.versions import version

# Packages whose requirements are checked: those of gptjax, and others known to pin versions.
CORE = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "array-record", "tyro",
        "tensorboardX")  # fmt: skip
OTHERS = ("grain", "tokamax", "transformers", "datasets", "chex", "distrax")
# jax states these versions as extras, which bind only what is installed.
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
# Each plugin comes in two packages, of which one names the other's version.
PARTNERS = {"jax-cuda12-plugin": "jax-cuda12-pjrt", "jax-cuda13-plugin": "jax-cuda13-pjrt",
            "jax-rocm7-plugin": "jax-rocm7-pjrt"}  # fmt: skip
NEWEST_PYTHON, NEWEST_JAX = (3, 13), "0.13"  # what is tested lies below


class Known(NamedTuple):
    """A bug of `package` in versions first <= v <= last on some platforms."""

    package: str
    first: str
    last: str
    platforms: tuple[str, ...]
    text: str
    advice: str


KNOWN = (
    Known("jaxlib", "0.10.2", "0.11.0", ("gpu",),
          "float32 scatter-add can be hundreds of times slower (openxla/xla#46225); gptjax's embedding avoids it, a "
          "loss or block of your own may not", "pip install 'jax>=0.11.1' (Python 3.12)"),
    Known("jaxlib", "0.10.2", "0.10.2", ("gpu", "tpu"),
          "the gradient of a scatter over mesh.tensor can be wrong (openxla/xla#42481)",
          "run `gptjax verify` before you set --mesh.tensor, or pip install 'jax>=0.11.1'"),
    Known("jaxlib", "0.11.2", "0.11.2", ("tpu",),
          "accumulated embedding gradients can be wrong (openxla/xla#49143)",
          "run `gptjax verify`, keep --optim.accumulate 1, or pip install 'jax[tpu]>=0.12'"),
    Known("jaxlib", "0.11.0", "0.11.1", ("gpu",),
          "single operations gave wrong numbers on some GPUs with CUDA 13 (jax-ml/jax#40633)",
          "look at the line 'arithmetic' here"),
    Known("tokamax", "0", "0.0.12", ("cpu", "gpu", "tpu"), "it pins typeguard and with it an old tyro",
          "install it in an environment of its own"),
)  # fmt: skip


def check_versions() -> list[Finding]:
    """One finding with all versions, and one for each misfit or known bug."""
    names = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tyro", *PLUGINS)
    installed = {name: number for name in names if (number := version(name))}
    python = ".".join(map(str, sys.version_info[:3]))
    shown = ", ".join(f"{name} {number}" for name, number in {"python": python, **installed}.items())
    summary = Finding("versions", "ok", shown, data={"python": python, **installed})
    return [summary, *_unmet(), *_plugins(), *_known(expected_platform()), *_untested()]


def _requirements(package: str) -> Iterator[Requirement]:
    """The requirements of a package by its metadata; for gptjax in a checkout, by pyproject.toml."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        project, lines = Path(__file__).parents[3] / "pyproject.toml", []
        if package == "gptjax" and project.is_file():
            lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    for line in lines:
        with contextlib.suppress(InvalidRequirement):  # pip can't read it either
            yield Requirement(line)


def _unmet() -> Iterator[Finding]:
    for package in (*CORE, *OTHERS):
        here = version(package)
        for need in _requirements(package) if here else ():
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            have = version(need.name)
            if have and need.specifier.contains(have, prereleases=True):
                continue
            level: Level = "PROBLEM" if package in CORE else "warning"
            if have:
                text = f"{package} {here} needs {need.name}{need.specifier}, and {need.name} {have} is installed"
                advice = f"pip install '{need.name}{need.specifier}', or another {package}"
            else:
                text, advice = f"{package} {here} needs {need.name}, which is missing", f"pip install '{need.name}'"
            yield Finding("versions", level, text, advice, {"package": package, "needs": str(need)})


def _plugins() -> Iterator[Finding]:
    """Plugins that do not fit, which jax ignores, computing on the CPU instead."""
    jax = version("jax")
    wanted = {need.name: need.specifier for need in _requirements("jax") if need.name in PLUGINS}
    for plugin in PLUGINS:
        have, partner = version(plugin), PARTNERS.get(plugin, "")
        if have and plugin in wanted and not wanted[plugin].contains(have, prereleases=True):
            level: Level = "warning" if plugin == "libtpu" else "PROBLEM"
            extra = "tpu" if plugin == "libtpu" else plugin.split("-")[1]
            advice = f"pip install 'jax[{extra}]=={jax}'"
            yield Finding("versions", level, f"jax {jax} wants {plugin}{wanted[plugin]}, got {have}", advice)
        if have and partner and version(partner) not in ("", have):
            text = f"{plugin} {have} and {partner} {version(partner)} are halves of one thing, of different versions"
            yield Finding("versions", "PROBLEM", text, f"pip install '{partner}=={have}'")


def _known(here: str) -> Iterator[Finding]:
    for bug in KNOWN:
        have = version(bug.package)
        if have and here in bug.platforms and Version(bug.first) <= Version(have) <= Version(bug.last):
            yield Finding("versions", "warning", f"{bug.package} {have}: {bug.text}", bug.advice)


def _untested() -> Iterator[Finding]:
    jax = version("jax")
    if sys.version_info[:2] > NEWEST_PYTHON:
        text = f"Python {sys.version_info[0]}.{sys.version_info[1]} is newer than what is tested"
        yield Finding("versions", "warning", text, "run `gptjax verify`")
    if jax and Version(jax) >= Version(NEWEST_JAX):
        yield Finding("versions", "warning", f"jax {jax} is newer than what is tested", "run `gptjax verify`")
