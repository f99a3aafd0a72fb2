"""Which 4-bit product bitsandbytes runs in the forward: its fused kernel, or dequantise and `F.linear`.

A restatement, for bf16 and at least 8 tokens, of `_gemm_4bit_use_custom_cuda` (bitsandbytes 0.50.2,
backends/cuda/ops.py, MIT licence). It matters because dequantising needs a whole bf16 weight for a moment. Below 8
tokens the fused kernel is assumed; the backward always dequantises.

Letters as there: M tokens, N out_features, K in_features; a wave is one block of 64 outputs per multiprocessor.
"""

from __future__ import annotations

MAX_TOKENS, BLOCK = 1536, 64
SMALL_WEIGHT = 4 * 1024 * 1024
DEFAULT_SMS = 128  # an RTX 4090


def uses_fused_kernel(m: int, n: int, k: int, capability: tuple[int, int], sms: int | None) -> bool:
    """True if a forward with `m` tokens through a Linear [n, k] allocates nothing but its output."""
    if m > MAX_TOKENS or k % BLOCK:
        return False
    if m < 8:
        return True
    major = capability[0]
    if major < 8 or major == 11 or capability == (8, 7):  # no bf16 kernel, or never calibrated
        return False
    sms = sms or DEFAULT_SMS
    blocks = -(-n // 64)
    if major == 10:
        return m <= _sm100(n, k, blocks, sms)
    if n * k < SMALL_WEIGHT:
        return m <= _small_weight(n, k, blocks, sms, capability)
    if m > 512:
        return False
    ladder = {(8, 0): _sm80, (8, 6): _sm86, (12, 0): _sm120}.get(capability, _sm90 if major == 9 else _sm89)
    if capability == (12, 1) and blocks >= sms:
        return m <= 256
    return m <= ladder(n, k, blocks, sms)


def _small_weight(n: int, k: int, blocks: int, sms: int, capability: tuple[int, int]) -> int:
    sm80, hbm = capability == (8, 0), capability == (8, 0) or capability[0] == 9
    if 2 * k < n:  # short K
        if hbm:
            low_wave = 3 * blocks < sms
            return (1536 if low_wave else 512) if sm80 else (512 if low_wave else 320)
        return 192 if blocks < sms and blocks * k > 320 * sms else 320
    quarter_wave = 4 * blocks <= sms
    if sm80 and quarter_wave:
        return (32 if 8 * blocks <= sms else 128) if k >= n else 384
    if quarter_wave:
        return 32 if k < n or hbm else 23
    return 16 if 2 * blocks <= sms else 0


def _sm80(n: int, k: int, blocks: int, sms: int) -> int:
    if blocks >= 3 * sms:
        return 128
    if blocks >= sms:
        return 64 if k < n else 32
    if (k >= 3 * n and 4 * blocks > sms) or (k == n and blocks >= 48 and 5 * blocks < 3 * sms):
        return 0
    if 2 * blocks < sms:
        if k <= n:
            return 128
        if 3 * blocks >= sms:
            return 0
    return 128 if blocks >= sms // 2 and k < n else 16


def _sm86(n: int, k: int, blocks: int, sms: int) -> int:
    return 128 if blocks >= sms else 64 if blocks >= sms // 2 else 16


def _sm90(n: int, k: int, blocks: int, sms: int) -> int:
    for waves, most in ((3, 64), (2, 48), (1, 32)):
        if blocks >= waves * sms:
            return most
    return 16 if blocks >= sms // 2 and not (k >= n and 4 * blocks < 3 * sms) else 0


def _sm100(n: int, k: int, blocks: int, sms: int) -> int:
    if blocks >= 3 * sms:
        return 32
    return 8 if blocks >= sms and k < n else 0


def _sm120(n: int, k: int, blocks: int, sms: int) -> int:
    for waves, most in ((3, 256), (2, 128)):
        if blocks >= waves * sms:
            return most
    if 5 * blocks >= 4 * sms:
        return 96 if k >= n else 64
    if blocks >= sms // 2:
        return 64 if 2 * k >= n and blocks >= 128 else 8
    return 16 if k > 2 * n and blocks > 64 else 8


def _sm89(n: int, k: int, blocks: int, sms: int) -> int:
    tall = k > 2 * n
    for waves, most in ((3, 256), (2, 128)):
        if blocks >= waves * sms:
            return most
    if 5 * blocks >= 4 * sms:
        if tall or blocks >= 200:
            return 128
        return (128 if sms >= 60 else 32) if k >= n else 64
    if blocks >= sms // 2:
        return 64 if tall else 8 if blocks >= 64 else 32
    if k > n and blocks <= 48:
        return 12 if k >= 3 * n else 10
    return 16 if tall or blocks < 48 else 8
