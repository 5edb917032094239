"""The parity certificate: what backends answer, held to each other and to the specification in NumPy.

::

    plans ─▶ sessions ─▶ witnesses ──┬─ graph      logits, losses
                            oracle ──┤─ learning   gradients, updates, accumulation, a short run     ─▶ comparisons
                                     └─ storage    NF4, merging        schedules  learning rates          │
                                                                                                          ▼
                                       certificate: each with shape, error, bound, reason, verdict; versions, machine

``kernels`` runs them for one model; everything goes through the typed hooks of ``mens_core.backend``.
"""
