"""The torch backend: transformers builds the graph, bitsandbytes stores NF4, the LoRA mathematics is ours.

The core reaches ``offer`` when it plans and ``hooks`` when it runs; everything else hangs below them::

    hooks ─▶ decode, step ─▶ model ─▶ lora, quant, loss, attention, weights ─▶ device, memory
"""
