"""Eight fake CPU devices, set before jax is imported; tests must not touch the user's cache folder."""

import os
import random

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def highest_precision():
    """Products of float32 in float32 on every platform."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """A compile cache of the module's own, for tests whose runs compile the same programs."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of words that can be learned, in a folder of the module's own."""
    rng = random.Random(0)
    some = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(50)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choices(some, k=5000)))
    return path


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded as their `summary`, such as how many snippets of a page ran."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary" and report.when == "call":
                terminalreporter.write_line(value)
