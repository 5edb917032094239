"""The JAX backend: a flax.nnx decoder under one scan, NF4 and the LoRA mathematics our own, updates by optax.

``hooks`` is the only module the core reaches; everything else hangs below it, private modules in brackets::

    hooks ─▶ decode, step ─▶ model ─▶ lora, quant, loss, attention, weights ─▶ device
                             (_blocks)         (_packing, _arrays)
"""
