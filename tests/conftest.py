"""Settings for every test: CPU, with two forced host devices, so that sweeps run as scripts run them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The threads of OpenBLAS spin against those of XLA: on a loaded machine LAPACK then takes several times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A long session would otherwise hold thousands of programs and run out of memory maps."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that at the end no process is left alone with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
