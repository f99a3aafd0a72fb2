"""Merged models against PEFT's own merge, tensor by tensor and by what they say; and everything that is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from train_tools import make_model, make_text  # noqa: E402

from vramplan.core.types import MergeSpec  # noqa: E402
from vramplan.errors import InputError, VramplanError  # noqa: E402
from vramplan.train import merge as module  # noqa: E402
from vramplan.train import shards  # noqa: E402
from vramplan.train.adapter import Locator  # noqa: E402
from vramplan.train.merge import merge  # noqa: E402
from vramplan.train.shards import DTYPES, Entry, in_shards, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl", 30)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def make_adapter(base: Path, folder: Path, seed: int = 1, **lora: Any) -> Any:
    """A plain PEFT adapter with random A and B, saved; the model that it is on."""
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **lora})
    model = peft.get_peft_model(load(base), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = parameter if "lora_" not in name else torch.zeros_like(parameter)
                parameter.copy_(own + torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return model


def spec(base: Path, adapter: Path, output: Path, **changes: Any) -> MergeSpec:
    return MergeSpec(adapter=str(adapter), base=str(base), base_name="org/base", output=str(output), **changes)


def quiet(event: str, **fields: Any) -> None:
    pass


def logits(model: Any) -> Any:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},  # biases
    "Gemma2ForCausalLM": {"head_dim": 32, "sliding_window": 16, "tie_word_embeddings": True},
    "Phi3ForCausalLM": {},  # fused projections
    "GPTNeoXForCausalLM": {},  # the head is called embed_out
    "GPT2LMHeadModel": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64},  # weights lie [in, out]
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["20MB", "200KB"])
def test_it_is_what_peft_makes(text: Path, tmp_path: Path, family: str, shard: str) -> None:
    base = make_model(tmp_path / "base", text, family, **FAMILIES[family])
    load(base).save_pretrained(tmp_path / "base", max_shard_size=shard)
    if shard != "20MB":
        (base / "model.safetensors").unlink()
    unmerged = make_adapter(base, tmp_path / "adapter")
    said = merge(spec(base, tmp_path / "adapter", tmp_path / "out", max_shard_bytes=300_000), quiet)
    assert " tensors merged, " in said
    merged, expected = load(tmp_path / "out"), unmerged.merge_and_unload()
    theirs = expected.state_dict()
    assert set(merged.state_dict()) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in merged.state_dict().items())
    assert torch.equal(logits(merged), logits(expected))
    assert not torch.equal(logits(merged), logits(load(base)))
    assert merged.config.tie_word_embeddings == load(base).config.tie_word_embeddings
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"  # as llama.cpp looks for them
    names = [name for file in files for name in load_file(tmp_path / "out" / file)]
    assert sorted(names) == sorted(
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("base"),
        text,
        "Qwen2ForCausalLM",
        num_hidden_layers=2,
        tie_word_embeddings=request.param,
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 3, "0.mlp.up_proj": 7},
    },
    "biases": {"bias": "all", "target_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "head trained": {"target_modules": ALL, "modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": [*ALL, "lm_head"]},
    "embedding adapted": {"target_modules": [*ALL, "embed_tokens"]},
    "both adapted": {"target_modules": ["lm_head", "embed_tokens"]},
    "embedding trained": {"target_modules": ALL, "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plain_lora_says_what_it_said_unmerged(base: Path, tmp_path: Path, variant: str) -> None:
    """Also where embedding and output layer were one tensor and the adapter changes one of them: then they part."""
    unmerged = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    expected = logits(unmerged)
    merge(spec(base, tmp_path / "adapter", tmp_path / "out", dtype="float32"), quiet)
    merged = load(tmp_path / "out").float()
    original = logits(load(base))
    far = float((original - expected).abs().max())
    assert far > 0.05
    assert float((logits(merged) - expected).abs().max()) < 0.1 * far
    parted = load(base).config.tie_word_embeddings and (
        "head" in variant or "embedding" in variant or "both" in variant
    )
    assert parted == (load(base).config.tie_word_embeddings and not merged.config.tie_word_embeddings)


def test_four_bits_round_as_in_training(base: Path, tmp_path: Path) -> None:
    """Merged onto NF4 is what the 4-bit model with the adapter says; merged onto the original is something else."""
    make_adapter(base, tmp_path / "adapter")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    four = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    trained = logits(peft.PeftModel.from_pretrained(four, tmp_path / "adapter").eval())
    distance = {}
    for onto in ("nf4", "original"):
        merge(spec(base, tmp_path / "adapter", tmp_path / onto, onto=onto, dtype="float32"), quiet)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32).eval()
        distance[onto] = float((logits(model) - trained).abs().mean())
    assert distance["nf4"] < 0.2 * distance["original"]
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(
        load_file(tmp_path / "nf4" / "model.safetensors")["model.embed_tokens.weight"],
        load_file(base / "model.safetensors")["model.embed_tokens.weight"].float(),
    )
    assert weight in load_file(tmp_path / "nf4" / "model.safetensors")


# ------------------------------------------------------------------------------------------- what lies beside them
def test_the_folder_is_a_whole_model(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(tmp_path / "adapter")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/secret", "torch_dtype": "x"}))
    (copy / "chat_template.jinja").write_text("the base's")
    (copy / "tokenizer.model").write_bytes(b"sentencepiece")
    (copy / "modeling_own.py").write_text("raise SystemExit")
    (copy / "LICENSE.txt").write_text("terms")
    (copy / "pytorch_model.bin").write_bytes(b"old weights")
    merge(spec(copy, tmp_path / "adapter", tmp_path / "out"), quiet)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.model", "modeling_own.py", "LICENSE.txt", "generation_config.json", "README.md"} <= names
    assert "pytorch_model.bin" not in names and "adapter_config.json" not in names
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    written = json.loads((out / "config.json").read_text())
    assert "_name_or_path" not in written and written["dtype"] == written["torch_dtype"] == "bfloat16"
    card = (out / "README.md").read_text()
    assert "base_model: org/base" in card and "rank 4" in card and "bfloat16" in card
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_our_own_run_merges(text: Path, tmp_path: Path) -> None:
    from test_train_finetune import tune
    from train_tools import make_run

    base = make_model(tmp_path / "base", text)
    tune(make_run(base, text), tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    merge(spec(base, adapter, tmp_path / "out"), quiet)
    expected = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_every_tensor_has_the_dtype_asked_for(base: Path, tmp_path: Path, dtype: str, kind: str) -> None:
    make_adapter(base, tmp_path / "adapter")
    merge(spec(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype), quiet)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {kind}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_progress_reaches_the_end(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEWS_S", 0.0)
    make_adapter(base, tmp_path / "adapter")
    heard: list[dict[str, Any]] = []
    merge(spec(base, tmp_path / "adapter", tmp_path / "out"), lambda event, **f: heard.append({"event": event, **f}))
    start = next(e for e in heard if e["event"] == "start")
    tensors = [e for e in heard if e["event"] == "tensor"]
    assert len(tensors) == start["tensors"] and start["merged"] == 14
    assert [e["done_bytes"] for e in tensors] == sorted({e["done_bytes"] for e in tensors})
    assert tensors[0]["eta_s"] is None and tensors[-1]["eta_s"] >= 0
    assert start["total_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------------ refusals
def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def adapter_edit(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda base, adapter: edit(adapter / "adapter_config.json", **changes)


def tensors_edit(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Path], None]:
    def apply(base: Path, adapter: Path) -> None:
        save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "dora": (adapter_edit(use_dora=True), "uses use_dora: it is no plain LoRA"),
    "tokens": (adapter_edit(trainable_token_indices=[1]), "uses trainable_token_indices"),
    "of the future": (adapter_edit(use_something_new={"a": 1}), "uses use_something_new"),
    "pissa": (adapter_edit(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "ia3": (adapter_edit(peft_type="IA3"), "is of a IA3 adapter"),
    "alpha": (adapter_edit(lora_alpha="16"), "lora_alpha that is no number"),
    "no config": (lambda base, adapter: (adapter / "adapter_config.json").write_text("[]"), "nameless adapter"),
    "no weights": (lambda base, adapter: (adapter / "adapter_model.safetensors").unlink(), "no adapter_model.safetens"),
    "torn": (
        lambda base, adapter: (adapter / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(20)),
        "no whole safetensors file",
    ),
    "half a pair": (
        tensors_edit(lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}),
        "lora_A.weight is of no kind that can be merged",
    ),
    "magnitudes": (
        tensors_edit(lambda t: {**t, f"{Q}.lora_magnitude_vector": torch.ones(4)}),
        "lora_magnitude_vector is of no kind",
    ),
    "another layer": (
        tensors_edit(lambda t: {k.replace("layers.0.", "layers.7."): v for k, v in t.items()}),
        r"layers\.7\..*\.weight, which the base does not hold",
    ),
    "another width": (
        tensors_edit(lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 64)}),
        "is for a weight of 128 x 64, the base has 128 x 128",
    ),
    "ranks differ": (
        tensors_edit(lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(3, 128)}),
        "are no two low-rank matrices",
    ),
    "resized": (
        tensors_edit(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(600, 128)}),
        "embed_tokens.weight is 600 x 128, the base has 512 x 128",
    ),
    "twice": (
        tensors_edit(lambda t: {**t, f"{Q}.weight": torch.ones(128, 128)}),
        "two parts of the adapter change model.layers.0.self_attn.q_proj.weight",
    ),
    "quantised base": (
        lambda base, adapter: edit(base / "config.json", quantization_config={"quant_method": "gptq"}),
        r"are quantised \(gptq\)",
    ),
    "no base weights": (lambda base, adapter: (base / "model.safetensors").unlink(), "holds no model.safetensors"),
    "an index that leads out": (
        lambda base, adapter: (base / shards.INDEX).write_text('{"weight_map": {"a": "../x"}}'),
        "is not an index",
    ),
    "a shard that is missing": (
        lambda base, adapter: (base / shards.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "holds no b.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_merged_is_one_sentence(text: Path, tmp_path: Path, case: str) -> None:
    base = make_model(tmp_path / "base", text, num_hidden_layers=1)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    spoil, sentence = BAD[case]
    spoil(base, tmp_path / "adapter")
    with pytest.raises(InputError, match=sentence) as error:
        merge(spec(base, tmp_path / "adapter", tmp_path / "out"), quiet)
    assert "\n" not in error.value.message
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("factor", "dtype", "hint"), [(float("nan"), "bfloat16", "diverge"), (1e6, "float16", "bfloat16")]
)
def test_numbers_that_are_none_are_not_written(
    base: Path, tmp_path: Path, factor: float, dtype: str, hint: str
) -> None:
    make_adapter(base, tmp_path / "adapter")
    tensors_edit(lambda t: {k: v * factor if k == f"{Q}.lora_B.weight" else v for k, v in t.items()})(
        base, tmp_path / "adapter"
    )
    with pytest.raises(VramplanError, match=r"q_proj\.weight would hold numbers that are none") as error:
        merge(spec(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype), quiet)
    assert error.value.exit_code == 1 and hint in error.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_room_is_looked_for_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    monkeypatch.setattr(module, "write_checkpoint", None)
    with pytest.raises(VramplanError, match=r"the result needs .*, .* has 976.6 KiB free") as error:
        merge(spec(base, tmp_path / "adapter", tmp_path / "out"), quiet)
    assert error.value.exit_code == 1 and not (tmp_path / "out").exists()


def test_a_base_that_is_nowhere(tmp_path: Path, base: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="there is no folder /nowhere/base"):
        merge(spec(Path("/nowhere/base"), tmp_path / "adapter", tmp_path / "out"), quiet)


def test_a_layer_is_never_taken_for_another() -> None:
    names = ["model.layers.1.mlp.up.weight", "vision.layers.0.q.weight", "text.layers.0.q.weight", "h.3.attn.weight"]
    find = Locator(names).find
    assert find("model.layers.1.mlp.up.weight") == find("layers.1.mlp.up.weight") == names[0]
    assert find("transformer.h.3.attn.weight") == "h.3.attn.weight"
    assert find("base.model.layers.1.mlp.up.weight") == names[0]
    assert find("model.layers.0.mlp.up.weight") is None  # only layer 1 has one
    assert find("transformer.h.33.attn.weight") is None
    assert find("lm_head.weight") is None
    with pytest.raises(InputError, match=r"could be vision.* or text"):
        find("model.layers.0.q.weight")


# ------------------------------------------------------------------------------------------------------ the files
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    kinds=st.lists(st.sampled_from(sorted(DTYPES)), min_size=8, max_size=8),
    limit=st.integers(1, 400),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], kinds: list[str], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(DTYPES[kind])
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert [entry.bytes for entry in entries] == [tensor.nbytes for tensor in tensors.values()]
    parts = in_shards(entries, limit)
    assert [entry for part in parts for entry in part] == entries
    assert all(len(part) == 1 or sum(e.bytes for e in part) <= limit for part in parts)
    assert write_checkpoint(folder, entries, limit, lambda entry: tensors[entry.name]) == len(parts)
    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


MEASURE = """
import json, sys, threading, time
import huggingface_hub.repocard, torch
from vramplan.core.types import MergeSpec
from vramplan.train import merge

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, over = [anonymous()], threading.Event()
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
before = anonymous()
thread.start()
merge.merge(MergeSpec(**json.loads(sys.argv[1])), lambda event, **fields: None)
over.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    """A base of 250 MB in one file of 60 weights; beside some tensors the C library keeps freed ones for a while."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(60)]
    weight = torch.randn(1024, 2048).to(torch.bfloat16)
    save_file({f"{name}.weight": weight.clone() for name in names}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    low = {"lora_A": torch.ones(4, 2048), "lora_B": torch.ones(1024, 4)}
    save_file(
        {f"base_model.model.{name}.{part}.weight": low[part].clone() for name in names for part in low},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8, "r": 4}')
    request = {"adapter": str(adapter), "base": str(base), "base_name": "b", "output": str(tmp_path / "out")}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(request)], capture_output=True, text=True, check=True
    )
    used = int(run.stdout.split()[-1])
    assert used < 100 * 10**6
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 240 * 10**6


# ---------------------------------------------------------------------------------------- the process, from outside
def test_a_merge_by_the_launcher(base: Path, tmp_path: Path) -> None:
    from vramplan.launch.merging import merge as launch

    make_adapter(base, tmp_path / "adapter")
    heard: list[dict[str, Any]] = []
    outcome = launch(spec(base, tmp_path / "adapter", tmp_path / "out"), heard.append)
    assert (outcome.exit_code, outcome.ended) == (0, "finished"), outcome
    assert re.fullmatch(r"14 of \d+ tensors merged, .* in one file of .*/out", outcome.message)
    assert heard[0]["event"] == "start"
    assert load(tmp_path / "out") is not None
    bad = launch(spec(base, tmp_path / "adapter", tmp_path / "out2", dtype="int8"))
    assert (bad.exit_code, bad.ended) == (2, "error") and "int8 is not a dtype" in bad.message


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_an_end_in_the_middle_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The process waits at its second tensor, in the middle of a file; Ctrl-C or SIGKILL finds it there."""
    from vramplan.launch import merging

    script = (
        "import os, signal, sys, time\nfrom vramplan.train import merge, shards\n"
        "stock = merge.Plan.make\n"
        "def make(self, entry):\n"
        "    if self._used:\n"
        f"        {'time.sleep(60)' if how == 'interrupt' else 'os.kill(os.getpid(), signal.SIGKILL)'}\n"
        "    return stock(self, entry)\n"
        "merge.Plan.make, merge.NEWS_S = make, 0.0\nsys.exit(merge.main())"
    )
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(merging, "COMMAND", (sys.executable, "-c", script))
    parts = tmp_path / ".tmp-out"

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "tensor" and event["done_bytes"] and how == "interrupt":
            assert parts.is_dir()
            raise KeyboardInterrupt

    outcome = merging.merge(spec(base, tmp_path / "adapter", tmp_path / "out"), on_event)
    if how == "interrupt":
        assert (outcome.exit_code, outcome.ended) == (130, "interrupted")
    else:
        assert outcome.exit_code == 1 and "SIGKILL" in outcome.message
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
