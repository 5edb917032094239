"""An environment with the core, the example and the broken backends, and nothing else: no framework at all."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def empty_environment(tmp_path_factory):
    """Its Python; each distribution was installed from its own folder."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    sources = [f"{ROOT}[testing]", ROOT / "examples/numpy_backend", ROOT / "tests/data/broken_backend"]
    subprocess.run([*pip, "--no-compile", "-c", ROOT / "constraints.txt", *sources], check=True)
    return python
