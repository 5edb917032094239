"""A kernel's speed is measured by real steps through the hooks and found again by the planner's reader."""

import attrs

from mens_core import measuring
from mens_core.costs import COSTS
from mens_core.machine import this_machine
from mens_core.speeds import read_speeds


def test_a_measured_speed_is_kept_under_its_kernel_device_and_format(backend, tmp_path, monkeypatch):
    size = measuring.Size(width=32, layers=1, heads=2, kv_heads=1, head_dim=16, inner=32, positions=64)
    probe = attrs.evolve(
        measuring._PROBES[0], arch="qwen2", size=size, vocab_size=300, length=16, supervised=8, batches=(1, 2)
    )
    monkeypatch.setattr(measuring, "_PROBES", (probe,))
    file = tmp_path / "speeds.json"
    speed = measuring.measure_speed(f"{backend.name}_lora", device="cpu", file=file)
    assert set(speed.seconds) == set(COSTS)
    assert all(value >= 0 for value in speed.seconds.values())
    assert max(speed.seconds.values()) > 0
    assert "measured here" in speed.source
    assert read_speeds(this_machine(), file) == {f"{backend.name}_lora cpu float32": speed}
