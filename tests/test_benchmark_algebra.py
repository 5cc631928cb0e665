"""The benchmark of the algebra as a user runs it, small: every task, and the same numbers from every contender."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "benchmarks" / "algebra.py"
TASKS = {
    "ov_singular_values", "qk_singular_values", "ov_svd", "qk_svd", "ov_eigenvalues", "qk_eigenvalues",
    "full_ov_eigenvalues", "full_qk_singular_values", "composition", "eigenvalue_solver",
}  # fmt: skip
CLOSE = 1e-4  # relative to the largest value of a head


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--smoke", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    runs = tmp_path_factory.mktemp("algebra")
    done = run("--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    folder = runs / "algebra_benchmark_smoke"
    return done, folder, json.loads((folder / "summary.json").read_text())


def assert_same_numbers(summary: dict, contender: str, tasks: set[str]) -> None:
    differences = {task: summary[f"{task}.difference.{contender}"]["value"] for task in tasks}
    assert all(value < CLOSE for value in differences.values()), differences


def test_every_task_is_measured(smoke):
    done, folder, summary = smoke
    assert "Warning" not in done.stderr + done.stdout
    assert {name.split(".")[0] for name in summary} == TASKS | {"matmul_peak"}
    assert all(set(figure) == {"value", "interval", "aim", "met"} for figure in summary.values())
    for task in TASKS:
        assert summary[f"{task}.seconds.circuits_jax"]["value"] > 0
        assert summary[f"{task}.error.circuits_jax"]["value"] < 1e-5
        assert 0 < summary[f"{task}.fraction_of_peak"]["value"] < 1
    assert summary["composition.memory_mib.circuits_jax"]["value"] > 0
    assert set(json.loads((folder / "measurements.json").read_text())["tasks"]) == TASKS


def test_a_tiny_shape_meets_no_aim(smoke):
    assert all(figure["aim"] is None and figure["met"] is None for figure in smoke[2].values())


def test_same_numbers_as_numpy(smoke):
    assert_same_numbers(smoke[2], "numpy", TASKS)


def test_same_numbers_as_jax_eigenvalues(smoke):
    assert_same_numbers(smoke[2], "jnp.linalg.eigvals", {"eigenvalue_solver"})


def test_same_numbers_as_torch(smoke):
    pytest.importorskip("torch")
    assert_same_numbers(smoke[2], "torch", TASKS)


def test_same_numbers_as_transformer_lens(smoke):
    pytest.importorskip("transformer_lens", minversion="4.3")
    assert_same_numbers(smoke[2], "transformer_lens", TASKS - {"eigenvalue_solver"})


def test_what_is_not_installed_is_left_out_in_a_line(smoke):
    done, _, summary = smoke
    for contender in ("torch", "transformer_lens"):
        assert (f"ov_svd.seconds.{contender}" in summary) != (f"{contender} is left out" in done.stdout)


def test_llama_in_miniature(tmp_path):
    done = run("--llama", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "algebra_benchmark_llama_smoke" / "summary.json").read_text())
    assert summary["all_finite"]["met"]
    assert summary["peak_gb"]["aim"] == "<= 12"
    assert summary["composition_seconds"]["value"] > 0


def test_bad_settings_are_one_line(tmp_path):
    done = run("--token-space-heads", "3", "--name", "a/b", "--runs-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --name must be a plain folder name")
