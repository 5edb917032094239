"""The recipe of the lab base: every number that decides its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 20250
    width: int = 256
    layers: int = 4
    heads: int = 4
    #: 259 ids rounded up to a multiple of 8; the rest is never seen and never predicted.
    vocabulary: int = 264
    embedding_std: float = 0.06
    window_tokens: int = 1024
    #: (share of the steps, tokens per window): attention is learnt sooner, and cheaper, on short windows.
    stages: tuple[tuple[float, int], ...] = ((0.3, 256), (0.4, 512), (0.3, 1024))
    micro_batch_tokens: int = 4096
    micro_batches: int = 2
    steps: int = 2200
    warmup_steps: int = 100
    #: Muon moves the matrices inside the layers, AdamW the embedding and the vectors.
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    #: Share of the peak rate that is left at the last step.
    final_share: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    evaluate_every_steps: int = 200
    evaluate_windows: int = 64

    def rate_share(self, step: int) -> float:
        """Share of the peak learning rate: linear warmup, then a cosine down to the final share."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    def stage_tokens(self, step: int) -> int:
        """Tokens per window at a step."""
        reached = 0.0
        for share, tokens in self.stages:
            reached += share
            if step < reached * self.steps:
                return tokens
        return self.stages[-1][1]
