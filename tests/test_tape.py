"""The miniature autograd against torch's behaviour, on graphs small enough to follow by hand."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from vramplan.core import ops
from vramplan.core.bnb_kernel import uses_fused_kernel
from vramplan.core.tape import Recorder, Tape, Tensor


def alive(rec: Recorder) -> list[str]:
    now: dict[int, str] = {}
    for event in rec.events:
        if event > 0:
            now[event] = rec.info[event][1]
        else:
            del now[-event]
    return sorted(now.values())


@pytest.fixture
def tape() -> Tape:
    return Tape(Recorder())


def leaf(tape: Tape, name: str = "x") -> Tensor:
    x = tape.new(name, 8, 64, "bfloat16")
    x.node = tape.parameter(1, 1, "bfloat16", "").node
    return x


def test_storages_die_with_their_last_reference(tape):
    x = tape.new("x", 8, 64, "bfloat16")
    view = x.view(64, 8)
    del x
    assert alive(tape.rec) == ["x"]
    del view
    assert alive(tape.rec) == []


def test_mul_saves_both_factors_and_releases_them_after_its_backward(tape):
    a, b = leaf(tape, "a"), leaf(tape, "b")
    out = ops.mul(tape, a, b, "product")
    root = ops.unary(tape, out, "loss", columns=1)
    del a, b, out
    assert alive(tape.rec) == ["a", "b", "loss"]
    tape.backward(root, tape.new("seed", 8, 1, "bfloat16"))
    assert alive(tape.rec) == ["gradient of product", "gradient of product", "loss"]  # kept by the two leaves


def test_what_needs_no_gradient_saves_nothing(tape):
    a = tape.new("a", 8, 64, "bfloat16")
    ops.unary(tape, a, "silu", saves="input")
    del a
    assert alive(tape.rec) == []


def test_gradients_of_one_tensor_are_summed_in_place(tape):
    x = leaf(tape)
    total = ops.add(tape, ops.unary(tape, x, "left"), ops.unary(tape, x, "right"))
    tape.rec.events.clear()
    tape.backward(total, tape.new("seed", 8, 64, "bfloat16"))
    names = [tape.rec.info[e][1] for e in tape.rec.events if e > 0]
    assert names == ["seed", "gradient of right", "gradient of left"]


def test_a_shared_gradient_is_not_written_to(tape):
    x = leaf(tape)
    total = ops.add(tape, x, ops.unary(tape, x, "right"))
    y = ops.add(tape, total, x)
    tape.rec.events.clear()
    tape.backward(y, tape.new("seed", 8, 64, "bfloat16"))
    names = [tape.rec.info[e][1] for e in tape.rec.events if e > 0]
    assert "gradient sum" in names


def test_checkpoint_keeps_its_input_alone_and_recomputes_up_to_the_last_saved_tensor(tape):
    def block(h: Tensor) -> Tensor:
        a = ops.unary(tape, h, "a", saves="input")
        b = ops.unary(tape, a, "b", saves="input")
        return ops.unary(tape, b, "c")

    x = leaf(tape)
    out = tape.checkpoint(block, x)
    del x
    assert alive(tape.rec) == ["c", "x"]
    tape.rec.events.clear()
    tape.backward(out, tape.new("seed", 8, 64, "bfloat16"))
    names = [tape.rec.info[e][1] for e in tape.rec.events if e > 0]
    assert names == ["seed", "gradient of c", "a", "gradient of b", "gradient of a"]  # b and c are not made again


def test_autocast_keeps_one_copy_of_a_trainable_weight(tape):
    weight = tape.parameter(16, 64, "float32", "lora_A")
    x = tape.new("x", 8, 64, "bfloat16")
    tape.cast_cache = {}
    first, second = ops.linear(tape, x, weight, "A"), ops.linear(tape, x, weight, "A")
    assert alive(tape.rec).count("A weight in bf16") == 1
    del first, second
    tape.cast_cache = None
    assert "A weight in bf16" not in alive(tape.rec)


def test_each_thread_makes_one_cublas_workspace(tape):
    weight = tape.parameter(16, 64, "float32", "lora_A")
    out = ops.linear(tape, leaf(tape), weight, "A")
    ops.linear(tape, leaf(tape), weight, "A")
    tape.in_backward = True
    tape.backward(out, tape.new("seed", 8, 16, "bfloat16"))
    assert sum("workspace" in name for name in alive(tape.rec)) == 2


def test_the_fused_kernel_is_chosen_as_bitsandbytes_does():
    bnb = pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    source = Path(bnb.__file__).parent.joinpath("backends/cuda/ops.py").read_text()
    wanted = "_gemm_4bit_use_custom_cuda"
    tree = ast.parse(source).body
    function = next((n for n in tree if isinstance(n, ast.FunctionDef) and n.name == wanted), None)
    if function is None:
        pytest.skip("this bitsandbytes chooses elsewhere")
    function.decorator_list = []
    cards = [((8, 0), 108), ((8, 6), 82), ((8, 6), 28), ((8, 9), 128), ((8, 9), 34), ((9, 0), 132), ((10, 0), 148),
             ((12, 0), 170), ((12, 1), 48), ((8, 7), 16), ((7, 5), 40), ((11, 0), 20)]  # fmt: skip
    rng = random.Random(7)
    for capability, sms in cards:
        names = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4}
        names["_gpu_dispatch_props"] = lambda i, p=(sms, *capability): p
        exec(compile(ast.Module([function], []), wanted, "exec"), names)
        for _ in range(3000):
            m = rng.choice([rng.randint(8, 1536), rng.randint(8, 130)])
            n, k = rng.choice([576, 1024, 2048, 4096, 11008, 14336, rng.randint(64, 30000)]), 64 * rng.randint(1, 450)
            k = n // 64 * 64 or 64 if rng.random() < 0.2 else k
            expected = names[wanted](0, torch.bfloat16, m, n, k)
            assert uses_fused_kernel(m, n, k, capability, sms) == expected, (capability, m, n, k)
    assert not uses_fused_kernel(1537, 4096, 4096, (8, 9), 128)
    assert not uses_fused_kernel(64, 4096, 4000, (8, 9), 128)  # K is no multiple of the block
