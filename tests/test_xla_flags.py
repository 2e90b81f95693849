"""Flags for XLA: only those that it knows, and never against the user's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.runtime import xla_flags

REAL, UNKNOWN = "--xla_cpu_enable_fast_math=false", "--xla_cpu_no_such_flag=true"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")


def test_an_unknown_flag_is_left_out_with_one_line_and_jax_starts(monkeypatch, capfd):
    monkeypatch.setitem(xla_flags.FLAGS, "cpu", (REAL, UNKNOWN))
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == REAL
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and UNKNOWN in told[0] and REAL not in told[0]
    started = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True)
    assert started.returncode == 0


def test_flags_are_tried_once_for_a_version(monkeypatch):
    tried = []
    monkeypatch.setattr(xla_flags, "_tried", lambda flags, variable: tried.append(flags) or (list(flags), ""))
    monkeypatch.setitem(xla_flags.FLAGS, "cpu", (REAL,))
    for _ in range(2):
        monkeypatch.setenv("XLA_FLAGS", "")
        xla_flags.set_xla_flags()
        assert os.environ["XLA_FLAGS"] == REAL
    monkeypatch.setattr(xla_flags, "version", lambda package: "another")
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.set_xla_flags()
    assert len(tried) == 2


def test_what_the_user_set_stays_and_no_try_is_made_where_nothing_is_left(monkeypatch):
    own = "--xla_cpu_enable_fast_math=true --xla_dump_to=/nowhere"
    monkeypatch.setenv("XLA_FLAGS", own)
    monkeypatch.setitem(xla_flags.FLAGS, "cpu", (REAL,))
    monkeypatch.setattr(xla_flags, "known_flags", lambda *_: pytest.fail("nothing was left to try"))
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == own


def test_a_try_that_hangs_is_given_up_and_made_again_at_the_next_start(monkeypatch, capfd):
    monkeypatch.setattr(xla_flags, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(xla_flags, "_SECONDS", 0.3)
    assert xla_flags.known_flags([REAL], "XLA_FLAGS") == []
    assert "took more than" in capfd.readouterr().err
    monkeypatch.setattr(xla_flags, "_PROGRAM", "")
    monkeypatch.setattr(xla_flags, "_SECONDS", 60.0)
    assert xla_flags.known_flags([REAL], "XLA_FLAGS") == [REAL]


@pytest.mark.parametrize(
    ("environment", "devices", "wanted"),
    [
        ({"JAX_PLATFORMS": "cpu"}, ["nvidia0"], "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], "gpu"),
        ({}, ["nvidia0"], "gpu"),
        ({}, ["nvidiactl"], "cpu"),
        ({}, ["accel0"], "tpu"),
        ({"TPU_WORKER_ID": "0"}, [], "tpu"),
        ({}, [], "cpu"),
    ],
)
def test_the_platform_is_told_without_jax(tmp_path, environment, devices, wanted):
    for name in devices:
        (tmp_path / name).touch()
    assert xla_flags.platform(environment, tmp_path) == wanted


def test_neither_the_flags_nor_the_command_line_import_jax():
    program = "import sys, gptjax.cli, gptjax.runtime.xla_flags; assert 'jax' not in sys.modules"
    root = str(Path(xla_flags.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_a_file_of_flags_is_left_to_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "/some/flags.txt")
    monkeypatch.setitem(xla_flags.FLAGS, "cpu", (REAL,))
    monkeypatch.setattr(xla_flags, "platform", lambda: "cpu")
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "/some/flags.txt"


def test_no_flag_for_gpus_is_this_xlas_default_and_those_left_out_are():
    program = (
        "from jaxlib import _jax; options = _jax.CompileOptions(); build = options.executable_build_options;"
        "build.debug_options.xla_dump_to = ''; print(options.SerializeAsString())"
    )

    def options(flag):
        env = {**os.environ, "XLA_FLAGS": flag}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    default = options("")
    for flag in xla_flags.FLAGS["gpu"]:
        assert options(flag) != default, f"{flag} is a default now; leave it out"
    for name in ("pipelined_reduce_scatter", "highest_priority_async_stream"):
        assert options(f"--xla_gpu_enable_{name}=true") == default, f"{name} is no default any more; set it"
