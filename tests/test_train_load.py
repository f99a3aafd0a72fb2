"""Loading in 4 bits, random weights, adapters on top, resident tensors counted: on a tiny Llama."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from train_tools import make_model, make_run, make_text  # noqa: E402

from vramplan.core.types import Levers, Lora, RunSpec  # noqa: E402
from vramplan.errors import InputError, VramplanError  # noqa: E402
from vramplan.train.load import load_model, load_tokenizer, resolve  # noqa: E402
from vramplan.train.lora import add_lora, check_targets, checkpoint_every, prepare  # noqa: E402
from vramplan.train.meter import count_lines  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, HIDDEN, INTERMEDIATE, KV, VOCAB = 4, 128, 256, 64, 512
LINEARS = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN)] + [(INTERMEDIATE, HIDDEN)] * 3


def up(size: int) -> int:
    return -(-size // 512) * 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    return make_model(root / "model", make_text(root / "text.jsonl"))


@pytest.fixture
def run(tiny: Path) -> RunSpec:
    return make_run(tiny, tiny / "none.jsonl")


def loaded(run: RunSpec) -> Any:
    return load_model(run, str(run.model_path), DEVICE)


# ------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("random_weights", [False, True])
def test_linear_layers_are_nf4_and_nothing_else(run: RunSpec, random_weights: bool) -> None:
    model = loaded(replace(run, random_weights=random_weights))
    four_bit = {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(four_bit) == LAYERS * 7
    assert not any("lm_head" in n for n in four_bit)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
    others = [p for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit)]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert all(p.device.type == DEVICE.type for p in model.parameters())
    assert model.is_loaded_in_4bit


def test_random_weights_have_the_bytes_of_real_ones(run: RunSpec) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    models = [prepare(loaded(replace(run, random_weights=r)), run.levers, DEVICE, print) for r in (False, True)]
    real, random = (count_lines(model, optimizer, DEVICE) for model in models)
    assert [(line.key, line.bytes) for line in real] == [(line.key, line.bytes) for line in random]


def test_tied_random_weights_stay_tied(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "m", make_text(tmp_path / "t"), tie_word_embeddings=True)
    model = loaded(replace(make_run(model_dir, tmp_path / "t"), random_weights=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_without_double_quantisation_there_is_no_nested_state(run: RunSpec) -> None:
    for random_weights in (False, True):
        model = loaded(replace(run, double_quant=False, random_weights=random_weights))
        assert not model.model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_training_works_after_an_evaluation(run: RunSpec) -> None:
    """bitsandbytes repacks weights in eval mode on some CPUs, and has no backward for them then."""
    model = add_lora(prepare(loaded(run), run.levers, DEVICE, print), run.lora)
    ids = torch.randint(3, 100, (1, 8), device=DEVICE)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == LAYERS * 7
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


# ------------------------------------------------------------------------------------------------------ bad input
def test_resolve(run: RunSpec, tmp_path: Path) -> None:
    assert resolve(run, tmp_path) == run.model_path
    assert resolve(replace(run, model_path=None, model="org/name"), tmp_path) == "org/name"
    for path in ("/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere.gguf", __file__):
        with pytest.raises(InputError, match=r"nowhere|\.py"):
            resolve(replace(run, model_path=path), tmp_path)


def test_missing_weights_are_refused(tiny: Path, run: RunSpec, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(replace(run, model_path=str(tmp_path)))


def test_missing_tensors_are_refused(tiny: Path, run: RunSpec, tmp_path: Path) -> None:
    """transformers would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"lack 1 tensors, first model\.layers\.2\.mlp\.up_proj"):
        loaded(replace(run, model_path=str(tmp_path)))


def test_torn_weights_are_refused(tiny: Path, run: RunSpec, tmp_path: Path) -> None:
    content = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(replace(run, model_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "cause", "expected"),
    [
        ("You are trying to access a gated repo.\nMake sure ...", None, "is gated"),
        ("x is not a local folder", "401 Client Error. Repository Not Found", "no model org/name on the Hub"),
        ("We couldn't connect to 'https://huggingface.co'", None, "Hub unreachable"),
        ("the repository contains custom code: set trust_remote_code=True", None, "brings its own code"),
        ("Unrecognized configuration class", None, "cannot be loaded: Unrecognized"),
    ],
)
def test_hub_errors_are_one_sentence(
    run: RunSpec, monkeypatch: pytest.MonkeyPatch, text: str, cause: str | None, expected: str
) -> None:
    from vramplan.train import load

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(text) from (RuntimeError(cause) if cause else None)

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(VramplanError, match=expected) as caught:
        load_tokenizer(run, "org/name")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == (1 if expected == "Hub unreachable" else 2)


