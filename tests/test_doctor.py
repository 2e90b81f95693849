"""The doctor finds what is planted: versions that do not fit, devices that miscount, folders slow or closed."""

import functools
import importlib.metadata
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptjax.cli import main
from gptjax.config import MeshConfig
from gptjax.diagnostics.doctor import ceilings, collectives, examine, machine, versions
from gptjax.parallel.sharding import AXES, make_mesh


@pytest.fixture
def packages(monkeypatch):
    """Installs packages, as far as their metadata tell: install({name: version}, {name: [requirement]})."""
    version, requires = importlib.metadata.version, importlib.metadata.requires

    def install(versions, needs=None):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: (needs or {}).get(name) or requires(name))

    return install


@pytest.fixture
def nothing_else(monkeypatch):
    """Leaves the doctor nothing to look at but the versions."""
    monkeypatch.setattr(examine, "probes", lambda cfg: iter(()))


def problems(found):
    return [str(f).replace("\n", " ") for f in found if f.level == "PROBLEM"]


def test_the_versions_that_the_tests_run_on_go_together():
    assert problems(versions.check_versions()) == []


def test_versions_that_do_not_fit_are_reported_and_end_with_3(packages, nothing_else, capsys):
    assert main(["doctor"]) == 0
    packages({"flax": "0.12.12", "jax": "0.10.2"}, {"flax": ["jax>=0.11.1"]})
    capsys.readouterr()
    assert main(["doctor"]) == 3
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("PROBLEM"))
    assert "flax 0.12.12 needs jax>=0.11.1, and jax 0.10.2 is installed" in line
    assert "pip install 'jax>=0.11.1'" in out and "there are problems" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("installed", "needs", "said"),
    [
        ({"jaxlib": "0.9.0"}, {}, "jaxlib 0.9.0 is installed"),
        ({"tyro": "0.9.1"}, {}, "needs tyro"),
        (
            {"jax": "0.12.0", "jaxlib": "0.12.0", "jax-cuda12-plugin": "0.11.0"},
            {"jax": ['jax-cuda12-plugin[with-cuda]<=0.12.0,>=0.12.0; extra == "cuda12"'], "flax": ["jax>=0.11.1"]},
            "wants jax-cuda12-plugin<=0.12.0,>=0.12.0, got 0.11.0",
        ),
        ({"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.1"}, {"jax": ["numpy"]}, "halves of one thing"),
    ],
)
def test_versions_that_do_not_go_together_are_problems(packages, installed, needs, said):
    packages(installed, needs)
    assert any(said in line for line in problems(versions.check_versions())), versions.check_versions()


def test_a_known_bug_is_told_only_where_it_bites(packages, monkeypatch):
    packages({"jaxlib": "0.11.2"})
    for platform, told in (("tpu", True), ("gpu", False)):
        monkeypatch.setattr(versions, "expected_platform", lambda name=platform: name)
        assert any("xla#49143" in f.text for f in versions.check_versions()) == told
    packages({"tokamax": "0.0.12"}, {"tokamax": ["typeguard==2.13.3"]})
    said = [f.text for f in versions.check_versions() if f.level == "warning"]
    assert any("tokamax 0.0.12 needs typeguard==2.13.3" in text for text in said)
    assert any("pins typeguard" in text for text in said)


def test_jax_that_does_not_start_is_a_problem_and_not_a_traceback(monkeypatch, tmp_path, capsys):
    def start():
        raise RuntimeError("jaxlib version 0.9 is too old\nmore")

    monkeypatch.setattr("gptjax.cli.tune_process", start)
    out = tmp_path / "found.json"
    assert main(["doctor", "--json", str(out)]) == 3
    said = "RuntimeError: jaxlib version 0.9 is too old more; nothing that needs jax was checked"
    assert said in capsys.readouterr().out
    assert json.loads(out.read_text())["ok"] is False


def test_no_process_exits_before_all_have_reported(nothing_else, monkeypatch, tmp_path):
    out, seen = tmp_path / "a" / "new" / "folder" / "found.json", []
    monkeypatch.setattr(examine, "wait_for_reports", lambda: seen.append(out.exists() and json.loads(out.read_text())))
    assert main(["doctor", "--json", str(out)]) == 0
    assert len(seen) == 1 and seen[0]["ok"] is True
    out.unlink()
    monkeypatch.setattr(examine, "is_main_process", lambda: False)
    assert main(["doctor", "--json", str(out)]) == 0
    assert seen[1] is False and not out.exists()


