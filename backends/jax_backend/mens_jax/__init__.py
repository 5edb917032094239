"""The JAX backend: a flax.nnx decoder under one scan, NF4 and the LoRA mathematics our own, updates by optax.

The core reaches ``offer`` when it plans and ``hooks`` when it runs; all else hangs below them, private modules in
brackets::

    hooks ─▶ decode, step ─▶ model ─▶ lora, quant, loss, attention, weights ─▶ device, memory
                             (_blocks)         (_packing, _sizes, _arrays)
"""
