"""What `vramplan.train.fast` does, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

# Families whose layer returns its residual plus its MLP's result: a recomputation need not know the latter.
SKIPS_LAST = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "granite", "ministral", "seed_oss")

# A huge weight is dequantised in pieces of at most this size, so that it never stands in bf16 as a whole.
SLICE_BYTES = 128 * 2**20
_ROWS = 64  # slices begin at multiples of it, so that every block of 64 weights lies in one


def slices(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows in which a weight [outputs, inputs] is dequantised to bf16."""
    most = max(_ROWS, SLICE_BYTES // (2 * inputs) // _ROWS * _ROWS)
    pieces = -(-outputs // most)
    rows = -(-outputs // pieces // _ROWS) * _ROWS
    for start in range(0, outputs, rows):
        yield start, min(start + rows, outputs)