def test_the_doctor_runs_every_probe_and_finds_no_problem_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(collectives, "SIZES", (4096,))
    monkeypatch.setattr(ceilings, "SECONDS", 0.05)
    monkeypatch.setattr(machine, "TOO_SLOW", 0.0)  # others may be busy with this disk
    monkeypatch.setattr(machine, "NO_SPACE", 0)
    out, runs = tmp_path / "found.json", tmp_path / "runs"
    assert main(["doctor", "--json", str(out), "--run-dir", str(runs)]) == 0
    report = json.loads(out.read_text())
    subjects = {f["subject"] for f in report["findings"]}
    assert subjects == {"versions", "devices", "arithmetic", "peak", "collectives", "host", "cache", "input",
                        "run folder", "disk space", "clock"}  # fmt: skip
    assert report["ok"] and report["devices"]["count"] == 8 and not runs.exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))


def test_collectives_over_each_axis_and_over_all_are_those_of_numpy():
    for axes in (("data",), ("tensor",), AXES):
        assert collectives.check_axes(mesh(), axes, 4096)[0] == []
    assert collectives.sizes_over_axes(8) == [2, 2, 2, 1] and collectives.sizes_over_axes(6) == [2, 3, 1, 1]


def test_a_collective_that_gives_one_wrong_integer_is_found(monkeypatch):
    right = collectives._exchange
    first = {name: i for i, name in enumerate(collectives.COLLECTIVES)}

    def wrong(axes, parts, x_1L):
        out = right(axes, parts, x_1L)
        # On one device, one number of each but the first is off by one.
        off = jnp.where(jax.lax.axis_index(AXES) == 5, 1.0, 0.0)
        return {name: x if first[name] == 0 else x.at[0, first[name]].add(off) for name, x in out.items()}

    monkeypatch.setattr(collectives, "_exchange", wrong)
    assert collectives.check_axes(mesh(), ("tensor",), 4096)[0] == list(collectives.COLLECTIVES[1:])
    monkeypatch.setattr(collectives, "SIZES", (4096,))
    monkeypatch.setattr(collectives, "sizes_over_axes", lambda count: [1, 1, 1, count])
    told = problems(collectives.check_collectives())
    assert len(told) == 1 and "all-reduce" in told[0] and "4 KiB over context=8 gave wrong numbers" in told[0]


def test_a_device_that_miscounts_is_found(monkeypatch):
    assert machine.arithmetic().level == "ok"
    monkeypatch.setattr(machine.jnp, "sqrt", lambda x: x * 0)
    assert machine.arithmetic().level == "PROBLEM" and "sqrt on" in machine.arithmetic().text


def test_a_device_that_jax_does_not_use_is_found(monkeypatch):
    monkeypatch.setattr(machine, "expected_platform", lambda: "gpu")
    assert machine.devices().level == "PROBLEM" and "this machine has a gpu" in machine.devices().text


def test_a_run_folder_that_can_not_be_written_is_found(tmp_path, nothing_else, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        told = problems(machine.run_folder(str(place)))
        assert len(told) == 1 and "can't be written" in told[0]
    monkeypatch.setattr(examine, "probes", lambda cfg: iter([("run folder", lambda: machine.run_folder(cfg.run_dir))]))
    assert main(["doctor", "--run-dir", str(tmp_path / "file")]) == 3


def test_a_run_folder_that_is_slow_is_found_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(machine.os, "fsync", lambda descriptor: time.sleep(0.3))  # 4 MiB in 0.3 s
    monkeypatch.setattr(machine, "TOO_SLOW", 20e6)
    start = time.perf_counter()
    found = list(machine.run_folder(str(tmp_path)))
    assert time.perf_counter() - start < 10 and found[0].level == "PROBLEM" and "MB/s" in found[0].text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_and_a_clock_that_is_wrong_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_write", lambda probe: (1e9, 1e-3, -40.0))
    monkeypatch.setattr(machine, "NO_SPACE", 2**60)
    levels = {f.subject: f.level for f in machine.run_folder(str(tmp_path))}
    assert levels == {"run folder": "ok", "disk space": "PROBLEM", "clock": "warning"}


def test_a_compile_cache_that_others_can_write_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.compile_cache().level == "ok"
    folder = tmp_path / "gptjax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert machine.compile_cache().level == "PROBLEM" and "chmod 700" in machine.compile_cache().advice
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.compile_cache().level == "PROBLEM" and "set XDG_CACHE_HOME" in machine.compile_cache().advice


def test_a_probe_that_fails_is_a_finding_and_the_rest_run(monkeypatch, capsys):
    def broken():
        raise RuntimeError("NCCL: no route to host")

    looks = [("collectives", broken), ("host", lambda: [machine.host()])]
    monkeypatch.setattr(examine, "probes", lambda cfg: iter(looks))
    assert main(["doctor"]) == 3
    out = capsys.readouterr().out
    assert "no route to host" in out and " host " in out
