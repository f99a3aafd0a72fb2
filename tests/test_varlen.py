"""Attention over packed rows: the same losses and gradients as the documents alone, in every family that can."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from traced import CONFIGS  # noqa: E402

from vramplan.core.types import Levers, RunSpec  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.train import varlen  # noqa: E402
from vramplan.train.collate import Collator, input_tokens, of_one_shape  # noqa: E402
from vramplan.train.splitting import pieces_of  # noqa: E402

FAMILIES = [f for f in CONFIGS if not f.startswith(("falcon", "stablelm", "gemma2"))]
WINDOW, WIDTH = 5, 24
DOCUMENTS = [[9, 8, 3], [20]]  # row by row; longer and shorter than the window, with and without padding


def tiny(family: str, attention: str) -> Any:
    """A model of the family with two or four narrow layers, in float32, the same for every attention."""
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64, "head_dim": 8}
    config = {k: v for k, v in CONFIGS[family].items() if k != "head_dim"} | small
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 2
    config |= {k: v for k, v in {"moe_intermediate_size": 16, "sliding_window": WINDOW}.items() if config.get(k)}
    made = transformers.CONFIG_MAPPING[config.pop("model_type")](**config)
    made.initializer_range = 0.3  # so that what attention sees makes a difference
    for name in ("resid_pdrop", "embd_pdrop", "residual_dropout", "attention_dropout"):
        if hasattr(made, name):
            setattr(made, name, 0.0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention).train()


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for lengths in DOCUMENTS:
        ids = torch.randint(3, 60, (sum(lengths),), generator=generator).tolist()
        labels, at = list(ids), 0
        for length in lengths:
            labels[at] = -100
            at += length
        made.append({"input_ids": ids, "labels": labels, "lengths": lengths})
    return made


def documents() -> list[Any]:
    return [
        torch.tensor([row["input_ids"][a:b]])
        for row in rows()
        for a, b in pairwise([0, *torch.tensor(row["lengths"]).cumsum(0).tolist()])
    ]


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Sum of the losses over all labels, and its gradients."""
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=1).loss
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_is_its_documents_alone(family: str) -> None:
    varlen.implementation(RunSpec(model="x", packing=True))
    batch = Collator(0, WIDTH, packed=True)(rows())
    if family == "llama":
        batch = of_one_shape(batch)  # with empty documents
    packed, gradients = loss_and_gradients(tiny(family, varlen.NAME), [batch])
    alone = [{"input_ids": ids, "labels": ids} for ids in documents()]
    wanted, wanted_gradients = loss_and_gradients(tiny(family, "sdpa"), alone)
    assert packed == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=2e-4, atol=2e-5, msg=name)


def test_documents_that_see_each_other_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would find if the borders, or the windows, were lost."""
    varlen.implementation(RunSpec(model="x", packing=True))
    batch = Collator(0, WIDTH, packed=True)(rows())
    right, _ = loss_and_gradients(tiny("mistral", varlen.NAME), [batch])
    lost = {k: v for k, v in batch.items() if not k.startswith(("cu_seq", "max_length"))}
    assert loss_and_gradients(tiny("mistral", varlen.NAME), [lost])[0] != pytest.approx(right, rel=1e-3)
    monkeypatch.setattr(varlen, "_window_mask", lambda length, window, device: torch.ones(length, length).tril().bool())
    assert loss_and_gradients(tiny("mistral", varlen.NAME), [batch])[0] != pytest.approx(right, rel=1e-3)


def test_generation_is_that_of_sdpa() -> None:
    """Where a batch has no borders every row is one document, with a cache or without, past the window."""
    varlen.implementation(RunSpec(model="x", packing=True))
    prompt = documents()[0]
    texts = [
        tiny(family, name).eval().generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cache)
        for family in ("llama", "mistral")
        for cache in (True, False)
        for name in (varlen.NAME, "sdpa")
    ]
    for ours, theirs in zip(texts[::2], texts[1::2], strict=True):
        assert ours.tolist() == theirs.tolist()


def test_soft_capping_and_other_kinds_of_layers_are_refused() -> None:
    with pytest.raises(InputError, match="soft-caps"):
        varlen.refuse_unpackable(transformers.Gemma2Config())
    with pytest.raises(InputError, match="linear_attention"):
        varlen.refuse_unpackable(transformers.Qwen3NextConfig())
    varlen.refuse_unpackable(transformers.LlamaConfig())
    varlen.implementation(RunSpec(model="x", packing=True))
    with pytest.raises(InputError, match="soft-capping"):
        loss_and_gradients(tiny("gemma2", varlen.NAME), [Collator(0, WIDTH, packed=True)(rows())])


def test_which_attention_a_run_loads() -> None:
    names = {
        attention: varlen.implementation(RunSpec(model="x", packing=True, levers=Levers(attention=attention)))
        for attention in ("sdpa", "flash_attention_2")
    }
    assert names == {"sdpa": varlen.NAME, "flash_attention_2": "flash_attention_2"}
    assert varlen.implementation(RunSpec(model="x", levers=Levers(attention="eager"))) == "eager"
    with pytest.raises(InputError, match="eager does not"):
        varlen.implementation(RunSpec(model="x", packing=True, levers=Levers(attention="eager")))


def test_a_piece_of_a_batch_is_the_batch_of_those_rows() -> None:
    for packed in (True, False):
        examples = rows() if packed else [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows()]
        collate = Collator(0, WIDTH, packed)
        whole = collate(examples)
        assert int(input_tokens(whole)) == 40
        for example, piece in zip(examples, pieces_of(whole, 1), strict=True):
            assert int(input_tokens(piece)) == 20
            wanted = collate([example])
            assert piece.keys() == wanted.keys()
            for name, value in wanted.items():
                if not name.startswith("max_length"):  # the whole batch's is no less
                    assert piece[name].tolist() == value.tolist()


@pytest.mark.cuda
@pytest.mark.parametrize(("heads", "keys", "dim", "window"), [(8, 2, 64, None), (4, 4, 128, 100), (16, 4, 256, None)])
def test_the_flash_kernel_computes_what_the_documents_alone_do(heads: int, keys: int, dim: int, window: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batch = Collator(0, 512, packed=True)(
        [{"input_ids": [1] * n, "labels": [1] * n, "lengths": lengths} for n, lengths in ((500, [300, 150, 50]),
                                                                                          (512, [512]))]
    )  # fmt: skip
    edges = batch["cu_seq_lens_q"].cuda()

    class Module(torch.nn.Module):  # what the interface is given of the model
        is_causal = True

    results = []
    for flash in (True, False):
        generator = torch.Generator("cuda").manual_seed(3)
        q, k, v = (
            torch.randn(2, 512, h, dim, generator=generator, device="cuda", dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for h in (heads, keys, keys)
        )
        longest = batch["max_length_q"] if flash else None  # without it, document by document
        out, _ = varlen.attention(
            Module(), q, k, v, None, sliding_window=window, cu_seq_lens_q=edges, max_length_q=longest
        )
        out.backward(torch.ones_like(out) / 64)
        results.append((out, q.grad, k.grad, v.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
