"""vramplan: plan, fit and run QLoRA fine-tuning on the GPU you can afford."""

__version__ = "0.1.0"
