"""Sees every storage that the real libraries make, and when it dies.

The libraries run under `FakeTensorMode`: shapes without data, on a CPU that stands in for the card. A
`TorchDispatchMode` is called for every operation, a weak reference tells when a storage is gone. What a CUDA build
would do otherwise than a CPU one is in `rules` and `attention`.

The record is a `core.tape.Recorder`, so that a traced step is unrolled and replayed by the same code as a played one.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vramplan.core.tape import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLASLT_WORKSPACE_BYTES,
    DEFAULT_CUBLAS_WORKSPACE_BYTES,
    GRANULE,
    Recorder,
)
from vramplan.core.types import GpuProfile, Unplannable
from vramplan.trace import known

WORKSPACE_KEY = "workspace.libraries"  # not tape's key: here they are born in the step that needs them first
OUTSIDE = -1

# Between an operation and this handler: our own functions, and torch's wrappers.
_DISPATCH = ("trace/recorder.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/utils/_python_dispatch.py")

Rule = Callable[["Tracker", Any, Sequence[Any], dict[str, Any]], Any]


class UnknownOperation(Unplannable):
    """The model runs an operation whose memory on CUDA has not been looked at."""


class Tracker(TorchDispatchMode):  # type: ignore[misc]
    """Writes births and deaths into `rec`; `rules` say what CUDA does otherwise, by operation.

    `phase` is what the user knows (load, forward, ...), `layer` the decoder layer at work. A storage belongs to the
    layer in whose section it was born (`home`).
    """

    def __init__(self, gpu: GpuProfile, rules: dict[Any, Rule]) -> None:
        super().__init__()
        self.gpu = gpu
        self.rules = rules
        self.rec = Recorder()
        self.phase, self.layer = "load", OUTSIDE
        self._phase_at = 0
        self.home: dict[int, int] = {}
        self.modules: list[str] = []  # names of the modules being called, innermost last
        self.recomputing = False
        self.in_backward = False
        self.hosted = 0  # above 0: what is made lives in host or managed memory
        self.kernels: dict[str, int] = {}  # attention kernels taken, and how often
        self.adapter: list[tuple[int, int]] = []  # (layer, elements) of every trainable weight
        self.plain: list[tuple[int, int]] = []  # (layer, bytes) of the matrices in layers that stay unquantised
        self._ids: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._workspaces: set[tuple[str, bool]] = set()
        self._sole: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------------------------- sections
    def begin(self, phase: str) -> None:
        """A new phase, outside the layers."""
        self.phase, self.layer = phase, OUTSIDE
        self._phase_at = len(self.rec.events)
        self.rec.mark(f"{phase} outside")

    def at(self, layer: int, section: str = "outside") -> None:
        """What follows belongs to this decoder layer."""
        if layer == self.layer:
            return
        back = layer > self.layer if self.in_backward else layer < self.layer
        if back and OUTSIDE not in (layer, self.layer):  # another round through the layers
            self.rec.mark(f"{self.phase} outside")
        self.layer = layer
        self.rec.mark(f"{self.phase} {section if layer == OUTSIDE else layer}")

    # --------------------------------------------------------------------------------------------- births, deaths
    def birth(self, size: int, name: str, key: str = "", shape: tuple[int, int] = (1, 1), dtype: str = "uint8") -> int:
        """A tensor of `size` bytes; returns its number."""
        rounded = -(-size // GRANULE) * GRANULE or GRANULE
        self.rec.info.append((key or self.rec.scope, name, *shape, dtype, rounded))
        ident = len(self.rec.info) - 1
        self.rec.events.append(ident)
        self.home[ident] = self.layer
        return ident

    def death(self, ident: int) -> None:
        self.rec.events.append(-ident)

    def track(self, tensor: Tensor, op: str) -> None:
        """Note a storage that has not been seen before."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at in self._refs:
            return
        if self.hosted or not storage.nbytes():  # nothing is asked of the card
            self._refs[at] = weakref.ref(storage, lambda _: self._refs.pop(at, None))
            return
        columns = tensor.shape[-1] if tensor.dim() else 1
        shape = (tensor.numel() // columns if columns else 0, columns)
        ident = self.birth(storage.nbytes(), self._name(op), self._key(op), shape, str(tensor.dtype)[6:])
        self._ids[at] = ident

        def gone(_: object) -> None:
            self._refs.pop(at, None)
            self._ids.pop(at, None)
            self.death(ident)

        self._refs[at] = weakref.ref(storage, gone)

    def arrive(self, tensor: Tensor) -> None:
        """A tensor that was made in host memory is on the card now, if it is not already."""
        if self.ident(tensor) is None:
            self._refs.pop(tensor.untyped_storage()._cdata, None)
            self.track(tensor, "to")

    def ident(self, tensor: Tensor) -> int | None:
        """The number of this tensor's storage."""
        return self._ids.get(tensor.untyped_storage()._cdata)

    def home_of(self, value: object) -> int:
        if not isinstance(value, Tensor):
            return OUTSIDE
        return self.home.get(self.ident(value) or 0, OUTSIDE)

    def relabel(self, tensor: Tensor, key: str, name: str) -> None:
        """Count a tensor under another ledger line, once it turns out what it is kept for."""
        ident = self.ident(tensor)
        if ident is not None:
            self.rec.info[ident] = (key, name, *self.rec.info[ident][2:])

    def settle(self, key: str) -> None:
        """What was born in this phase and is still there, stays: count it under `key`."""
        since = self.rec.events[self._phase_at :]
        died = {-event for event in since if event < 0}
        for ident in since:
            if ident > 0 and ident not in died:
                self.rec.info[ident] = (key, *self.rec.info[ident][1:])

    @contextlib.contextmanager
    def scratch(self, *sizes: int, name: str) -> Iterator[None]:
        """Memory that a CUDA kernel asks for and gives back."""
        held = [self.birth(size, name) for size in sizes]
        yield
        for ident in held:
            self.death(ident)

    def workspace(self, name: str) -> None:
        """A thread's first product makes a workspace that stays: cuBLAS's, and cuBLASLt's for a bias."""
        if (name, self.in_backward) in self._workspaces:
            return
        self._workspaces.add((name, self.in_backward))
        size = CUBLASLT_WORKSPACE_BYTES
        if name == "cublas":
            size = CUBLAS_WORKSPACE_BYTES.get(self.gpu.compute_capability[0], DEFAULT_CUBLAS_WORKSPACE_BYTES)
        thread = "backward" if self.in_backward else "forward"
        ident = self.birth(size, f"{name} workspace, {thread} thread", WORKSPACE_KEY)
        self.home[ident] = OUTSIDE

    # ------------------------------------------------------------------------------------------------ operations
    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and self._sums_in_place(args):
            return args[0]
        rule = self.rules.get(func)
        if rule is not None:
            out = rule(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        elif str(func).rpartition(".")[0] not in known.OPERATIONS:
            raise UnknownOperation(
                f"the model runs {func}, whose memory on CUDA the tracer does not know",
                "please report it with the model's name; no number is better than a wrong one",
            )
        out = func(*args, **kwargs)
        if func in known.ON_HOST and self.phase in known.BY_PARAMETER:
            self.hosted += 1
            self._note(func, args, out)
            self.hosted -= 1
        else:
            self._note(func, args, out)
        return out

    def _note(self, func: Any, args: Sequence[Any], out: Any) -> None:
        op = str(func)
        if isinstance(out, (list, tuple)) and args and isinstance(args[0], (list, tuple)) and len(out) == len(args[0]):
            for made, source in zip(out, args[0], strict=True):  # foreach: one result per parameter
                self.at(self.home_of(source))
                self.track(made, op)
            self.at(OUTSIDE)  # they die together
            return
        if self.phase in known.BY_PARAMETER and args and isinstance(args[0], (list, tuple)) and _tensors(args[0]):
            self.at(OUTSIDE)  # of all parameters: what was made for each dies with it
        elif self.phase in known.BY_PARAMETER and args and isinstance(args[0], Tensor):
            home = self.home_of(args[0])
            if home != OUTSIDE or self.ident(args[0]) is not None:
                self.at(home)
        leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for made in reversed(leaves) if func in known.LAST_FIRST else leaves:
            self.track(made, op)
        if func in known.PRODUCTS:
            self.workspace("cublas")
        if func is torch.ops.aten.addmm.default and args[0].dim() == 1:
            self.workspace("cublaslt")

    # -------------------------------------------------------------------------------- gradients summed in place
    def _sums_in_place(self, args: Sequence[Any]) -> bool:
        """Whether torch's engine would add the second gradient into the first.

        It does when nobody else holds the first one (torch/csrc/autograd/input_buffer.cpp), but never for a subclass of
        Tensor, which a FakeTensor is. So the engine's own additions are found (no Python function called them) and the
        counts compared with those of a gradient that is surely held by the engine alone.
        """
        if not self.in_backward or len(args) != 2 or not isinstance(args[1], Tensor) or self._called_from_python():
            return False
        held, other = args
        if held.shape != other.shape or held.dtype != other.dtype or not _dense(held):
            return False
        return self._counts(held) == self._sole

    def _called_from_python(self) -> bool:
        """Whether a Python function is at work in the backward: a custom gradient, a recomputed layer."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(_DISPATCH) and frame.f_back is not None:
            frame = frame.f_back
        return frame.f_code.co_name != "_engine_run_backward"

    def _counts(self, tensor: Tensor) -> tuple[int, int]:
        return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    def calibrate(self) -> None:
        """Learn what the counts of a gradient are that only the engine holds, from one that is known."""
        seen: list[tuple[int, int]] = []
        real = self._sums_in_place

        def note(args: Sequence[Any]) -> bool:
            seen.append(self._counts(args[0]))
            return False

        self._sums_in_place = note  # type: ignore[method-assign]
        x = torch.zeros(8, 8, requires_grad=True)
        y = x * 1.0
        (y * 2.0 * (y * 3.0)).sum().backward()  # the gradient of y is the sum of two products
        self._sums_in_place = real  # type: ignore[method-assign]
        self._sole = seen[-1]

    # ----------------------------------------------------------------------------------------------------- names
    def _name(self, op: str) -> str:
        short = op.replace("aten.", "").replace("bitsandbytes.", "").rpartition(".")[0].strip("_")
        module = self.modules[-1] if self.modules else ""
        module = module.removeprefix("base_model.model.").removeprefix("model.")
        if module.startswith("layers."):
            module = module.split(".", 2)[-1]
        return f"{module} {known.SPOKEN.get(short, short)}".strip()

    def _key(self, op: str) -> str:
        """The ledger line of what this operation makes."""
        for part, key in known.KEYS.items():
            if part in op and self.phase in ("forward", "backward"):
                return key
        if self.phase == "backward" and not self.recomputing:
            return "activations.gradients"
        return self.rec.scope


def _tensors(values: Sequence[Any]) -> bool:
    return bool(values) and isinstance(values[0], Tensor)


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or bool(torch._prims_common.is_non_overlapping_and_dense_or_false(tensor))
