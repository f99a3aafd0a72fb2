"""Fused layers against the libraries' own: the same loss, the same gradients, the same adapter on disk."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from train_tools import make_model, make_run, make_text  # noqa: E402

from vramplan.core import fused as core  # noqa: E402
from vramplan.core.types import Levers, Lora  # noqa: E402
from vramplan.train.fast import kernels, mlp, norm, rotary  # noqa: E402
from vramplan.train.fast.flat import FlatLora  # noqa: E402
from vramplan.train.fast.install import Fused, decoder_layers, install, why_not  # noqa: E402
from vramplan.train.load import load_model  # noqa: E402
from vramplan.train.lora import add_lora, stochastic  # noqa: E402
from vramplan.train.trainer import trained_parameters  # noqa: E402

CPU = torch.device("cpu")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {"head_dim": 32},
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "OlmoForCausalLM": {"clip_qkv": 0.5},
    "GraniteForCausalLM": {"residual_multiplier": 0.3},
    "Starcoder2ForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "CohereForCausalLM": {},
    "SeedOssForCausalLM": {"head_dim": 32, "residual_dropout": 0.2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")
    text = make_text(root / "text.jsonl")

    def model(cls: str) -> Path:
        if not (root / cls).exists():
            make_model(root / cls, text, cls, **FAMILIES[cls])
        return root / cls

    return model


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' CPU kernel computes in bf16 whatever its input: with it nothing could be compared closely."""

    def forward(self: Any, x: Any) -> Any:
        weight = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state).to(x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)


def wrapped(folder: Path, lora: Lora, dtype: Any = torch.float32) -> Any:
    """The 4-bit model with an adapter that does something, everything else in `dtype`."""
    model = load_model(make_run(folder, folder / "none"), str(folder), CPU).requires_grad_(False)
    torch.manual_seed(5)
    model = add_lora(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        elif not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(dtype) if "lora" not in name else parameter.data
    return model.train()


class Installed:
    """`install` on a model, undone at the end."""

    def __init__(self, model: Any, checkpointing: str = "none") -> None:
        levers = Levers(checkpointing=checkpointing)
        assert why_not(model, levers, CPU) == ""
        skips = model.config.get_text_config().model_type in core.SKIPS_LAST
        self.fused: Fused = install(model, levers, CPU, skips, stochastic(model.get_base_model()))

    def __enter__(self) -> Fused:
        return self.fused

    def __exit__(self, *_: object) -> None:
        self.fused.uninstall()


def batch() -> Any:
    return torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(3))


def step(model: Any, autocast: bool = False) -> float:
    """Loss of a forward and backward."""
    torch.manual_seed(11)  # of dropout
    ids = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: Any, fused: Fused | None = None) -> dict[str, Any]:
    """By the names of PEFT's parameters; of a fused layer read through the views."""
    of = attrgetter("grad") if fused is None else fused.gradient
    return {n: of(p).clone() for n, p in model.named_parameters() if p.requires_grad}


