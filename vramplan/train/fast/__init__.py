"""The fused layer: what a decoder layer with LoRA computes, with fewer tensors, fewer launches and less arithmetic.

The modelling code of transformers stays what runs. Its pieces are replaced one by one (`install.py`), by their meaning:

| piece | here | what is saved |
|---|---|---|
| RMSNorm | `norm.py` | its input and 1/rms; a product that follows recomputes the normed input instead of keeping it |
| rotary embedding | `rotary.py` | nothing |
| 4-bit Linears with LoRA that share an input | `linear.py` | the input (or what its norm saved), x A^T |
| gated MLP | `mlp.py` | the input, gate and up |
| checkpoint of a layer | `checkpoint.py` | the layer's input, on the card or in pinned host memory |

LoRA's parameters of a layer lie in one flat tensor (`flat.py`) that the optimizer steps; PEFT's own parameters are
views of it, so what is saved is a plain PEFT adapter. `kernels.py` holds the elementwise kernels: Triton's on a card,
plain torch elsewhere, which is also what the tests hold them against.

How each piece allocates is played by `core/fused.py`, line by line. Keep the two together.
"""
