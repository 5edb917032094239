"""LoRA in plain NumPy: a complete backend of mens-core, small enough to be read in one sitting.

offer     what it can do, answered before anything is loaded
weights   safetensors → arrays, every tensor accounted for
layers    the mathematics: each layer forward, and backward by hand
decoder   GPT-2, Llama, Qwen2 and Qwen3 out of those layers
session   loss, step, AdamW, state
hooks     what the core calls
"""
