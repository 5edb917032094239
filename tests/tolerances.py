"""Every tolerance of the backends' tests, with its reason.

float32 has eps = 1.2e-7. Beside each number stands what was observed with it (largest over all families, torch and
where it was there JAX), so that a looser result is noticed before it fails. Each is used in a test whose twin, a
deliberate mistake, must exceed it.
"""

# Logits against transformers, largest absolute difference. Logits reach 12 to 19, where one rounding is 1e-6, and
# transformers' own float32 logits are up to 7.1e-6 from its float64 ones; its two attention kernels differ by as
# much. Two results that are each that good may be twice as far apart. Observed: torch 3.8e-6, JAX 8.1e-6.
LOGITS = 2e-5

# A row in a batch against the same row alone, relative to the largest logit. Only the sizes of the matrix products
# differ, so only their blocking. Observed: torch 1.1e-7, JAX 0.
PACKING = 1e-6

# A sum of cross-entropies, relative: the logits' error of 2e-5 on terms of about 10.
# Observed: torch 1.2e-7, JAX 1.6e-7.
LOSS = 2e-6

# Gradients, relative in the Frobenius norm of each tensor. They pass two blocks forward and backward, each product
# a sum of some fifty terms: a few tens of eps. Observed: torch 9.7e-7, JAX 1.7e-6.
GRADIENT = 1e-5

# One cut of a window into batches against another, relative. The same gradients are summed in another order.
# Observed: torch 5.2e-7, JAX 1.8e-7.
ACCUMULATION = 5e-6

# A step of AdamW against the same formula in float64, relative to the learning rate. The parameter itself, up to
# 0.4, is rounded to 3e-8, which is 3e-6 of a rate of 1e-2 and 9e-6 of a third of it; the moments' roundings are
# smaller. Observed: torch 4.5e-6, JAX 1.1e-5.
ADAMW = 2e-5

# Adapter after four steps against PEFT with torch's AdamW, relative to the distance moved. Adam divides by the
# gradient's size, so an entry whose gradient is nearly zero magnifies its rounding. Observed: torch 1.7e-5, JAX
# 4.2e-5.
TRAJECTORY = 2e-4

# GELU's values and slopes in float32 against float64, relative to the result or to one, whichever is larger: the
# rounding of a result, of 6e-8, and of what it is made from. Observed: 1.4e-7 and 2.0e-7; PyTorch's own are 1.4e-7 and
# 1.0e-6.
GELU = 3e-7

# W + s * B A in float32 against float64, relative to the largest entry: a sum of rank + 1 terms, rounded each time.
# Observed: torch 1.6e-7, JAX 1.1e-7.
MERGE = 1e-6

# The mean of positive numbers in float32, summed in another order, relative: a few eps. Observed: JAX 3e-7.
MEAN = 1e-6

# bfloat16 keeps 8 bits, eps = 7.8e-3. Loss against float32, relative; the roundings of many layers and tokens largely
# cancel in the sum. Observed: torch 5.4e-4, JAX 1.3e-3.
BFLOAT16_LOSS = 2e-2

# Single logits in bfloat16 against float32, largest absolute difference, at a logit scale of 12 to 19, where one
# rounding is 0.06. Observed: torch 0.19, JAX 0.24.
BFLOAT16_LOGITS = 0.6

# Gradients of what is trained whole in bfloat16 against float32, relative in the Frobenius norm of each tensor: some
# thirty roundings of 2^-9 on the way there and back. Observed: torch 2.3e-2, JAX 2.4e-2.
BFLOAT16_GRADIENT = 6e-2

# Logits against PEFT's with an adapter of random numbers as large as the weights, relative to the largest logit: some
# tens of eps. Observed: torch 2.8e-7, JAX 1.0e-6.
PEFTS_LOGITS = 1e-5

# The specification in NumPy against transformers in float64, largest absolute difference of logits up to 20: both
# are exact to 16 digits. Observed: 1.1e-14 (GPT-2).
ORACLE = 1e-12

# The same with rotary positions, whose angles transformers computes in float32 whatever the model's format: up to 11
# radians, rounded to 5e-7, in four products. Observed: 2.7e-6.
ORACLE_ROTARY = 2e-5

# A run of a hundred steps: each step's loss on one side against the other, relative, and the distance of the two
# adapters at the end, relative to the way they went. The gradient's error of 1e-5 is made anew in every step and falls
# either way. Observed: losses 2.7e-6 (mean 6.9e-7), adapters 1.6e-6; against PEFT over fifty steps 1.1e-6 and 1.3e-6.
CURVE = 2e-5

# A run of ten steps that goes on on the other backend after its fourth, against the undisturbed one: each step's loss,
# in nats a token. What was asked for; observed: 3.5e-7, with qlora 1.2e-6.
ELSEWHERE = 1e-4

# The norm of s·B·A, or of the difference of two, from the triangles of QR in float64, against the formed matrices,
# relative to the norms together: products and reflections of at most some tens of terms, each rounded to 1.1e-16.
# Observed: 1.7e-15 in 20,000 draws.
NORM = 1e-13

# A checkpoint in NF4 in transformers against the same weights in dense float32 layers: largest difference of logits, of
# the largest logit. On CPUs with AVX-512 BF16 bitsandbytes multiplies in bfloat16 (2⁻⁸), fourteen layers one after the
# other. Observed 8.3e-3 (gpt2) and 1.6e-2 (qwen3); weights that were never stored in NF4 are 0.32 and 0.72 away.
NF4_PRODUCT = 4e-2
