"""The torch backend: transformers builds the graph, bitsandbytes stores NF4, the LoRA mathematics is ours.

``hooks`` is the only module the core reaches; everything else hangs below it::

    hooks ─▶ decode, step ─▶ model ─▶ lora, quant, loss, attention, weights ─▶ device
"""
