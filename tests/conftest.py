"""Settings for every test: CPU, two forced host devices as in scripts, programs compiled quickly and once."""

import importlib
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The threads of OpenBLAS spin against those of XLA: on a loaded machine LAPACK then takes several times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

from circuits_jax.training import devices

# Most of the time of a test is compilation. jaxlib ends the process at a flag that it no longer knows.
quick = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    quick += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_num_cpu_devices", 2)


def pytest_configure(config):
    """One folder of compiled programs for both pytest processes and the scripts they start, kept if it has a name."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    # What the other process has half written, or a killed one left, is compiled anew.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A long session would otherwise hold thousands of programs and run out of memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def refuse(monkeypatch, capsys):
    """What an experiment prints to bad input, as its script does, but in this process: jax takes seconds to import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    monkeypatch.setattr(devices, "use_all_cores", lambda n_runs: None)

    def printed(experiment, *arguments):
        job = importlib.import_module(experiment)
        with pytest.raises(SystemExit) as stopped:
            job.run_folder.run_command(lambda: job.prepare(job.tyro.cli(job.Settings, args=arguments)), job.main)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return printed


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that at the end no process is left alone with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
