"""What every test stands on: eight CPU devices, set before jax is imported, and the same examples in every run.

Most of a test's time is compiling, often of programs that another test has compiled: they are kept for the session, in
a directory of its own. Programs are still traced, lowered and counted in each test. LLVM doesn't optimise what it makes
of them: that takes longer than tiny arrays take in slow programs.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
if "PKV_TESTS_COMPILED" not in os.environ:  # a worker of pytest-xdist shares its parent's
    os.environ["PKV_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="pkv-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["PKV_TESTS_COMPILED"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["PKV_TESTS_COMPILED"]
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pkv", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pkv")


# The files that take minutes. They begin a run: at its end one of two processes would wait for the other.
LONGEST = ("test_plan", "test_train", "test_sampling_memory", "test_hosts", "test_sampling", "test_grpo")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_file():
    """XLA maps every compiled function into memory apart, and a process has 65,530 maps on Linux: then it crashes."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_runtest_logreport(report: pytest.TestReport):
    """A failure is told at once: a run that is cut short would not come to the list at its end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}", file=sys.__stdout__, flush=True)
