"""Model folders for the planner: small ones whose numbers are noise, and large ones that take no room on disk."""

import json
import math
import os

import numpy as np

from mens_core.artifacts.tensors import write_tensors
from mens_core.hf.header import WIDTHS, make_header
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import read_layout


def qwen2_folder(folder, *, hidden, heads, layers, vocab, keep=None):
    """Write a Qwen2 folder with the lab's tokenizer out of reach of its vocabulary.

    Args:
        folder: made here.
        hidden: width.
        heads: query heads.
        layers: blocks.
        vocab: rows of the embedding.
        keep: which tensors to write, by name; None for all.
    """
    folder.mkdir()
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(read_layout(folder))
    draw = np.random.default_rng(0).standard_normal
    tensors = {name: draw(shape, np.float32) for name, shape in shapes.items() if keep is None or name in keep}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    word_level(folder / "tokenizer.json", vocab)
    return folder


def word_level(path, vocab):
    """Write a tokenizer of a few words, the last of which ends a turn; every other text is its first token."""
    end = {"id": vocab - 1, "content": "<|im_end|>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    words = {f"w{number}": number for number in range(vocab - 1)} | {end["content"]: end["id"]}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    content = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    path.write_text(json.dumps(content))


def rows_folder(folder, count=6):
    """Write a few rows."""
    folder.mkdir()
    line = json.dumps({"prompt": "w1 w2 w3", "response": "w2 w1 w3 w4", "rating": 4, "category": "code"}) + "\n"
    (folder / "train.jsonl").write_text(line * count)
    return folder


INDEX = "model.safetensors.index.json"
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


def write_file(path, specs):
    """A safetensors file of these specs whose weights take no room on disk."""
    header = make_header(specs, {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(math.prod(shape) * WIDTHS[code] for code, shape in specs.values()))
    return path


def write_index(folder, weight_map):
    """An index that says which file holds which tensor."""
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def write_shards(folder, specs, count):
    """The tensors over so many sparse shards, with their index."""
    names, weight_map = list(specs), {}
    for n in range(count):
        file = f"model-{n + 1:05}-of-{count:05}.safetensors"
        held = names[n::count]
        write_file(folder / file, {name: specs[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    return write_index(folder, weight_map)
