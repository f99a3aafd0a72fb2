"""The rules of an audit that the model alone decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .architecture import is_expert, layer_linears, layer_vectors
from .audit_subject import Subject
from .resident import constants_bytes, packed_bytes, weights
from .types import ConfigFinding
from .units import human

NOTABLE_SHARE = 0.1  # of the loaded weights: below, the vocabulary is not worth a line


def experts(subject: Subject) -> Iterator[ConfigFinding]:
    """bitsandbytes quantises modules of the class nn.Linear; experts are 3-D parameters."""
    model = subject.model
    if model is None or not model.num_experts:
        return
    sizes = [n for name, n in layer_vectors(model) if is_expert(name)] * model.num_layers
    yield ConfigFinding(
        cause=9, key="experts", bytes=_saved_by_4bit(sizes), fix="a model without experts, or room for them",
        message=f"the experts are not quantised: {human(2 * sum(sizes))} stay bf16",
    )  # fmt: skip


def subclasses(subject: Subject) -> Iterator[ConfigFinding]:
    """Linears of a class of the model's own, as Falcon has them, are passed over."""
    model = subject.model
    plain = [x.in_features * x.out_features for x in layer_linears(model) if not x.quantised] if model else []
    if model is not None and plain:
        sizes = plain * model.num_layers
        yield ConfigFinding(
            cause=None, key="not_quantised", bytes=_saved_by_4bit(sizes), fix="another model, or room for them",
            message=f"the Linears of {model.model_type} are of a class that is not quantised: "
            f"{human(2 * sum(sizes))} stay bf16",
        )  # fmt: skip


def vocabulary(subject: Subject) -> Iterator[ConfigFinding]:
    """Of a model by itself: the matrices that no 4-bit load makes smaller, where they are a notable part."""
    model = subject.model
    if model is None or subject.config.tool != "model":
        return
    loaded = weights(model, True)
    size = loaded.embeddings_bytes + loaded.lm_head_bytes
    if size < NOTABLE_SHARE * loaded.total_bytes:
        return
    table = f"{model.vocab_size:,} x {model.hidden_size:,}"
    if model.tie_word_embeddings:
        text = f"embedding and head are one tensor of {table}, which stays bf16; to train one is to train both"
    else:
        text = f"embedding and head are two tensors of {table}, which stay bf16"
    yield ConfigFinding(
        cause=None, key="tied_head" if model.tie_word_embeddings else "vocabulary", bytes=None,
        message=f"{text}: {human(size)}, {size / loaded.total_bytes:.0%} of the loaded weights",
        fix="keep them frozen and in bf16",
    )  # fmt: skip


def _saved_by_4bit(sizes: list[int]) -> int:
    return sum(2 * n - packed_bytes(n) - constants_bytes(n, True) for n in sizes)


MODEL_RULES: tuple[Callable[[Subject], Iterator[ConfigFinding]], ...] = (experts, subclasses, vocabulary)
