"""What a release is made of agrees: bounds, tested versions, extras, citation, workflows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from gptjax.runtime.versions import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]


def constraints(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pins}


@pytest.mark.parametrize("name", ["py3.11.txt", "py3.12.txt", "lowest.txt"])
def test_every_dependency_has_a_tested_version_within_its_bounds(name):
    pins = constraints(name)
    for need in DEPENDENCIES:
        assert pins[need.name.lower()] in need.specifier, need


def test_the_lowest_tested_versions_are_the_floors_of_the_bounds():
    pins = constraints("lowest.txt")
    for need in DEPENDENCIES:
        (floor,) = (Version(s.version) for s in need.specifier if s.operator == ">=")
        assert Version(pins[need.name.lower()]) == floor, need


def test_pages_and_scripts_name_extras_that_are_there():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("gptjax/**/*.py"), *ROOT.glob("launch/*")]
    found = {}
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for extras in re.findall(r"(?:gptjax|'\.|\"\.)\[([a-z][a-z0-9,-]*)\]", text):
            found |= {extra: path for extra in extras.split(",")}
    assert found.keys() >= {"cuda12", "tpu", "dev"} and not found.keys() - EXTRAS.keys(), found


def test_private_interfaces_have_a_cap():
    capped = {need.name for need in DEPENDENCIES if any(s.operator == "<" for s in need.specifier)}
    assert {"orbax-checkpoint", "tyro"} <= capped


def test_citation_and_workflows_are_yaml_of_this_version():
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / "launch" / "sky.yaml"]
    assert len(files) >= 6 and all(isinstance(yaml.safe_load(path.read_text()), dict) for path in files)
    sky = yaml.safe_load(files[-1].read_text())
    assert {"envs", "resources", "setup", "run"} <= sky.keys() and set(sky["envs"]["EXTRA"].split(",")) <= EXTRAS.keys()
