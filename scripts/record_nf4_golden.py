"""Record what sign-off S2 pins, with the machine and the versions it was recorded on.

    python scripts/record_nf4_golden.py

Refuses a tree with changes: what is pinned must be what a commit computes. Torch and JAX must agree before anything is
written: NF4 to the byte, losses to a hundredth of the tolerance of the test.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
import numpy as np

from mens_core.artifacts.files import write_json
from mens_core.artifacts.manifest import installed_versions, utc_now
from mens_core.machine import this_machine
from mens_core.plugins import load_backend
from mens_core.testing.acceptance.golden import GOLDEN, nf4_hashes, qlora_losses

AGREEMENT = 1e-6


def _git(*words: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603, S607


def main() -> None:
    """Record, or say why not."""
    changed = _git("status", "--porcelain")
    if changed:
        sys.exit(
            f"error: the tree has changes, so nothing is recorded\n{changed}\n  to mend it: git commit, or git stash"
        )
    hashes = {name: nf4_hashes(load_backend(name)) for name in ("torch", "jax")}
    if hashes["torch"] != hashes["jax"]:
        sys.exit("error: torch and JAX store NF4 differently, so nothing is recorded")
    losses = {}
    for name in hashes:
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = qlora_losses(name, Path(folder))
    apart = float(np.abs(np.array(losses["torch"]) / np.array(losses["jax"]) - 1).max())
    if apart > AGREEMENT * 100:
        sys.exit(f"error: the losses of torch and JAX are {apart:.1e} apart, so nothing is recorded")
    recorded = {
        "at": utc_now(),
        "commit": _git("rev-parse", "HEAD"),
        "machine": attrs.asdict(this_machine(), filter=lambda field, _: field.name != "speeds"),
        "versions": installed_versions(),
        "torch_and_jax_apart": apart,
    }
    write_json(GOLDEN, {"recorded": recorded, "nf4": hashes["torch"], "losses": losses["torch"]})
    print(f"recorded {GOLDEN}; torch and JAX are {apart:.1e} apart")


if __name__ == "__main__":
    main()
