"""What every test stands on: eight CPU devices, set before jax is imported, and the same examples in every run."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test sees what is compiled now
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from hypothesis import HealthCheck, settings

settings.register_profile(
    "pkv", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pkv")
