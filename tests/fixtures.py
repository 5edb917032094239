"""Model folders of a few hundred bytes, for the planner: the names and shapes are right, the numbers are noise."""

import json
import shutil

import numpy as np

from mens_core.artifacts.tensors import write_tensors
from mens_core.hf.hub import find_model
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
    """Write a tokenizer of a few words, every other text is its first token."""
    words = {f"w{number}": number for number in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}))


def rows_folder(folder, count=6):
    """Write a few rows."""
    folder.mkdir()
    line = json.dumps({"prompt": "w1 w2 w3", "response": "w2 w1 w3 w4", "rating": 4, "category": "code"}) + "\n"
    (folder / "train.jsonl").write_text(line * count)
    return folder


def lab_folder(folder):
    """Copy the lab base to a folder of its own."""
    shutil.copytree(find_model(None, None)[1], folder)
    return folder
