"""Every tolerance of the backends' tests, with its reason.

float32 has eps = 1.2e-7. Beside each number stands what was observed with it (largest over all families, torch and
where it was there JAX), so that a looser result is noticed before it fails. Each is used in a test whose twin, a
deliberate mistake, must exceed it.
"""

# Logits against transformers, largest absolute difference. Logits reach 10 to 20, so one rounding of the last
# product alone is 1e-6; another order of summation in two blocks and a head adds a few of those. Transformers' own
# two attention kernels differ by 4e-6 here. Observed: torch 0 (the same kernels), JAX see docs/numerics.md.
LOGITS = 2e-5

# A row in a batch against the same row alone, relative to the largest logit. Only the sizes of the matrix products
# differ, so only their blocking. Observed: 0 to 3e-7.
PACKING = 1e-6

# A sum of cross-entropies, relative. Each term carries the logits' error; in a sum of some thirty terms of both
# signs it grows slower than the sum. Observed: 1e-7.
LOSS = 2e-6

# Gradients, relative in the Frobenius norm of each tensor. They pass two blocks backward; the smallest tensors are
# differences of larger numbers. Observed: 1.2e-6 against PEFT.
GRADIENT = 1e-5

# One cut of a window into batches against another, relative. The same gradients are summed in another order.
# Observed: 4e-7.
ACCUMULATION = 5e-6

# A step of AdamW against the same formula in float64, relative to the learning rate: four float32 operations on
# moments, each rounded once, and the parameter's own rounding (eps * 0.1 / 1e-2 of the rate). Observed: 4e-6.
ADAMW = 2e-5

# Adapter after several steps against PEFT with torch's AdamW, relative to the total distance moved. Adam divides by
# the gradient's size, so an entry whose gradient is nearly zero magnifies its rounding. Observed: 2e-5.
TRAJECTORY = 1e-3

# W + s * B A in float32 against float64, relative to the largest entry: a sum of rank + 1 terms, rounded each time.
# Observed: 1.1e-7.
MERGE = 1e-6

# bfloat16 keeps 8 bits, eps = 7.8e-3. Mean loss against float32, relative; rounding errors of many layers and
# tokens largely cancel in the mean. Observed: 1e-3.
BFLOAT16_LOSS = 2e-2

# Single logits in bfloat16 against float32, largest absolute difference, at a logit scale of 10 to 20, where one
# rounding is 0.06. Observed: 0.2.
BFLOAT16_LOGITS = 0.6
