"""How far a float32 backend may be from the float64 specification, on the tiny models of ``mens_core.testing.tiny``.

float32 has eps = 1.2e-7. Beside each number stands the largest value that was observed, over all families, of NumPy,
torch and JAX. Each is used in a test that a deliberately broken backend fails.
"""

# Logits, largest absolute difference, at logits of 10 to 20 where one rounding is 1e-6.
# Observed: NumPy 7.7e-6, torch 7.4e-6, JAX 7.0e-6.
LOGITS = 2e-5

# A row in a batch against the same row alone, relative to the largest logit: only the blocking of products differs.
# Observed: NumPy 2.1e-7, torch 1.7e-7, JAX 0.
PACKING = 1e-6

# A sum of cross-entropies, relative: the logits' error on terms of about 10. Observed: 2.9e-8, 4.9e-9, 1.1e-7.
LOSS = 2e-6

# A gradient's product with a direction, relative to the product of their norms, a tensor at a time; and norm and loss
# that a step tells, relative: a few tens of eps. Observed: 3.8e-7, 3.2e-7, 3.6e-7.
GRADIENT = 4e-6

# One cut of a window into batches against another, relative: the same gradients summed in another order.
# Observed: 3.4e-7, 2.7e-7, 1.3e-7.
ACCUMULATION = 5e-6

# A step of AdamW from the backend's own moments, relative to the learning rate: the parameter itself, up to 0.4, is
# rounded to 3e-8, which is 9e-6 of the smaller rate. Observed: 8.6e-6, 8.8e-6, 4.5e-6.
ADAMW = 2e-5

# A moment against AdamW's from the gradient that was read out of the other moments, relative; and, of the largest
# entry, absolute, for entries near zero are differences of larger ones.
MOMENT, MOMENT_NEAR_ZERO = 1e-4, 1e-6

# W + s · B A, relative to the largest entry: a sum of rank + 1 terms. Observed: 5.1e-8 on all.
MERGE = 1e-6

# A value out of NF4, and the mean of the scales, relative: a few eps. Observed: 0 on torch and JAX.
NF4 = 1e-6

# bfloat16 keeps 8 bits, eps = 7.8e-3: largest difference of logits, at a scale where one rounding is 0.06.
# Observed: torch 0.11, JAX 0.09.
BFLOAT16_LOGITS = 0.6
