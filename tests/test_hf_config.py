"""Reading a config.json: every family against transformers itself, and hostile input against one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vramplan.core.architecture import total_parameters
from vramplan.core.types import ModelSpec
from vramplan.errors import InputError, UnknownArchitecture, VramplanError
from vramplan.sources import hf_config, hub, profiles
from vramplan.sources.families import FAMILIES
from vramplan.sources.hf_config import load_model, parse_config, raw_config

SMALLEST = {"hidden_size": 2304, "num_hidden_layers": 5}  # all other fields: the family's defaults

# Small models, one or more a family, whose every field differs from its neighbours and from the defaults.
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 320}
GQA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}
VARIANTS: list[dict[str, Any]] = [
    {"model_type": "llama", **GQA},
    {"model_type": "llama", **GQA, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    {"model_type": "llama", **GQA, "tie_word_embeddings": True},
    {"model_type": "mistral", **GQA, "head_dim": 32},
    {"model_type": "mistral", **GQA, "sliding_window": None},
    {"model_type": "qwen2", **GQA},
    {"model_type": "qwen2", **GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    {"model_type": "qwen3", **GQA, "attention_bias": True, "attention_dropout": 0.1},
    {"model_type": "gemma", **GQA},
    {"model_type": "gemma2", **GQA, "head_dim": 16, "attn_logit_softcapping": None},
    {"model_type": "gemma3_text", **GQA, "head_dim": 16, "sliding_window": 32},
    {"model_type": "gemma3_text", **GQA, "layer_types": ["full_attention", "sliding_attention"] * 2},
    {"model_type": "phi3", **GQA, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1, "pad_token_id": 0},
    {"model_type": "phi3", **GQA, "sliding_window": 64, "pad_token_id": 0},
    {"model_type": "olmo2", **GQA, "attention_bias": True},
    {"model_type": "smollm3", **GQA, "pad_token_id": 0},
    {"model_type": "smollm3", **GQA, "use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1, 1, 1],
     "pad_token_id": 0},
    {"model_type": "granite", **GQA, "residual_multiplier": 0.22, "logits_scaling": 8, "mlp_bias": True},
    {"model_type": "starcoder2", **GQA, "embedding_dropout": 0.1, "residual_dropout": 0.2, "sliding_window": 4096},
    {"model_type": "starcoder2", **GQA, "use_bias": False, "tie_word_embeddings": False},
    {"model_type": "stablelm", **GQA, "use_qkv_bias": True},
    {"model_type": "stablelm", **GQA, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    {"model_type": "cohere", **GQA, "attention_bias": True},
    {"model_type": "cohere", **GQA, "use_qk_norm": True},
    {"model_type": "cohere2", **GQA, "sliding_window": 128},
    {"model_type": "phi", **TINY, "partial_rotary_factor": 0.25, "resid_pdrop": 0.1, "embd_pdrop": 0.2},
    {"model_type": "olmo", **GQA, "clip_qkv": 8.0},
    {"model_type": "olmo3", **GQA, "sliding_window": 128},
    {"model_type": "glm", **GQA, "head_dim": 32, "pad_token_id": 0},
    {"model_type": "glm4", **GQA, "attention_bias": False, "pad_token_id": 0},
    {"model_type": "exaone4", **GQA, "sliding_window": 128, "sliding_window_pattern": 2},
    {"model_type": "exaone4", **GQA, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    {"model_type": "seed_oss", **GQA, "residual_dropout": 0.0},
    {"model_type": "ministral", **GQA, "sliding_window": 128, "head_dim": 16},
    {"model_type": "gpt_neox", **TINY, "intermediate_size": 96, "hidden_dropout": 0.1, "rotary_pct": 0.5},
    {"model_type": "gpt_neox", **TINY, "attention_bias": False, "use_parallel_residual": False},
    {"model_type": "falcon", **TINY},
    {"model_type": "falcon", **TINY, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    {"model_type": "falcon", **TINY, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2},
    {"model_type": "falcon", **TINY, "parallel_attn": False, "multi_query": False, "ffn_hidden_size": 96},
    {"model_type": "mixtral", **GQA, "num_local_experts": 4},
    {"model_type": "qwen3_moe", **GQA, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32,
     "num_experts_per_tok": 2},
]  # fmt: skip


def parse(config: dict[str, Any]) -> ModelSpec:
    return parse_config(config, name="tiny", source="tiny/config.json")


def sizes_in_transformers(config: Any) -> dict[str, Any]:
    """The same facts as attributes of the config class; names differ a little from family to family."""

    def get(*names: str) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    heads = config.num_attention_heads
    kv_heads = get("num_kv_heads", "num_key_value_heads") or heads
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        kv_heads = 1 if config.multi_query else heads
    fixed = config.model_type in ("gpt_neox", "falcon", "stablelm")
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": config.hidden_size // heads if fixed else get("head_dim") or config.hidden_size // heads,
        "intermediate_size": get("ffn_hidden_size", "intermediate_size"),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": config.attention_dropout,
        "partial_rotary_factor": (config.rope_parameters or {}).get("partial_rotary_factor", 1.0),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "num_experts": get("num_local_experts", "num_experts") or 0,
        "num_experts_per_token": get("num_experts_per_tok") or 0,
        "residual_multiplier": get("residual_multiplier"),
    }


def config_of(fields: dict[str, Any]) -> Any:
    auto = pytest.importorskip("transformers").AutoConfig
    return auto.for_model(**fields)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    fields: dict[str, Any] = {"model_type": model_type, **SMALLEST}
    if model_type == "falcon":
        fields["num_attention_heads"] = 72  # the default, 71, does not divide 2304
    compare(fields)


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: fields["model_type"])
def test_fields_are_those_of_transformers(fields: dict[str, Any]) -> None:
    compare(fields)


def compare(fields: dict[str, Any]) -> None:
    config, spec = config_of(fields), parse(fields)
    expected = sizes_in_transformers(config)
    assert {name: getattr(spec, name) for name in expected} == expected
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation
    assert spec.activation == {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)
    dropouts = ("residual_dropout", "resid_pdrop", "hidden_dropout")
    assert spec.residual_dropout == next((getattr(config, n) for n in dropouts if hasattr(config, n)), 0.0)
    embedding = {"gpt_neox": "hidden_dropout", "phi": "embd_pdrop"}.get(spec.model_type, "embedding_dropout")
    assert spec.embedding_dropout == getattr(config, embedding, 0.0)
    always = spec.model_type in ("cohere", "cohere2", "phi")
    parallel = getattr(config, "use_parallel_residual", getattr(config, "parallel_attn", always))
    assert spec.parallel_residual is parallel
    assert_windows(spec, config)
    rope = getattr(config, "no_rope_layers", None) or [1] * spec.num_layers
    if spec.model_type in ("cohere2", "exaone4") and config.sliding_window is not None:
        rope = [int(kind == "sliding_attention") for kind in config.layer_types]
    assert list(spec.rope_layers or (1,) * spec.num_layers) == list(rope)


def assert_windows(spec: ModelSpec, config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * spec.num_layers
    if "sliding_attention" in types and window is not None:
        assert (spec.layer_types, spec.sliding_window) == (tuple(types), window)
    else:
        assert (spec.layer_types, spec.sliding_window) == ((), None)


# ------------------------------------------------------------------------- the real modules, without their weights
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: fields["model_type"])
def test_the_modules_are_those_of_transformers(fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, spec = config_of(fields), parse(fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == spec.architecture
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layer = {name.split(".3.", 1)[1]: shape for name, shape in shapes.items() if ".3." in name}

    def bias_of(*names: str) -> bool:
        present = {
            any(f".{name}.bias" in f".{key}" for key in layer) for name in names if f".{name}." in "." + ".".join(layer)
        }
        assert len(present) == 1, (names, sorted(layer))
        return present.pop()

    qkv = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
    assert bias_of(*qkv) is spec.qkv_bias
    assert bias_of("o_proj", "self_attention.dense", "attention.dense", "self_attn.dense") is spec.attention_out_bias
    assert any(key.endswith(("qkv_proj.weight", "query_key_value.weight")) for key in layer) is spec.fused_qkv
    if not spec.num_experts:
        mlp = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h",
               "fc1", "fc2")  # fmt: skip
        assert bias_of(*mlp) is spec.mlp_bias
        assert ("mlp.gate_proj.weight" in layer or spec.fused_gate_up) is spec.gated_mlp
        assert ("mlp.gate_up_proj.weight" in layer) is spec.fused_gate_up
    head_norm = layer.get("self_attn.q_norm.weight")
    widths = {"none": None, "head": (spec.head_dim,), "full": (spec.num_heads * spec.head_dim,)}
    if spec.model_type == "cohere":  # a weight for every head
        widths["head"] = (spec.num_heads, spec.head_dim)
    assert head_norm == widths[spec.qk_norm]
    norms = [
        key for key in layer if ("norm" in key or key.startswith("ln_")) and "q_norm" not in key and "k_norm" not in key
    ]
    if spec.norm == "plain_layernorm":
        assert not norms
        norms = ["input_layernorm."]
    count = (
        0
        if spec.norm == "plain_layernorm"
        else {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[spec.norm_placement]
    )
    assert len([key for key in norms if key.endswith("weight")]) == count
    assert any(key.startswith(("input_layernorm", "ln_attn")) for key in norms) is (spec.norm_placement != "post")
    assert any(key.endswith("bias") for key in norms) is spec.norm_bias
    norm_class = next(
        type(m).__name__ for n, m in model.named_modules() if n.endswith(tuple(norms[0].rsplit(".", 1)[:1]))
    )
    kind = "layernorm" if "LayerNorm" in norm_class else "gemma_rmsnorm" if "Gemma" in norm_class else "rmsnorm"
    kind = {"CohereLayerNorm": "cohere_layernorm", "Cohere2LayerNorm": "cohere_layernorm",
            "OlmoLayerNorm": "plain_layernorm"}.get(norm_class, kind)  # fmt: skip
    assert kind == spec.norm
    assert ("lm_head.weight" not in shapes) is spec.tie_word_embeddings
    assert ("lm_head.bias" in shapes) is spec.lm_head_bias
    assert sum(p.numel() for p in model.parameters()) == total_parameters(spec)


# ------------------------------------------------------------------------------------------------- hostile configs
LLAMA = {"model_type": "llama", **GQA}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "4096"}, "hidden_size must be a whole number, not '4096'"),
        ({"hidden_size": True}, "hidden_size must be a whole number, not true"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number, not 64.0"),
        ({"hidden_size": float("nan")}, "hidden_size must be a whole number, not nan"),
        ({"hidden_size": [64]}, "hidden_size must be a whole number, not a list"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size must be from 1 to 131072, not 0"),
        ({"hidden_size": -64}, "hidden_size must be from 1 to 131072, not -64"),
        ({"hidden_size": 2**17 + 1}, "hidden_size must be from 1 to 131072"),
        ({"hidden_size": 10**4000}, "not a huge number"),
        ({"num_hidden_layers": 2**12 + 1}, "num_hidden_layers must be from 1 to 4096"),
        ({"num_attention_heads": 2**12 + 1}, "num_attention_heads must be from 1 to 4096"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be from 1 to 16777216"),
        ({"head_dim": 0}, "head_dim must be from 1"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 does not divide num_attention_heads 4"),
        ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({"attention_dropout": "0.1"}, "attention_dropout must be a number, not '0.1'"),
        ({"attention_dropout": float("nan")}, "attention_dropout must be from 0 to 0.99, not nan"),
        ({"attention_dropout": float("inf")}, "attention_dropout must be from 0 to 0.99"),
        ({"attention_dropout": 1}, "attention_dropout must be from 0 to 0.99, not 1"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"hidden_act": 3}, "hidden_act must be one of"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"model_type": "gemma2", "layer_types": ["linear"] * 4}, "each entry of layer_types must be one of"),
        ({"model_type": "gemma2", "layer_types": "full_attention"}, "layer_types must be a list"),
        ({"model_type": "gemma2", "final_logit_softcapping": float("inf")}, "final_logit_softcapping must be from"),
        ({"model_type": "smollm3", "no_rope_layers": [True] * 4}, "each entry of no_rope_layers"),
        ({"model_type": "phi3", "rope_scaling": {"partial_rotary_factor": 2}}, "partial_rotary_factor must be from"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "mix of dense and expert layers"),
        ({"model_type": "falcon", "alibi": True}, "alibi (Falcon-RW) is not supported"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already (gptq)"),
    ],
)
def test_impossible_fields_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse({**LLAMA, **changes})
    message = caught.value.message
    assert said in message and message.startswith("tiny/config.json: ")
    assert "\n" not in message and len(message) < 250 and caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["gpt2", "nemotron", "", 7, ["llama"], "x" * 10_000])
def test_an_unknown_architecture_is_never_guessed(value: Any) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        parse({**LLAMA, "model_type": value})
    assert "llama" in caught.value.hint and "--trace" in caught.value.hint and len(caught.value.message) < 200


def test_a_vision_model_is_refused_as_such() -> None:
    with pytest.raises(UnknownArchitecture, match="has a vision or audio part"):
        parse({"model_type": "qwen2_5_vl", "text_config": LLAMA, "vision_config": {}})


def test_gemma_3_with_a_vision_tower_is_read_as_its_language_model() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    spec = parse({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    assert (spec.model_type, spec.architecture, spec.vocab_size) == ("gemma3_text", "Gemma3ForCausalLM", 262208)


def test_a_4_bit_bitsandbytes_checkpoint_is_what_qlora_makes_itself() -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert parse({**LLAMA, **quantised}) == parse(LLAMA)


# ----------------------------------------------------------------------------------------------------- finding one
def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_file_and_its_folder_give_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = write(folder / "config.json", json.dumps(LLAMA))
    of_folder, of_file = load_model(str(folder)), load_model(str(file))
    assert of_folder.name == of_file.name == "my-model"
    assert (of_folder.source, of_file.source) == (str(folder), str(file))
    assert raw_config(str(folder)) == LLAMA
    other = write(tmp_path / "other.json", json.dumps(LLAMA))
    assert load_model(str(other)).name == "other"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"model_type": "llama", "hidden_size": 1e999, "num_hidden_layers": 2}', "hidden_size must be a whole number"),
        ('{"model_type": "llama", "hidden_size": NaN, "num_hidden_layers": 2}', "hidden_size must be a whole number"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "a number is too long"),
    ],
)
def test_a_hostile_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = write(tmp_path / "config.json", content)
    with pytest.raises(InputError, match=said) as caught:
        load_model(str(file))
    assert str(file) in caught.value.message or f"config.json of {tmp_path.name}" in caught.value.message


def test_an_oversized_file_and_a_gguf_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_config, "MAX_CONFIG_BYTES", 2**20)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        load_model(str(write(tmp_path / "config.json", " " * (2**20 + 1))))
    gguf = write(tmp_path / "model.gguf", "GGUF")
    with pytest.raises(InputError, match="is a GGUF file") as caught:
        load_model(str(gguf))
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("llama-2-8b", "unknown model 'llama-2-8b'", "did you mean llama-"),
        ("zzzzzz", "unknown model 'zzzzzz'", "vramplan models"),
        ("", "name is empty", ""),
        ("a\0b", "not text", ""),
        ("no/such/config.json", "no such file or folder", ""),
        ("./nowhere", "no such file or folder", ""),
        ("nowhere.json", "no such file or folder", ""),
        ("nowhere.gguf", "no such file", ""),
        ("x" * 5000, "unknown model", ""),
    ],
)
def test_a_wrong_name_is_explained(name: str, said: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name)
    assert said in caught.value.message and hint in caught.value.hint


def test_a_folder_without_a_config_hides_no_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-2-7b").mkdir()
    assert load_model("llama-2-7b").source == "built-in"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no config"):
        load_model("empty")


@pytest.mark.parametrize("name", ["llama-2-7b", "Llama-2-7B", "meta-llama/Llama-2-7b-hf", "META-LLAMA/llama-2-7B-HF"])
def test_built_ins_need_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch_config", lambda repo: pytest.fail(f"asked the Hub for {repo}"))
    spec = load_model(name)
    assert (spec.name, spec.source, spec.num_layers) == ("llama-2-7b", "built-in", 32)
    assert raw_config(name) == profiles.model_profile("llama-2-7b")["config"]


def test_remote_code_is_not_planned_for(tmp_path: Path) -> None:
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}
    file = str(write(tmp_path / "config.json", json.dumps(config)))
    assert load_model(file).model_type == "llama"
    with pytest.raises(UnknownArchitecture, match="brings its own modelling code"):
        load_model(file, trust_remote_code=True)


# --------------------------------------------------------------------------------------------------------- the Hub
def fake_hub(monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any], download: Callable[..., Any]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return raise_it


def hub_error(name: str, status: int) -> Exception:
    """A real exception of huggingface_hub, made the way it makes them."""
    import httpx
    from huggingface_hub import errors

    request = httpx.Request("HEAD", "https://huggingface.co/org/name/resolve/main/config.json")
    made: Exception = getattr(errors, name)("multi\nline", response=httpx.Response(status, request=request))
    return made


@pytest.mark.parametrize(
    ("error", "kind", "said", "hint"),
    [
        (("GatedRepoError", 403), InputError, "org/name is gated on the Hub", "HF_TOKEN"),
        (("RepositoryNotFoundError", 401), InputError, "neither a file here nor a repository", "HF_TOKEN"),
        (("RemoteEntryNotFoundError", 404), InputError, "has no config.json", "config.json"),
        (("HfHubHTTPError", 401), InputError, "refused the token", "HF_TOKEN"),
        (
            ("HfHubHTTPError", 503),
            VramplanError,
            "Hub unreachable: could not get config.json of org/name (answered 503)",
            "",
        ),
    ],
)
def test_what_the_hub_answers_is_told_in_one_sentence(
    error: tuple[str, int], kind: type, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    fake_hub(monkeypatch, raising(hub_error(*error)), raising(LocalEntryNotFoundError("not cached")))
    with pytest.raises(kind) as caught:
        load_model("org/name")
    assert type(caught.value) is kind and said in caught.value.message and hint in caught.value.hint
    assert "\n" not in caught.value.message and "built-in name" in caught.value.hint


@pytest.mark.parametrize("broken", ["connect", "timeout", "offline", "os"])
def test_an_unreachable_hub_is_named_at_once(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    error = {
        "connect": httpx.ConnectError("no route"),
        "timeout": httpx.ConnectTimeout("slow"),
        "offline": OfflineModeIsEnabled("offline"),
        "os": ConnectionRefusedError(111, "refused"),
    }[broken]
    asked: list[bool] = []

    def download(*_args: Any, local_files_only: bool, **_kwargs: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not cached")

    fake_hub(monkeypatch, raising(error), download)
    with pytest.raises(VramplanError, match="Hub unreachable") as caught:
        load_model("org/name")
    assert asked == [True]  # the cache was looked into, the network not asked again
    assert caught.value.exit_code == 1 and "config.json" in caught.value.hint


def test_the_cache_serves_when_the_hub_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    cached = write(tmp_path / "config.json", json.dumps(LLAMA))
    fake_hub(monkeypatch, raising(httpx.ConnectError("no route")), lambda *_a, **_k: str(cached))
    spec = load_model("org/name")
    assert (spec.name, spec.source, spec.hidden_size) == ("org/name", "org/name", 64)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(hub, "DEADLINE_S", 0.05)
    fake_hub(monkeypatch, lambda *_a, **_k: never.wait(30), lambda *_a, **_k: "unused")
    with pytest.raises(VramplanError, match=r"no answer in 0.05 s"):
        load_model("org/name")
    never.set()


def test_a_bad_config_on_the_hub_names_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = write(tmp_path / "config.json", json.dumps({**LLAMA, "hidden_size": -1}))
    fake_hub(monkeypatch, lambda *_a, **_k: None, lambda *_a, **_k: str(cached))
    with pytest.raises(InputError, match=r"config.json of org/name: hidden_size must be from 1"):
        load_model("org/name")
