"""The fused loss against the full one of transformers: value and gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from types import SimpleNamespace  # noqa: E402

from torch import Tensor, nn  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from vramplan.core.loss import chunk_tokens  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.train.fused_loss import Head, fused_cross_entropy, head_of, labelled_rows  # noqa: E402

BATCH, SEQ, HIDDEN, VOCAB = 3, 17, 32, 211


def problem(dtype: torch.dtype, *, masked: float = 0.3, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [B, S, H], weight [V, H], bias [V], labels [B, S] with a share of -100."""
    torch.manual_seed(0)
    hidden = (torch.randn(BATCH, SEQ, HIDDEN) * scale).to(dtype)
    weight, bias = torch.randn(VOCAB, HIDDEN).to(dtype), torch.randn(VOCAB).to(dtype)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ))
    labels[torch.rand(BATCH, SEQ) < masked] = -100
    return hidden, weight, bias, labels


def full(hidden: Tensor, head: Head, labels: Tensor, items: int | None) -> tuple[Tensor, Tensor]:
    """Loss and hidden gradient as transformers computes them, in the dtype of `hidden`."""
    hidden = hidden.clone().requires_grad_()
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.multiplier
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    loss = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def fused(hidden: Tensor, head: Head, labels: Tensor, items: int | None) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    rows, targets = labelled_rows(labels)
    loss = fused_cross_entropy(hidden, rows, targets, head, items or max(rows.numel(), 1))
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "granite": {"multiplier": 1 / 8.0},
    "cohere": {"multiplier": 0.0625, "bias": True},
    "gemma2": {"softcap": 5.0},
    "both": {"softcap": 3.0, "multiplier": 0.5},
}


def make_head(name: str, weight: Tensor, bias: Tensor) -> Head:
    keywords = dict(HEADS[name])
    return Head(weight, bias if keywords.pop("bias", False) else None, **keywords)


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_full_loss_in_float32(name: str, items: int | None) -> None:
    hidden, weight, bias, labels = problem(torch.float32)
    head = make_head(name, weight, bias)
    value, gradient = fused(hidden, head, labels, items)
    expected, expected_gradient = full(hidden, head, labels, items)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", HEADS)
def test_is_as_close_as_the_full_loss_in_bfloat16(name: str) -> None:
    """Both are held against the float64 truth: the fused loss may not be worse than the stock one by more than 1.5."""
    hidden, weight, bias, labels = problem(torch.bfloat16)
    head = make_head(name, weight, bias)
    exact = make_head(name, weight.double(), bias.double())
    truth, truth_gradient = fused(hidden.double(), exact, labels, None)  # float64 is tested by finite differences
    value, gradient = fused(hidden, head, labels, None)
    _, stock_gradient = full(hidden, head, labels, None)
    assert abs(value.double() - truth) < 0.01 * truth
    error = (gradient.double() - truth_gradient).norm()
    assert error < 1.5 * (stock_gradient.double() - truth_gradient).norm()
    assert error < 0.02 * truth_gradient.norm()


@pytest.mark.parametrize("name", HEADS)
def test_gradient_is_the_finite_difference(name: str) -> None:
    hidden, weight, bias, labels = problem(torch.float64, scale=0.5)
    head = make_head(name, weight, bias)
    rows, targets = labelled_rows(labels)
    some = hidden[:1, :5].clone().requires_grad_()  # one row of the batch is enough: gradcheck is quadratic

    def loss(part: Tensor) -> Tensor:
        return fused_cross_entropy(
            torch.cat([torch.cat([part, hidden[:1, 5:]], 1), hidden[1:]]), rows, targets, head, 7.0
        )

    assert torch.autograd.gradcheck(loss, (some,), atol=1e-6)


def test_no_labelled_token_gives_zero_and_no_gradient() -> None:
    hidden, weight, _, labels = problem(torch.float32)
    value, gradient = fused(hidden, Head(weight), torch.full_like(labels, -100), None)
    assert value.item() == 0.0
    assert not gradient.any()


def test_one_labelled_token() -> None:
    hidden, weight, _, labels = problem(torch.float32)
    labels = torch.full_like(labels, -100)
    labels[1, 4] = 9
    value, gradient = fused(hidden, Head(weight), labels, None)
    expected, expected_gradient = full(hidden, Head(weight), labels, None)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum(-1).nonzero().tolist() == [[1, 3]]  # position 3 predicts the token at 4


def test_first_position_is_never_a_target() -> None:
    labels = torch.full((2, 4), -100)
    labels[:, 0] = 1
    assert labelled_rows(labels)[0].numel() == 0


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, labels = problem(torch.float32, scale=1e3)
    value, gradient = fused(hidden, Head(weight), labels, None)
    expected, _ = full(hidden, Head(weight), labels, None)
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all()


def test_works_in_chunks() -> None:
    tokens = BATCH * SEQ
    assert chunk_tokens(tokens, HIDDEN, VOCAB) < tokens / 2  # else the tests above would test one chunk only


def test_float32_head_under_autocast_computes_in_bfloat16() -> None:
    hidden, weight, _, labels = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = fused(hidden, Head(weight), labels, None)
    expected, expected_gradient = full(hidden, Head(weight), labels, None)
    assert gradient.dtype == torch.float32  # the residual stream's own
    assert value != expected
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0.01)
    assert (gradient - expected_gradient).norm() < 0.02 * expected_gradient.norm()


def test_without_gradient_nothing_is_kept() -> None:
    hidden, weight, _, labels = problem(torch.float32)
    rows, targets = labelled_rows(labels)
    with torch.no_grad():
        value = fused_cross_entropy(hidden, rows, targets, Head(weight), 1.0)
    assert value.grad_fn is None
    assert value > 0


class Model(nn.Module):
    """As much of a causal language model as `head_of` asks."""

    def __init__(self, layer: nn.Module, **config: float | None) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        text = SimpleNamespace(**config)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.layer


def test_head_of_reads_what_is_done_to_the_logits() -> None:
    layer = nn.Linear(4, 8, bias=True)
    head = head_of(Model(layer, final_logit_softcapping=30.0, logits_scaling=8.0))
    assert (head.multiplier, head.softcap) == (1 / 8.0, 30.0)
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert head_of(Model(nn.Linear(4, 8), logit_scale=0.25)).multiplier == 0.25


def test_head_of_refuses_a_trained_head() -> None:
    model = Model(nn.Linear(4, 8))
    model.layer.requires_grad_(True)
    with pytest.raises(InputError, match="plain frozen lm_head"):
        head_of(model)
