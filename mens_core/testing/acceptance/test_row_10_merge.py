"""Row 10 and sign-off S3: both versions of the older adapters merge to the same numbers, others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mens_core.artifacts.tensors import read_tensors
from mens_core.cli import main
from mens_core.testing.acceptance.materials import merge_fixture

FORMATS = {
    2: ("vox_mens_qlora_lora_only_v2", "vox_populi_qlora_lora_only_v2"),
    3: ("vox_mens_adapter", "vox_populi_adapter"),
}
BACKENDS = ("torch", "jax")


def _merge(folder: Path, words: list[str], backend: str = "torch", verb: str = "merge-qlora") -> int:
    return main([verb, *words, "--output", str(folder / "merged.safetensors"), "--backend", backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("spelling", ["", ".weight"])
@pytest.mark.parametrize("house", [0, 1])
def test_merge_qlora_roundtrip_of_both_versions_formats_and_spellings(
    tmp_path: Path, backend: str, version: int, spelling: str, house: int
) -> None:
    weight, words = merge_fixture(tmp_path, version, FORMATS[version][house], spelling)
    assert _merge(tmp_path, words, backend) == 0
    merged = read_tensors(tmp_path / "merged.safetensors")
    assert list(merged) == ["wte.weight"]
    # Each of the twelve numbers grows by (4 / 2) · (1 · 1 + 1 · 1).
    np.testing.assert_allclose(merged["wte.weight"], weight + 4, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (2, {"format": "vox_mens_qlora_lora_only_v1", "version": 1}, "is not known"),
        (3, {"version": 4}, "is not known"),
        (3, {"format": "junk"}, "'junk'"),
        (3, {"base_key_map": {"head": "wte.weight"}}, "no entry for lm_head"),
        (3, {"rank": 3}, "as its description says"),
    ],
)
def test_merge_qlora_refuses_other_versions_and_wrong_descriptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int, changes: dict[str, Any], message: str
) -> None:
    _, words = merge_fixture(tmp_path, version, FORMATS[version][0], changes=changes)
    assert _merge(tmp_path, words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("verb", ["merge-qlora", "merge-weights"])
@pytest.mark.parametrize("name", ["checkpoint.bin", "checkpoint.BIN"])
def test_merge_refuses_a_pickled_checkpoint_with_guidance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    merge_fixture(tmp_path, 2, FORMATS[2][0])
    (tmp_path / name).write_bytes(b"\x80\x04.")
    words = ["--base-shard", str(tmp_path / "base.safetensors"), "--adapter", str(tmp_path / name)]
    assert _merge(tmp_path, words, verb=verb) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("safetensors", "merge-weights", "merge-qlora", "docs/merging.md"))
    assert not (tmp_path / "merged.safetensors").exists()
