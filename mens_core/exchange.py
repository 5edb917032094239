"""What crosses the hooks: plain frozen records, with NumPy arrays where there are numbers.

A backend receives and answers with these and nothing else, so the core never meets a tensor of a library it
does not know. Shape letters used throughout: T tokens of a packed batch, N rows in it, V vocabulary, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat

import attrs

from mens_core.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "IGNORE",
    "Batch",
    "BatchShape",
    "GenerateSettings",
    "NF4Spec",
    "QuantizedWeight",
    "StepMetrics",
    "TrainingState",
]

IGNORE = -100
"""Target of a position that is not supervised, as in torch's cross-entropy."""


@attrs.frozen(kw_only=True)
class BatchShape:
    """The largest batch of a run, so that a compiling backend can choose its shapes once.

    Attributes:
        rows: most rows in one batch.
        tokens: most tokens in one batch.
        longest_row: longest row, in tokens.
        supervised: most supervised tokens in one batch.
        batches: most batches in one accumulation window.
    """

    rows: int
    tokens: int
    longest_row: int
    supervised: int
    batches: int


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Rows packed end to end; attention never crosses from one row into another.

    Attributes:
        input_ids: (T,) int32, the rows' tokens.
        positions: (T,) int32, 0, 1, 2 … restarting with each row.
        targets: (T,) int32, the token that follows in the same row, or ``IGNORE`` where it is not supervised;
            a row's last token never has a target.
        row_lengths: (N,) int32, summing to T.
    """

    input_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    row_lengths: NDArray[np.int32]

    @property
    def supervised_tokens(self) -> int:
        """Positions that have a target."""
        return int((self.targets != IGNORE).sum())


@attrs.frozen(kw_only=True, eq=False)
class StepMetrics:
    """What one optimizer step measured; the two numbers may still live on the device until ``float()`` reads them.

    Attributes:
        loss_sum: sum of the supervised tokens' cross-entropies over the window, in nats.
        grad_norm: global norm of the mean gradient before clipping.
        supervised_tokens: number of supervised tokens in the window.
    """

    loss_sum: SupportsFloat
    grad_norm: SupportsFloat
    supervised_tokens: int


@attrs.frozen(kw_only=True, eq=False)
class TrainingState:
    """Everything that changes during training, under names that every backend shares.

    Attributes:
        adapter: ``<module path>.lora_A.weight`` (R, in) and ``<module path>.lora_B.weight`` (out, R), and of modules
            that are trained whole ``<module path>.weight`` and ``.bias`` as the base has them; float32.
        optimizer: the adapter's names with ``.exp_avg`` and ``.exp_avg_sq`` appended, same shapes, float32;
            empty before the first step.
        step: optimizer steps taken.
    """

    adapter: Mapping[str, NDArray[np.float32]]
    optimizer: Mapping[str, NDArray[np.float32]]
    step: int


@attrs.frozen(kw_only=True)
class GenerateSettings:
    """Greedy decoding: at most ``max_new_tokens`` tokens, ending with the first that is in ``stop_tokens``."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...]


@attrs.frozen(kw_only=True)
class NF4Spec:
    """4-bit NormalFloat storage (Dettmers et al. 2023, section 3), as bitsandbytes stores it.

    Attributes:
        block_size: weights that share one absmax; even. bitsandbytes has the powers of two from 32 to 4096.
        double_quant: whether the absmax values, less their mean, are stored in 8 bits, in blocks of 256.
        codebook: the values of the 16 codes: ``nf4``, or ``fp4``, bitsandbytes' 4-bit floats.

    Raises:
        ContractError: if there is no such codebook, or a block does not hold whole bytes.
    """

    block_size: int = attrs.field(default=64)
    double_quant: bool = True
    codebook: str = attrs.field(default="nf4")

    @block_size.validator
    def _whole_bytes(self, _: object, block_size: int) -> None:
        if block_size <= 0 or block_size % 2:
            raise ContractError(
                f"a block of {block_size} weights in 4 bits holds no whole number of bytes",
                where="block_size",
                expected="an even number, as a rule a power of two from 32 to 4096",
            )

    @codebook.validator
    def _known(self, _: object, codebook: str) -> None:
        if codebook not in {"nf4", "fp4"}:
            raise ContractError(f"there is no codebook {codebook!r}", where="codebook", expected="nf4 or fp4")


@attrs.frozen(kw_only=True, eq=False)
class QuantizedWeight:
    """A weight in NF4, byte for byte as bitsandbytes holds it.

    Attributes:
        codes: (ceil(numel / 2),) uint8; two codes a byte, the earlier one in the high nibble, row-major order.
        absmax: one value per block: float32, or uint8 indices into bitsandbytes' signed dynamic map.
        nested_absmax: (ceil(blocks / 256),) float32 with double quantization, else None.
        offset: the mean subtracted from the absmax values; 0.0 without double quantization.
        shape: of the weight, (out, in).
    """

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32] | NDArray[np.uint8]
    nested_absmax: NDArray[np.float32] | None
    offset: float
    shape: tuple[int, ...]
    spec: NF4Spec
