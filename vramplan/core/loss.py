"""How the fused linear cross entropy cuts its tokens. The trainer and the planner both ask here, so they agree."""

from __future__ import annotations


LEAST_ROWS = 128  # below this a matrix product of the head is starved ...
LEAST_ROWS_BYTES = 64 * 2**20  # ... unless that many float32 logits are more than this


def chunk_tokens(tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens whose logits exist at one time: as many as make them about as large as the hidden states of the batch.

    The rule of liger-kernel's `fused_linear_cross_entropy_forward` (Hsu et al. 2024, arXiv:2410.10989): the batch is
    cut into ceil(V / H) pieces, rounded up to a power of two tokens. Ours never cuts below LEAST_ROWS.
    """
    pieces = -(-vocab_size // hidden_size)
    wanted = 1 << (-(-tokens // pieces) - 1).bit_length()
    least = min(LEAST_ROWS, max(1, LEAST_ROWS_BYTES // (4 * vocab_size)))
    return max(1, min(tokens, max(wanted, least)))
