"""An optimizer step that either happens or does not: no parameter is updated twice, none is left behind.

bitsandbytes' optimizers (8-bit, 32-bit, paged, lion), torch's fused AdamW and plain SGD allocate nothing once their
state exists: they write into parameters and state. The rehearsal makes the state, so for them there is nothing to
guard afterwards. The others, and the first step of a run without a rehearsal, go from a copy of parameters and state
in host memory: on lack of memory that is put back and the step taken again, first whole, then one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from vramplan.errors import OutOfMemory
from vramplan.train.gradients import host_like
from vramplan.train.guard import Guard
from vramplan.train.pressure import let_go

Step = Callable[..., Any]


def guard_steps(optimizer: Any, guard: Guard | None, step_now: Callable[[], int]) -> SafeStep:
    """Make `optimizer.step()` safe. step_now: the number of the optimizer step in progress, from 1.

    Without a guard a step can still be left out, but lack of memory is not survived.
    """
    safe: SafeStep | None = getattr(optimizer.step, "safe", None)
    if safe is None:
        safe = SafeStep(optimizer, guard, step_now)

        def step(_: Any, closure: Any = None, safe: SafeStep = safe) -> Any:
            return safe(closure)

        step.safe = safe  # type: ignore[attr-defined]
        optimizer.step = MethodType(step, optimizer)  # a method: schedulers wrap it again
    return safe


class SafeStep:
    """What stands in for an optimizer's `step`."""

    def __init__(self, optimizer: Any, guard: Guard | None, step_now: Callable[[], int]) -> None:
        self.optimizer, self.guard, self.step_now = optimizer, guard, step_now
        self.stock: Step = optimizer.step
        self.drop_next = False  # leave the next step out: its gradients are not finite

    def __call__(self, closure: Any = None) -> Any:
        if self.drop_next:
            self.drop_next = False
            return None
        if self.guard is None or (allocates_nothing(self.optimizer) and has_state(self.optimizer)):
            return self.stock(closure)
        before = Snapshot(self.optimizer)
        for step, measure in ((self.stock, "retry"), (self.stock, "one_by_one"), (self._one_by_one, "")):
            try:
                return step(closure)
            except Exception as error:
                failure = self.guard.card.failure(error, "optimizer")
                if failure is None:
                    raise
                if not measure:
                    before.restore()
                    raise OutOfMemory(
                        f"the optimizer's step {self.step_now()} does not fit, not even one parameter at a time: "
                        f"{failure.message}",
                        "an 8-bit or paged optimizer needs less: --optim paged_adamw_8bit",
                    ) from error
                if measure == "retry":
                    self.guard.tell_retry(failure, self.step_now())
                else:
                    self.guard.tell(failure, self.step_now(), measure)
                let_go(error)
            before.restore()
            self.guard.card.free()
        raise AssertionError("unreachable")

    def _one_by_one(self, closure: Any) -> Any:
        """One parameter's step at a time, the others' gradients set aside."""
        gradients = [(p, p.grad) for p in parameters_of(self.optimizer) if p.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            for parameter, gradient in gradients:
                parameter.grad = gradient
                self.stock(closure)
                parameter.grad = None
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return None


def parameters_of(optimizer: Any) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def has_state(optimizer: Any) -> bool:
    """Whether every parameter that has a gradient has its state."""
    stateless = isinstance(optimizer, torch.optim.SGD)
    return stateless or all(optimizer.state.get(p) for p in parameters_of(optimizer) if p.grad is not None)


def allocates_nothing(optimizer: Any) -> bool:
    """Whether a step of this optimizer allocates nothing once its state exists. `steps_in_place` on one says so too."""
    if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit) or getattr(optimizer, "steps_in_place", False):
        return True
    groups = optimizer.param_groups
    if isinstance(optimizer, torch.optim.SGD):  # with weight decay or momentum it makes temporaries
        return not any(group["weight_decay"] or group["momentum"] for group in groups)
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in groups)


class Snapshot:
    """Parameters and optimizer state as they are now, copied to host memory.

    others: parameters that change with the optimizer's without being its own, such as copies in another dtype.
    """

    def __init__(self, optimizer: Any, others: Iterable[Tensor] = ()) -> None:
        _wait()
        self.optimizer = optimizer
        parameters = {id(p): p for p in (*parameters_of(optimizer), *others)}
        self.values = [(p, _copy(p.detach())) for p in parameters.values()]
        self.state = {p: {name: _copied(v) for name, v in now.items()} for p, now in optimizer.state.items()}

    def restore(self, *, keep_new_state: bool = False) -> None:
        """Put them back in place. State that did not exist then is dropped, or with `keep_new_state` kept as made."""
        _wait()
        with torch.no_grad():
            for parameter, value in self.values:
                parameter.copy_(value)
            for parameter in list(self.optimizer.state):
                now, old = self.optimizer.state[parameter], self.state.get(parameter)
                if old is not None:
                    _put_back(now, old)
                elif keep_new_state:
                    _reset(now)
                else:
                    del self.optimizer.state[parameter]


def _put_back(now: dict[str, Any], old: dict[str, Any]) -> None:
    for name in set(now) - set(old):
        del now[name]
    for name, value in old.items():
        if isinstance(value, Tensor) and isinstance(now.get(name), Tensor):
            now[name].copy_(value)
        else:
            now[name] = value


def _reset(state: dict[str, Any]) -> None:
    """The state as an optimizer makes it: all zeros, but for the code tables of 8-bit states."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            if not name.startswith("qmap"):
                value.zero_()
        elif isinstance(value, (int, float)):
            state[name] = 0


def _copied(value: Any) -> Any:
    return _copy(value) if isinstance(value, Tensor) else value


def _copy(tensor: Tensor) -> Tensor:
    copy = host_like(tensor)
    copy.copy_(tensor)
    return copy


def _wait() -> None:
    """Managed memory of paged states must not be touched from here while a kernel may."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