def test_out_of_memory_while_loading_is_not_called_bad_input(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.train import load

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        loaded(run)


# ----------------------------------------------------------------------------------------------------- tokenizer
def test_bytes_are_tokens_without_a_tokenizer(run: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32000}))
    tokenizer = load_tokenizer(replace(run, random_weights=True), str(tmp_path))
    text = "Grüße, 世界 \n\t!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 200}))
    with pytest.raises(InputError, match="too small for bytes"):
        load_tokenizer(replace(run, random_weights=True), str(tmp_path))


# -------------------------------------------------------------------------------------------- casts, checkpoints
@pytest.mark.parametrize(
    ("upcast", "norm", "embedding"),
    [("none", "bfloat16", "bfloat16"), ("norms", "float32", "bfloat16"), ("all", "float32", "float32")],
)
def test_upcast(run: RunSpec, upcast: str, norm: str, embedding: str) -> None:
    model = prepare(loaded(run), replace(run.levers, upcast=upcast), DEVICE, print)
    layer = model.model.layers[1]
    assert str(layer.input_layernorm.weight.dtype) == str(model.model.norm.weight.dtype) == f"torch.{norm}"
    assert str(model.model.embed_tokens.weight.dtype) == str(model.lm_head.weight.dtype) == f"torch.{embedding}"
    assert layer.mlp.up_proj.weight.dtype == torch.uint8
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("checkpointing", "expected"), [("none", [0, 0, 0, 0]), ("all", [1, 1, 1, 1]), ("every-2", [1, 0, 1, 0])]
)
@pytest.mark.parametrize("upcast", ["none", "all"])
def test_checkpointing(run: RunSpec, upcast: str, checkpointing: str, expected: list[int]) -> None:
    levers = Levers(upcast=upcast, checkpointing=checkpointing, kernels="stock")
    model = add_lora(prepare(loaded(run), levers, DEVICE, print), run.lora)
    layers = model.get_base_model().model.layers
    assert [int(layer.gradient_checkpointing) for layer in layers] == expected
    if checkpointing != "none":
        assert layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_checkpoint_offload_on_a_cpu_is_a_warning(run: RunSpec) -> None:
    warnings: list[str] = []
    prepare(
        loaded(run), replace(run.levers, checkpoint_offload=True, kernels="stock"), torch.device("cpu"), warnings.append
    )
    assert len(warnings) == 1


def test_checkpoint_words() -> None:
    assert [checkpoint_every(w) for w in ("none", "all", "every-1", "every-12")] == [0, 1, 1, 12]
    for word in ("every-0", "every-", "every--1", "every-2.5", "some", ""):
        with pytest.raises(InputError):
            checkpoint_every(word)


# --------------------------------------------------------------------------------------------------------- lora
def test_lora_targets_and_dtype(run: RunSpec) -> None:
    lora = Lora(r=4, alpha=8, targets=("q_proj", "v_proj"), dropout=0.1)
    model = add_lora(prepare(loaded(run), run.levers, DEVICE, print), lora)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == LAYERS * 2 * 2
    assert all("lora_" in n and ("q_proj" in n or "v_proj" in n) for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    halved = add_lora(prepare(loaded(run), run.levers, DEVICE, print), replace(lora, dtype="bfloat16"))
    assert {p.dtype for p in halved.parameters() if p.requires_grad} == {torch.bfloat16}


def test_a_target_that_names_nothing_lists_what_there_is(run: RunSpec) -> None:
    model = loaded(run)
    with pytest.raises(InputError, match=r"is called query, key") as caught:
        check_targets(model, ["q_proj", "query", "key"])
    for name in ("q_proj", "down_proj", "lm_head"):
        assert name in caught.value.hint
    assert "patterns" not in caught.value.hint
    with pytest.raises(InputError, match="is called") as caught:
        check_targets(model, [r".*\.(q|v)_proj"])
    assert caught.value.hint.startswith("names, not patterns; there are: ")


# -------------------------------------------------------------------------------------------- resident, counted
def test_lines_are_the_tensors_of_the_formulas(run: RunSpec) -> None:
    model = add_lora(prepare(loaded(run), run.levers, DEVICE, print), run.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    lines = {line.key: line.bytes for line in count_lines(model, optimizer, DEVICE)}

    packed = constants = adapter = 0
    for out, into in LINEARS:
        blocks = -(-out * into // 64)
        packed += up(out * into // 2)
        constants += up(blocks) + up(4 * -(-blocks // 256)) + up(64) + up(1024) + up(4)
        adapter += up(4 * run.lora.r * into) + up(4 * run.lora.r * out)
    assert lines["weights.nf4"] == LAYERS * packed
    assert lines["weights.constants"] == LAYERS * constants
    assert lines["weights.embeddings"] == lines["weights.lm_head"] == up(2 * VOCAB * HIDDEN)
    assert lines["adapter.lora"] == lines["adapter.gradients"] == LAYERS * adapter
    assert lines["optimizer.state"] == 2 * LAYERS * adapter
    assert lines["weights.other"] >= (2 * LAYERS + 1) * up(2 * HIDDEN)
