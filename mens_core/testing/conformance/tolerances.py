"""How far a float32 backend may be from the float64 specification, on the tiny models of ``mens_core.testing.tiny``.

float32 has eps = 1.2e-7. Beside each number stands the largest value that was observed, over all families.
"""

# Logits, largest absolute difference, at logits of 10 to 20 where one rounding is 1e-6.
LOGITS = 2e-5

# A row in a batch against the same row alone, relative to the largest logit: only the blocking of products differs.
PACKING = 1e-6

# A sum of cross-entropies, relative: the logits' error on terms of about 10.
LOSS = 2e-6

# A gradient's product with a direction, relative to the product of their norms; a tensor at a time.
GRADIENT = 1e-5

# One cut of a window into batches against another, relative: the same gradients summed in another order.
ACCUMULATION = 5e-6

# A step of AdamW, relative to the learning rate, from the backend's own moments.
ADAMW = 2e-5

# A + s · B A, relative to the largest entry: a sum of rank + 1 terms.
MERGE = 1e-6

# The mean of positive numbers in float32, relative.
MEAN = 1e-6

# bfloat16 keeps 8 bits, eps = 7.8e-3: largest difference of logits, at a scale where one rounding is 0.06.
BFLOAT16_LOGITS = 0.6
