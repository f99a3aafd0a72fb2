"""How the fused linear cross entropy cuts its tokens. The trainer and the planner both ask here, so they agree."""

from __future__ import annotations

LEAST_BYTES = 64 * 2**20  # of a chunk's bf16 logits, where that is less than the rest of a fused step needs anyway


def chunk_tokens(tokens: int, hidden_size: int, vocab_size: int, fused: bool = False) -> int:
    """Tokens whose logits exist at one time: as many as make them about as large as the hidden states of the batch.

    The rule of liger-kernel's `fused_linear_cross_entropy_forward` (Hsu et al. 2024, arXiv:2410.10989): the batch is
    cut into ceil(V / H) pieces, rounded up to a power of two tokens, so that small chunks do not starve the matrix
    product. With `fused` layers a chunk has at least the power of two that makes `LEAST_BYTES` of logits.
    """
    pieces = -(-vocab_size // hidden_size)
    wanted = -(-tokens // pieces)
    if fused:
        wanted = max(wanted, 1 << max(LEAST_BYTES // (2 * vocab_size), 1).bit_length() - 1)
    return max(1, min(tokens, 1 << (wanted - 1).bit_length()))
