"""What a process sets for itself before jax starts."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys

if sys.argv[1] == "kept":
    from gptjax.startup import keep_freed_memory

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
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is tuned where it is glibc's")
def test_freed_memory_is_used_again_without_faults():
    assert faults("plain") > 5 * 10_000  # what it is about: else this test would prove nothing
    assert faults("kept") < 100
