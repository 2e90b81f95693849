"""Process setup before jax starts: the platform without jax, and malloc tuning."""

import platform

import pytest
from corpora import run_python

from gptjax.runtime import process as startup


@pytest.mark.parametrize(
    ("environment", "devices", "wanted"),
    [
        ({"JAX_PLATFORMS": "cpu"}, ["dev/nvidia0"], "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], "gpu"),
        ({}, ["dev/nvidia0"], "gpu"),
        ({}, ["dev/nvidiactl"], "cpu"),
        ({}, ["dev/dxg"], "cpu"),  # of Intel
        ({}, ["dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"], "gpu"),
        ({}, ["dev/accel0"], "tpu"),
        ({"TPU_WORKER_ID": "0"}, [], "tpu"),
        ({}, [], "cpu"),
    ],
)
def test_the_platform_is_known_without_jax(tmp_path, environment, devices, wanted):
    for name in devices:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert startup.expected_platform(environment, tmp_path) == wanted


PROGRAM = """
import resource
import sys

if sys.argv[1] == "kept":
    from gptjax.runtime.process import keep_freed_memory

    assert keep_freed_memory()


def touch():
    b'x' * (48 << 20)  # 12,288 pages, given up at once


touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kind):
    return int(run_python(PROGRAM, kind).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is tuned where it is glibc's")
def test_freed_memory_is_used_again_without_faults():
    assert faults("plain") > 5 * 10_000  # what it is about: else this test would prove nothing
    assert faults("kept") < 100
