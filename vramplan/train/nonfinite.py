"""Where a step stopped being finite: which labels, which module, which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vramplan.train.splitting import Inputs
from vramplan.train.store import IGNORED

SHOWN = 3  # names in a message


class Step:
    """The micro-batches of an optimizer step: references, no copies."""

    def __init__(self) -> None:
        self.inputs: list[Inputs] = []
        self.losses: list[Tensor] = []

    def add(self, inputs: Inputs, loss: Tensor) -> None:
        self.inputs.append(inputs)
        self.losses.append(loss)

    def without_labels(self) -> bool:
        """Whether no token of any micro-batch is to be learned."""
        return bool(self.inputs) and not any(bool((i["labels"][:, 1:] != IGNORED).any()) for i in self.inputs)

    def culprit(self) -> Inputs | None:
        """The first micro-batch whose loss is not finite."""
        pairs = zip(self.inputs, self.losses, strict=True)
        return next((inputs for inputs, loss in pairs if not bool(torch.isfinite(loss).all())), None)


def why_not_finite(
    model: nn.Module, step: Step, redo: Callable[[Inputs], Any], gradient: Callable[[Tensor], Tensor | None]
) -> str:
    """The reason as half a sentence, or "" if none can be found. Plays the forward of one micro-batch again."""
    if step.without_labels():
        return "no token is to be learned: all labels are -100"
    if broken := [n for n, p in trained(model) if not _finite(p)]:
        return f"the adapter's own weights are not finite any more ({some_of(broken)}): an earlier update broke them"
    culprit = step.culprit()
    if culprit is None:
        wrong = [n for n, p in trained(model) if (grad := gradient(p)) is not None and not _finite(grad)]
        return f"the loss is finite, the backward is not, at {some_of(wrong)}" if wrong else ""
    try:
        return first_not_finite(model, lambda: redo(culprit)) or "the loss itself: all modules' outputs are finite"
    except Exception:  # out of memory, say: then the reason stays unknown
        return ""


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first module whose output is not finite, in the order of execution; "" if there is none."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and (tensor := next((t for t in _tensors(output) if not _finite(t)), None)) is not None:
            found.append(_told(name, module, tensor))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _told(name: str, module: nn.Module, output: Tensor) -> str:
    what = f"{_short(name) or 'the model'} ({type(module).__name__}) is the first whose output is not finite"
    if broken := [n for n, p in module.named_parameters() if p.is_floating_point() and not _finite(p)]:
        return f"{what}: its own {some_of(broken)} holds NaN or infinity"
    if output.dtype == torch.float16 and bool(torch.isinf(output).any()):
        return f"{what}: float16 overflows beyond 65,504, bfloat16 does not"
    return what


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def some_of(names: list[str]) -> str:
    """The first names, without what PEFT puts before each, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(_short(name) for name in names[:SHOWN]) + more
