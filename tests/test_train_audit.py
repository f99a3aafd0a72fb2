"""The audit after loading: it adds up, it agrees with the plan, and each cause that can be provoked is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from peft import LoraConfig, get_peft_model  # noqa: E402
from train_tools import make_model, make_run, make_text  # noqa: E402

from vramplan.core.ledger import estimate  # noqa: E402
from vramplan.core.types import Ledger, Levers, RunSpec  # noqa: E402
from vramplan.sources import records  # noqa: E402
from vramplan.sources.hf_config import load_model as load_spec  # noqa: E402
from vramplan.train.audit import audit, read_prediction  # noqa: E402
from vramplan.train.audit_causes import Loaded, float32_names  # noqa: E402
from vramplan.train.fast.install import uninstalled  # noqa: E402
from vramplan.train.load import load_model  # noqa: E402
from vramplan.train.lora import add_lora, fuse, prepare  # noqa: E402

CPU = torch.device("cpu")
VOCAB, HIDDEN, INTERMEDIATE, LAYERS = 512, 128, 256, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    return make_model(root / "model", make_text(root / "text.jsonl"))


@pytest.fixture(scope="module")
def prediction(tiny: Path) -> Ledger:
    return estimate(load_spec(str(tiny)), make_run(tiny, tiny))


def found(
    run: RunSpec,
    ledger: Ledger | None = None,
    *,
    load: Callable[[Any], None] = lambda model: None,
    after: Callable[[Any], Any] = lambda model: None,
) -> dict[str, Any]:
    """The audit of a run whose model was changed right after loading, or after preparing (or replaced there)."""
    model = load_model(run, str(run.model_path), CPU)
    load(model)
    wide = float32_names(model)
    model = add_lora(prepare(model, run.levers, CPU, print), run.lora)
    with uninstalled(fuse(model, run.levers, CPU, print)):
        other = after(model)
        if other is None:
            return audit(Loaded(model, run, CPU, ledger, wide))
    with uninstalled(fuse(other, run.levers, CPU, print)):
        return audit(Loaded(other, run, CPU, ledger, wide))


def causes(event: dict[str, Any]) -> dict[int | None, dict[str, Any]]:
    return {finding["cause"]: finding for finding in event["findings"]}


def test_what_is_there_adds_up_and_is_what_was_planned(tiny: Path, prediction: Ledger) -> None:
    event = found(make_run(tiny, tiny), prediction)
    assert event["findings"] == []
    assert event["counted_bytes"] == sum(row["bytes"] for row in event["rows"])
    assert event["planned_bytes"] == sum(row["planned_bytes"] for row in event["rows"])
    for row in event["rows"]:
        assert row["bytes"] == sum(row["dtypes"].values())
    sizes = {row["key"]: (row["bytes"], row["planned_bytes"]) for row in event["rows"]}
    for key in ("weights.nf4", "weights.constants", "weights.embeddings", "weights.lm_head", "adapter.lora"):
        assert sizes[key][0] == sizes[key][1] > 0, key
    assert {row["key"]: list(row["dtypes"]) for row in event["rows"]}["weights.constants"] == ["uint8", "float32"]
    # the same without a plan: counted, and nothing beside it
    bare = found(make_run(tiny, tiny))
    assert bare["counted_bytes"] == event["counted_bytes"]
    assert {row["planned_bytes"] for row in bare["rows"]} == {None}
    assert "planned_bytes" not in bare


def test_all_of_the_model_is_counted(tiny: Path) -> None:
    model = add_lora(
        prepare(load_model(make_run(tiny, tiny), str(tiny), CPU), Levers(), CPU, print), make_run(tiny, tiny).lora
    )
    event = audit(Loaded(model, make_run(tiny, tiny), CPU, None, frozenset()))
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert event["counted_bytes"] >= sum(parameters.values())


# --------------------------------------------------------------------------------------------------- the causes
def test_2_checkpointing_off(tiny: Path, prediction: Ledger) -> None:
    event = found(
        make_run(tiny, tiny), prediction, after=lambda model: model.get_base_model().gradient_checkpointing_disable()
    )
    finding = causes(event)[2]
    assert "is off" in finding["message"]
    bare = estimate(
        prediction.model, replace(prediction.run, levers=replace(prediction.run.levers, checkpointing="none"))
    )
    assert finding["bytes"] == bare.peak.allocated_bytes - prediction.peak.allocated_bytes > 0


def test_2_checkpointing_on_but_inactive(tiny: Path) -> None:
    def reentrant(model: Any) -> None:
        base = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.disable_input_require_grads()

    def with_inputs(model: Any) -> None:
        reentrant(model)
        model.get_base_model().enable_input_require_grads()

    run = replace(make_run(tiny, tiny), levers=Levers(checkpointing="none"))  # its hooks would stay
    run_asking = replace(run, levers=Levers())
    model = add_lora(prepare(load_model(run, str(tiny), CPU), run.levers, CPU, print), run.lora)
    reentrant(model)
    assert "inactive" in causes(audit(Loaded(model, run_asking, CPU, None, frozenset())))[2]["message"]
    with_inputs(model)
    assert causes(audit(Loaded(model, run_asking, CPU, None, frozenset()))) == {}


def test_no_checkpointing_that_was_asked_for_is_no_finding(tiny: Path) -> None:
    assert found(replace(make_run(tiny, tiny), levers=Levers(checkpointing="none")))["findings"] == []


def test_3_upcast_by_preparing(tiny: Path) -> None:
    run = make_run(tiny, tiny, "peft")
    finding = causes(found(run))
    assert list(finding) == [3]
    norms = (2 * LAYERS + 1) * HIDDEN
    assert finding[3]["bytes"] == 2 * (2 * VOCAB * HIDDEN + norms)
    assert "--upcast none" in finding[3]["fix"]
    assert causes(found(replace(run, levers=replace(run.levers, upcast="norms")))) == {}


def test_9_experts_are_not_quantised(tmp_path: Path) -> None:
    text = make_text(tmp_path / "t")
    changes = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 256, "intermediate_size": 512}
    folder = make_model(tmp_path / "m", text, "MixtralForCausalLM", **changes)
    run = make_run(folder, text)
    event = found(run)
    finding = causes(event)[9]
    experts = LAYERS * 8 * 3 * 256 * 512
    row = next(row for row in event["rows"] if row["key"] == "weights.experts")
    assert row["bytes"] == 2 * experts
    assert 2 * experts * 0.74 < finding["bytes"] < 2 * experts * 0.75  # 16 bits against 4.13
    assert "bfloat16" in finding["message"]


def test_linears_of_another_class_are_not_quantised(tmp_path: Path) -> None:
    text = make_text(tmp_path / "t")
    folder = make_model(tmp_path / "m", text, "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2)
    finding = causes(found(replace(make_run(folder, text), levers=Levers(loss="full"))))
    assert list(finding) == [None]
    assert finding[None]["key"] == "not_quantised"


def test_10_compute_in_float32(tiny: Path) -> None:
    def wide(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = torch.float32

    finding = causes(found(make_run(tiny, tiny), after=wide))
    assert list(finding) == [10]
    assert finding[10]["bytes"] == 2 * HIDDEN * INTERMEDIATE
    assert f"{LAYERS * 7} 4-bit layers" in finding[10]["message"]


def test_11_base_in_float32(tiny: Path) -> None:
    def wide(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()

    finding = causes(found(make_run(tiny, tiny), load=wide))
    assert list(finding) == [11]
    assert finding[11]["bytes"] == 2 * 2 * VOCAB * HIDDEN
    assert "2 matrices" in finding[11]["message"]


@pytest.mark.parametrize("how", ["thawed", "modules_to_save"])
def test_13_embeddings_are_trained(tiny: Path, how: str) -> None:
    def thaw(model: Any) -> Any:
        if how == "thawed":
            model.get_input_embeddings().weight.requires_grad_(True)
            return None
        base = prepare(load_model(run, str(tiny), CPU), run.levers, CPU, print)
        return get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))

    run = replace(make_run(tiny, tiny), levers=Levers(optimizer="adamw_torch"))
    finding = causes(found(run, after=thaw))
    assert list(finding) == [13]
    assert finding[13]["bytes"] == (2 + 8) * VOCAB * HIDDEN  # a bf16 gradient, two float32 moments
    assert "trainable_token_indices" in finding[13]["fix"]


def test_14_split_over_devices(tiny: Path) -> None:
    def split(model: Any) -> None:
        model.get_base_model().hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}

    finding = causes(found(make_run(tiny, tiny), after=split))
    assert list(finding) == [14]
    assert "0, 1, cpu" in finding[14]["message"]


def test_the_prediction_is_read_from_the_run_folder(tmp_path: Path, prediction: Ledger) -> None:
    from factories import make_plan

    assert read_prediction(tmp_path) is None
    plan = make_plan()
    records.write_json(tmp_path / "plan.json", plan)
    assert read_prediction(tmp_path) == plan.ledger
    records.write_json(tmp_path / "prediction.json", prediction)
    assert read_prediction(tmp_path) == prediction
