"""What every test stands on: eight CPU devices, set before jax is imported, and the same examples in every run."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test sees what is compiled now
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pkv", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pkv")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_file():
    """XLA maps every compiled function into memory apart, and a process has 65,530 maps on Linux: then it crashes."""
    yield
    jax.clear_caches()
    gc.collect()