def distance(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The worst relative error of any gradient."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - g).norm() / (g.norm() + 1e-12)) for n, g in wanted.items())


# ------------------------------------------------------------------------------------------- the same arithmetic
@pytest.mark.parametrize("checkpointing", ["none", "all", "every-2"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_loss_and_gradients_are_the_libraries(models: Any, cls: str, checkpointing: str) -> None:
    lora = Lora(r=8)
    stock, model = wrapped(models(cls), lora), wrapped(models(cls), lora)
    wanted = step(stock)
    with Installed(model, checkpointing) as fused:
        assert step(model) == pytest.approx(wanted, abs=2e-6)
        assert distance(gradients(model, fused), gradients(stock)) < 1e-5


def masks(model: Any) -> list[Any]:
    """What attention is given as its mask, layer by layer."""
    found: list[Any] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    step(model)
    for hook in hooks:
        hook.remove()
    return found


def test_the_capture_of_a_graph_has_no_mask_either(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, attention keeps keys and values of every head, and is no flash kernel: more memory, and slower."""
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    model = wrapped(models("LlamaForCausalLM"), Lora(r=8))
    assert all(mask is not None for mask in masks(model))  # what transformers does by itself
    with Installed(model):
        assert masks(model) == [None] * 4


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("k_proj",), ("up_proj", "o_proj"), ("v_proj", "q_proj")])
def test_any_part_of_the_linears_may_be_adapted(models: Any, targets: tuple[str, ...]) -> None:
    lora = Lora(r=4, targets=targets)
    stock, model = wrapped(models("LlamaForCausalLM"), lora), wrapped(models("LlamaForCausalLM"), lora)
    wanted = step(stock)
    with Installed(model, "all") as fused:
        assert step(model) == pytest.approx(wanted, abs=2e-6)
        assert distance(gradients(model, fused), gradients(stock)) < 1e-5


def test_gradients_of_micro_batches_add_up(models: Any) -> None:
    lora = Lora(r=8)
    stock, model = wrapped(models("LlamaForCausalLM"), lora), wrapped(models("LlamaForCausalLM"), lora)
    for _ in range(3):
        step(stock)
    with Installed(model, "all") as fused:
        for _ in range(3):
            step(model)
        assert distance(gradients(model, fused), gradients(stock)) < 1e-5


def test_in_bf16_it_is_as_close_as_the_libraries_are(models: Any) -> None:
    """Against the float32 gradients: rounding less often, fused layers are no farther away."""
    lora = Lora(r=8)
    exact = wrapped(models("LlamaForCausalLM"), lora)
    stock = wrapped(models("LlamaForCausalLM"), lora, torch.bfloat16)
    model = wrapped(models("LlamaForCausalLM"), lora, torch.bfloat16)
    step(exact)
    step(stock, autocast=True)
    with Installed(model, "all") as fused:
        step(model, autocast=True)
        assert distance(gradients(model, fused), gradients(exact)) < 1.2 * distance(gradients(stock), gradients(exact))


def test_evaluation_and_generation_are_the_libraries(models: Any) -> None:
    stock, model = (wrapped(models("LlamaForCausalLM"), Lora(r=8)).eval() for _ in range(2))
    prompt = {"input_ids": batch()[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    how = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    with Installed(model), torch.no_grad():
        assert torch.allclose(model(batch()).logits, stock(batch()).logits, atol=1e-5)
        assert torch.equal(model.generate(**prompt, **how), stock.generate(**prompt, **how))


def test_the_libraries_own_layers_can_be_asked_meanwhile(models: Any) -> None:
    model = wrapped(models("LlamaForCausalLM"), Lora(r=8)).eval()
    with torch.no_grad():
        wanted = model(batch()).logits
    with Installed(model) as fused, torch.no_grad():
        broken = fused.shared[0].group.bases[0]
        broken.module, kept = fused.shared[0].group.bases[1].module, broken.module
        with pytest.raises(RuntimeError):
            model(batch())
        fused.forget()
        with fused.stock():
            assert torch.equal(model(batch()).logits, wanted)
        broken.module = kept
        assert torch.allclose(model(batch()).logits, wanted, atol=1e-5)


def test_attention_that_gives_its_linears_other_inputs(models: Any) -> None:
    """q_proj computes k and v too, in the hope that they are asked for with the same tensor."""
    model = wrapped(models("LlamaForCausalLM"), Lora(r=8))
    attention = decoder_layers(model)[0].self_attn
    x, other = torch.randn(1, 5, 128), torch.randn(1, 5, 128)
    wanted = attention.q_proj(x), attention.k_proj(other), attention.v_proj(x)
    with Installed(model) as fused:
        found = attention.q_proj(x), attention.k_proj(other), attention.v_proj(x)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
        sum(y.sum() for y in found).backward()
        assert fused.parameters[0].grad is not None and bool(fused.parameters[0].grad.isfinite().all())
        attention.q_proj(x)
        fused.forget()
        assert all(not shared.waiting for shared in fused.shared)


# --------------------------------------------------------------------------------------------------- the adapter
def test_what_is_saved_is_a_plain_peft_adapter(models: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = wrapped(models("LlamaForCausalLM"), Lora(r=8))
    with Installed(model) as fused:
        step(model)
        optimizer = torch.optim.SGD(trained_parameters(model, fused), lr=0.1)
        optimizer.step()
        model.save_pretrained(tmp_path / "adapter")
        wanted = model(batch()).logits
    base = load_model(make_run(models("LlamaForCausalLM"), tmp_path), str(models("LlamaForCausalLM")), CPU)
    for parameter in base.parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.float()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(again(batch()).logits, wanted, atol=1e-5)


def test_the_optimizer_steps_one_tensor_a_layer(models: Any) -> None:
    model = wrapped(models("LlamaForCausalLM"), Lora(r=8))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with Installed(model) as fused:
        parameters = trained_parameters(model, fused)
        assert len(parameters) == 4
        assert sum(p.numel() for p in parameters) == trainable
        assert len({p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad}) == 4


def test_slots_lie_side_by_side() -> None:
    lora = FlatLora()
    slots = [lora.reserve(4, 8, (16, 24), (1.0, 2.0)), lora.reserve(4, 16, (8,), (1.0,))]
    flat = torch.arange(lora.size, dtype=torch.float32)
    seen = torch.cat(
        [part.flatten() for slot in slots for a, bs in [slot.views(flat, slot.start)] for part in (a, *bs)]
    )
    assert torch.equal(seen, flat)
    assert slots[0].views(flat)[0].shape == (8, 8) and slots[1].views(flat, slots[1].start)[1][0].shape == (8, 4)


# ---------------------------------------------------------------------------------------------- what is not fused
@pytest.mark.parametrize(
    ("levers", "lora", "why"),
    [
        (Levers(kernels="stock"), Lora(), "stock"),
        (Levers(upcast="all"), Lora(), "float32"),
        (Levers(), Lora(dropout=0.1), "dropout"),
        (Levers(optimizer="adafactor"), Lora(), "shape"),
    ],
)
def test_what_cannot_be_fused_is_left_to_the_libraries(models: Any, levers: Levers, lora: Lora, why: str) -> None:
    assert why in why_not(wrapped(models("LlamaForCausalLM"), lora), levers, CPU)


def test_a_second_adapter_is_left_to_peft(models: Any) -> None:
    from peft import LoraConfig

    model = wrapped(models("LlamaForCausalLM"), Lora())
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    assert "several" in why_not(model, Levers(), CPU)


def test_norms_are_known_by_what_they_do() -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    for module, wanted in (
        (LlamaRMSNorm(8), (0.0, False)),
        (Olmo2RMSNorm(8), (0.0, True)),
        (GemmaRMSNorm(8), (1.0, True)),
    ):
        found = norm.norm_of(module)
        assert found is not None and (found.offset, found.late) == wanted
    assert norm.norm_of(CohereLayerNorm(8)) is None
    assert norm.norm_of(torch.nn.LayerNorm(8)) is None


def test_an_mlp_that_does_more_is_left_alone() -> None:
    from transformers import LlamaConfig, SeedOssConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert mlp.activation_of(LlamaMLP(LlamaConfig(**sizes))) == "silu"
    assert mlp.activation_of(LlamaMLP(LlamaConfig(**sizes, hidden_act="gelu_pytorch_tanh"))) == "gelu_tanh"
    assert mlp.activation_of(LlamaMLP(LlamaConfig(**sizes, hidden_act="relu"))) is None
    assert mlp.activation_of(SeedOssMLP(SeedOssConfig(**sizes, residual_dropout=0.1))) is None
    assert mlp.activation_of(SeedOssMLP(SeedOssConfig(**sizes, residual_dropout=0.0))) == "silu"


def test_a_rotary_embedding_that_turns_neighbours_is_left_alone() -> None:
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    assert rotary.same_meaning(modeling_llama.apply_rotary_pos_emb, 16, 16)
    assert not rotary.same_meaning(modeling_cohere.apply_rotary_pos_emb, 16, 16)
    assert not rotary.same_meaning(modeling_llama.apply_rotary_pos_emb, 16, 8)


def test_slices_cover_a_weight_once() -> None:
    for outputs, inputs in ((64, 64), (28672, 8192), (100, 10**6), (151_936, 5120)):
        pieces = list(core.slices(outputs, inputs))
        assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == outputs
        assert all(2 * (b - a) * inputs <= max(core.SLICE_BYTES, 2 * 64 * inputs) for a, b in pieces)
        assert all(a % 64 == 0 for a, _ in pieces)


# ----------------------------------------------------------------------------------------------------- the kernels
def reference(name: str) -> Iterator[tuple[Any, Any]]:
    """(what the plain kernel says, what autograd says) in float64."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    if name == "norm":
        for offset, late in ((0.0, False), (0.0, True), (1.0, True)):
            x, weight, grad = draw(5, 16).requires_grad_(), draw(16), draw(5, 16)
            y, inverse = kernels.rms_norm(x, weight, 1e-5, offset, late)
            (wanted,) = torch.autograd.grad(y, x, grad)
            yield kernels.rms_norm_backward(grad, x.detach(), inverse.detach(), weight, offset), wanted
    elif name == "rotary":
        x, grad, angle = draw(2, 3, 4, 8).requires_grad_(), draw(2, 3, 4, 8), draw(1, 4, 8)
        y = kernels.rotate(x.detach(), angle.cos(), angle.sin())
        half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        wanted = x * angle.cos().unsqueeze(1) + half * angle.sin().unsqueeze(1)
        yield y, wanted.detach()
        yield kernels.rotate(grad, angle.cos(), angle.sin(), backward=True), torch.autograd.grad(wanted, x, grad)[0]
    else:
        for activation in kernels.ACTIVATIONS:
            gate, up, grad = draw(6, 10).requires_grad_(), draw(6, 10).requires_grad_(), draw(6, 10)
            y = kernels.gated(gate, up, activation)
            of_gate, of_up = torch.autograd.grad(y, (gate, up), grad)
            found = [t.detach().clone() for t in (grad, gate, up)]
            kernels.gated_backward_(*found, activation)
            yield from zip(found, (y.detach(), of_gate, of_up), strict=True)


@pytest.mark.parametrize("name", ["norm", "rotary", "gated"])
def test_backward_kernels_are_the_gradients(name: str) -> None:
    for found, wanted in reference(name):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- on a card
@pytest.mark.cuda
@needs_card
def test_kernels_of_a_card_agree_with_plain_torch() -> None:
    card = torch.device("cuda")
    triton_kernels = pytest.importorskip("vramplan.train.fast.triton_kernels")

    def close(found: Any, wanted: Any, limit: float = 4e-3) -> None:
        found, wanted = found.float().cpu(), wanted.float().cpu()
        assert float((found - wanted).norm() / wanted.norm()) < limit

    for n in (128, 576, 4096):
        x, weight, grad = (torch.randn(*s, device=card, dtype=torch.bfloat16) for s in ((33, n), (n,), (33, n)))
        for offset, late in ((0.0, False), (1.0, True)):
            y, inverse = triton_kernels.rms_norm(x, weight, 1e-6, offset, late)
            plain = kernels.rms_norm(x.cpu(), weight.cpu(), 1e-6, offset, late)
            close(y, plain[0])
            dx = triton_kernels.rms_norm_backward(grad, x, inverse, weight, offset)
            close(dx, kernels.rms_norm_backward(grad.cpu(), x.cpu(), plain[1], weight.cpu(), offset))
    x = torch.randn(2, 64, 8, 128, device=card, dtype=torch.bfloat16).transpose(1, 2)
    angle = torch.randn(1, 64, 64, device=card).repeat(1, 1, 2)
    for backward in (False, True):
        made = triton_kernels.rotate(x, angle.cos(), angle.sin(), backward)
        close(made, kernels.rotate(x.cpu(), angle.cos().cpu(), angle.sin().cpu(), backward))
    for activation in kernels.ACTIVATIONS:
        tensors = [torch.randn(100, 1000, device=card, dtype=torch.bfloat16) for _ in range(3)]
        plain = [t.cpu() for t in tensors]
        triton_kernels.gated_backward_(*tensors, activation)
        kernels.gated_backward_(*plain, activation)
        for found, wanted in zip(tensors, plain, strict=True):
            close(found, wanted)
    for nested in (True, False):
        packed, state = bnb.functional.quantize_4bit(
            torch.randn(1024, 4096, device=card, dtype=torch.bfloat16), compress_statistics=nested, quant_type="nf4"
        )
        weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        close(kernels.dequantise(weight, 0, 1024, torch.bfloat16), bnb.functional.dequantize_4bit(packed, state), 1e-4)
    total = torch.zeros(48, 512, device=card)
    a, b = (torch.randn(*s, device=card, dtype=torch.bfloat16) for s in ((48, 256), (256, 512)))
    kernels.add_product_(total, a, b, 0.5)
    close(total, 0.5 * a.float() @ b.float())


@pytest.mark.cuda
@needs_card
@pytest.mark.parametrize(("multiplier", "softcap"), [(1.0, None), (0.5, None), (0.7, 9.0)])
def test_the_loss_of_a_card_is_cross_entropy(multiplier: float, softcap: float | None) -> None:
    logits = torch.randn(64, 32000, device="cuda").mul_(3).to(torch.bfloat16)
    targets = torch.randint(0, 32000, (64,), device="cuda")
    wide = logits.float().requires_grad_()
    z = wide * multiplier
    z = softcap * torch.tanh(z / softcap) if softcap else z
    wanted = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (wanted.sum() * 0.25).backward()
    scale = torch.tensor(0.25, device="cuda")
    assert torch.allclose(kernels.cross_entropy_(logits, targets, scale, multiplier, softcap, True), wanted, rtol=1e-5)
    assert float((logits.float() - wide.grad).norm() / wide.grad.norm()) < 4e-3
