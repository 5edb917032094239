"""A merge holds some blocks of a tensor, whatever the size of the model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mens_core.artifacts.tensors import write_tensors
from mens_core.hf.header import make_header, read_header
from mens_core.hf.keymap import linear_shapes, tensor_shapes
from mens_core.hf.layout import read_layout

CHILD = Path(__file__).with_name("merge_child.py")
MB = 10**6
# 8.4 GB in bfloat16, the widths of an 8 B model; the largest tensor has 262 MB.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
ADAPTED = ["model.layers.7.mlp.gate_proj", "model.layers.7.mlp.down_proj"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of holes in six shards, which takes no room on the disk, and an adapter of one layer."""
    root = tmp_path_factory.mktemp("large")
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    layout = read_layout(base)
    names = list(tensor_shapes(layout))
    weight_map = {}
    for number in range(6):
        shard = names[number * len(names) // 6 : (number + 1) * len(names) // 6]
        write_holes(base / f"model-{number}.safetensors", {name: tensor_shapes(layout)[name] for name in shard})
        weight_map |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_adapter(adapter, linear_shapes(layout))
    return root


def write_holes(path, shapes):
    header = make_header({name: ("BF16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(math.prod(shape) for shape in shapes.values()))


def write_adapter(adapter, linears):
    draw, pairs = np.random.default_rng(0), {}
    for module in ADAPTED:
        out, into = linears[module]
        for half, shape in (("A", (8, into)), ("B", (out, 8))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            pairs[name] = draw.standard_normal(shape, np.float32)
    write_tensors(adapter / "adapter_model.safetensors", pairs, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ADAPTED}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def peaks(folder, *modes):
    """Bytes of each."""
    words = [sys.executable, str(CHILD), str(folder), *modes]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    return [int(line) for line in done.stdout.splitlines()]


def test_a_merge_of_eight_gigabytes_holds_one_tensor_and_some_blocks(folder):
    """Observed 149 MB, with tensors of 117 MB; the twin, which lets pages stay, holds both: 266 MB."""
    tensor = 2 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
    assert sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) > 8000 * MB
    streamed, held = peaks(folder, "plain", "hold")
    merged = [info for path in (folder / "plain").glob("*.safetensors") for info in read_header(path).values()]
    assert sum(info.stop - info.start for info in merged) > 8000 * MB
    assert streamed < tensor + 100 * MB < held
