"""The package as a whole: what an import costs, and that the README tells the truth."""

import re
import subprocess
import sys
from pathlib import Path

import circuits_jax as cj

ROOT = Path(__file__).parent.parent


def test_import_pulls_in_nothing_but_the_bare_accelerator_packages():
    code = "import sys, circuits_jax; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"plotly", "xarray", "zarr", "tyro", "pandas"} & set(loaded.stdout.split())


def test_all_names_exist():
    assert sorted(cj.__all__) == sorted(set(cj.__all__))
    assert all(hasattr(cj, name) for name in cj.__all__)


def test_the_example_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (8, 24, 32)


def test_the_file_map_of_the_readme_is_true():
    house = (ROOT / "README.md").read_text().split("## The house")[1]
    named = set(re.findall(r"^  (\w+/\w+\.py)", house, re.MULTILINE))
    package = ROOT / "circuits_jax"
    there = {str(p.relative_to(package)) for p in package.glob("*/*.py") if p.name != "__init__.py"}
    assert named == there
