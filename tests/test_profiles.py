"""The stored cards and models: what ships is sound and sourced, what comes from outside is checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import InputError
from vramplan.sources import profiles

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MIB = 2**20
SHIPPED = sorted((Path(__file__).parent.parent / "profiles" / "gpus").glob("*.toml"))
NUMBERS = [
    "total_bytes",
    "usable_bytes",
    "context_bytes",
    "sm_count",
    "bandwidth_bytes_per_s",
    "bf16_flops_per_s",
    "fp16_flops_per_s",
    "pcie_bytes_per_s",
]
GOOD = """
name = "Card"
compute_capability = "8.9"
total_bytes = 8589934592
usable_bytes = 8000000000
context_bytes = 400000000
"""


@pytest.fixture
def card(tmp_path: Path) -> Any:
    """Write a profile with lines of GOOD replaced or added, and load it."""

    def load(text: str = "", *, without: str = "", good: str = GOOD) -> Any:
        kept = [line for line in good.splitlines() if not (without and line.startswith(without))]
        path = tmp_path / "mine.toml"
        path.write_text("\n".join([*kept, text]), encoding="utf-8")
        return profiles.load_gpu(str(path))

    return load


# --------------------------------------------------------------------------------------------------- what ships
def test_every_card_people_rent_or_own_is_there() -> None:
    expected = """rtx-3060-12gb rtx-3090 rtx-4060 rtx-4060-ti-8gb rtx-4060-ti-16gb rtx-4070 rtx-4070-super rtx-4070-ti
        rtx-4070-ti-super rtx-4080 rtx-4080-super rtx-4090 rtx-5060 rtx-5060-ti-16gb rtx-5070 rtx-5070-ti rtx-5080
        rtx-5090 t4 v100-16gb v100-32gb a10 a10g l4 l40s a40 rtx-a6000 rtx-6000-ada rtx-a4000 a100-40gb a100-80gb
        h100-80gb h100-nvl h200 rtx-pro-6000-blackwell b200"""
    assert set(expected.split()) <= set(profiles.gpu_names())
    assert len(SHIPPED) == len(profiles.gpu_names())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_number_has_a_source_beside_it(path: Path) -> None:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    fields = [field for field in data if field not in ("name", "nvml_names")]
    assert set(NUMBERS) - set(fields) <= {"bf16_flops_per_s"}
    for field in fields:
        source = data[field]["source"]
        assert len(source) > 10, field
        if data[field].get("basis") == "modelled":
            assert source.startswith("modelled: "), field
    assert data["usable_bytes"]["basis"] in ("measured", "modelled")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_card_loads_and_is_plausible(path: Path) -> None:
    gpu = profiles.load_gpu(path.stem)
    assert gpu.key == path.stem
    assert gpu.source == "file"
    reserve = gpu.total_bytes - gpu.usable_bytes
    assert gpu.reserved_bytes == reserve
    assert 200 * MIB < reserve < 0.05 * gpu.total_bytes + 800 * MIB
    assert 400 * MIB <= gpu.context_bytes <= 758 * MIB
    assert (7, 0) <= gpu.compute_capability <= (12, 0)
    assert (gpu.bf16_flops_per_s is None) == (gpu.compute_capability < (8, 0))
    assert gpu.fp16_flops_per_s is not None
    assert gpu.bandwidth_bytes_per_s is not None
    # A dense peak: with sparsity it would exceed what the SMs can do (Hopper: 4096 FLOP a cycle, data-centre
    # Blackwell: 8192, at up to 2 GHz; smaller chips 1024 at up to 2.7 GHz).
    assert gpu.sm_count is not None
    per_sm = {9: 4096, 10: 8192}.get(gpu.compute_capability[0], 2048 if gpu.compute_capability == (8, 0) else 1024)
    assert gpu.fp16_flops_per_s <= gpu.sm_count * per_sm * 2.7e9
    assert {field for field, _ in gpu.sources} >= {"total_bytes", "usable_bytes", "context_bytes"}


@pytest.mark.parametrize(
    ("name", "total_mib", "usable_mib", "basis"),
    [
        ("rtx-4090", 24564, 24081, "measured"),
        ("t4", 15360, 14912, "measured"),
        ("h200", 143771, 143155, "measured"),
        ("rtx-4070", 12282, 11904, "modelled"),  # 12282 x 11910 / 12288, the RTX 3060's reserve
        ("h100-80gb", 81559, 80864, "modelled"),  # 81559 x 81222 / 81920, the A100's
    ],
)
def test_capacities(name: str, total_mib: int, usable_mib: int, basis: str) -> None:
    gpu = profiles.load_gpu(name)
    assert (gpu.total_bytes // MIB, gpu.usable_bytes // MIB, gpu.usable_basis) == (total_mib, usable_mib, basis)


# ------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("rtx_4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Rtx 4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("L4", "l4"),
    ],
)
def test_forgiving_names(said: str, key: str) -> None:
    assert profiles.load_gpu(said).key == key


@pytest.mark.parametrize("key", [path.stem for path in SHIPPED])
def test_every_name_of_every_card_is_its_own(key: str) -> None:
    others = {profiles.normalise(name) for name in profiles.gpu_names() if name != key}
    assert profiles.normalise(key) not in others
    assert profiles.load_gpu(key.replace("-", " ").upper()).key == key


@pytest.mark.parametrize(
    ("said", "near"),
    [("a100", "a100-40gb or a100-80gb"), ("rtx-4091", "rtx-4090"), ("h100", "h100-80gb or h100-nvl"), ("zzz", "")],
)
def test_unknown_card_is_refused_with_the_nearest(said: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        profiles.load_gpu(said)
    assert caught.value.message == f"--gpu {said!r} is not a known card"
    assert near in caught.value.hint
    assert ("did you mean" in caught.value.hint) == bool(near)
    assert "`vramplan gpus` lists them" in caught.value.hint


def test_a_name_of_two_cards_is_refused_with_both() -> None:
    with pytest.raises(InputError, match="could be rtx-4060-ti-16gb or rtx-4060-ti-8gb"):
        profiles.load_gpu("RTX 4060 Ti")


@pytest.mark.parametrize("said", ["", "-", "nvidia", "../../etc/passwd", "\0.toml", "x" * 100_000])
def test_hostile_names(said: str) -> None:
    with pytest.raises(InputError) as caught:
        profiles.load_gpu(said)
    assert len(caught.value.message) < 200


def test_the_driver_name_and_size_find_the_variant() -> None:
    def found(name: str, mib: int) -> str | None:
        gpu = profiles.find_gpu(name, mib * MIB)
        return gpu.key if gpu else None

    assert found("NVIDIA GeForce RTX 4060 Ti", 8188) == "rtx-4060-ti-8gb"
    assert found("NVIDIA GeForce RTX 4060 Ti", 16380) == "rtx-4060-ti-16gb"
    assert found("NVIDIA A40", 49140) == "a40"  # ECC off
    assert found("NVIDIA GeForce RTX 4090 Laptop GPU", 16376) is None
    assert found("NVIDIA A100-SXM4-80GB", 9856) is None  # a MIG slice is not the card


# -------------------------------------------------------------------------------------------------- own files
def test_own_file_by_path_needs_no_sources(card: Any) -> None:
    gpu = card("[sm_count]\nvalue = 24\nsource = 'deviceQuery'")
    assert (gpu.key, gpu.name, gpu.total_bytes, gpu.sm_count) == ("mine", "Card", 2**33, 24)
    assert (gpu.compute_capability, gpu.usable_basis, gpu.bf16_flops_per_s) == ((8, 9), "modelled", None)
    assert gpu.sources == (("sm_count", "deviceQuery"),)


@pytest.mark.parametrize("field", ["name", "compute_capability", "total_bytes", "usable_bytes", "context_bytes"])
def test_missing_field(card: Any, field: str) -> None:
    with pytest.raises(InputError, match=rf"mine\.toml: {field} is missing"):
        card(without=field)


BAD = ["-1", "0", "1.5", "nan", "inf", "'24 GiB'", "true", "[1]", "{ value = -1 }", "{ value = nan }", f"{10**18 + 1}"]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in NUMBERS for value in BAD if (field, value) != ("context_bytes", "0")],
)
def test_bad_numbers_name_file_and_field(card: Any, field: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"mine\.toml: {field}(\.value)? (must be|is missing)"):
        card(f"{field} = {value}" if "[" not in value else f"{field} = {{ value = {value} }}", without=field)


@pytest.mark.parametrize(
    ("text", "without", "message"),
    [
        ("usable_bytes = 9000000000", "usable", "usable_bytes is more than total_bytes"),
        ("context_bytes = 8000000000", "context", "context_bytes leaves nothing"),
        ("compute_capability = 8.9", "compute", 'must be a text such as "8.9"'),
        ("compute_capability = 'ada'", "compute", 'must be a text such as "8.9"'),
        ("name = 5", "name", "name must be a short text"),
        ("name = '  '", "name", "name must be a short text"),
        ("bandwith = 5", "", "unknown field 'bandwith'"),
        ("sm_count = { value = 5, basis = 'measured' }", "", "unknown field sm_count.basis"),
        ("sm_count = { source = 'x' }", "", "sm_count.value is missing"),
        ("sm_count = { value = 5, source = 5 }", "", "sm_count.source must be a short text"),
        (
            "usable_bytes = { value = 8000000000, basis = 'guessed' }",
            "usable",
            "basis must be 'measured' or 'modelled'",
        ),
        ("sm_count = ", "", "not valid TOML"),
        ("sm_count = 1\nsm_count = 2", "", "not valid TOML"),
        ("sm_count = " + "9" * 5000, "", "not valid TOML"),
        ("x = " + "[" * 50_000, "", "nested too deep|not valid TOML"),
        ("# " + "x" * 2**20, "", "larger than 1 MiB"),
    ],
)
def test_malformed_files(card: Any, text: str, without: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        card(text, without=without)
    assert "mine.toml" in caught.value.message
    assert "\n" not in caught.value.message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.toml", "binary.toml", "."):
        with pytest.raises(InputError):
            profiles.load_gpu(str(tmp_path / name) + ("/.toml" if name == "." else ""))


@given(st.text(max_size=200))
def test_any_text_is_a_card_or_an_input_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_text(GOOD + text, encoding="utf-8", errors="replace")
        try:
            gpu = profiles.load_gpu(str(path))
        except InputError:
            return
        assert gpu.total_bytes == 2**33


# ------------------------------------------------------------------------------------------- folders and models
@pytest.fixture
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gpus").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("VRAMPLAN_PROFILES", str(tmp_path))
    return tmp_path


def test_environment_variable_wins(own_profiles: Path) -> None:
    (own_profiles / "gpus" / "card-x.toml").write_text(GOOD)
    (own_profiles / "gpus" / ".hidden.toml").write_text("")
    (own_profiles / "gpus" / "notes.txt").write_text("")
    assert profiles.gpu_names() == ("card-x",)
    assert profiles.load_gpu("CARD X").name == "Card"


def test_environment_variable_must_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_PROFILES", str(tmp_path / "none"))
    with pytest.raises(InputError, match="VRAMPLAN_PROFILES"):
        profiles.gpu_names()


def test_one_broken_card_does_not_hide_the_others(own_profiles: Path) -> None:
    (own_profiles / "gpus" / "good.toml").write_text(GOOD)
    (own_profiles / "gpus" / "broken.toml").write_text("=")
    assert profiles.gpu_names() == ("broken", "good")
    assert profiles.load_gpu("good").name == "Card"


def test_model_profiles(own_profiles: Path) -> None:
    good = {"name": "m-1b", "hub_id": "org/m-1b", "source": "https://example.org", "config": {"hidden_size": 8}}
    (own_profiles / "models" / "m-1b.json").write_text(json.dumps(good))
    assert profiles.model_names() == ("m-1b",)
    assert profiles.model_profile("m-1b") == good
    with pytest.raises(InputError, match="not a built-in model") as caught:
        profiles.model_profile("m-2b")
    assert caught.value.hint == "did you mean m-1b?"
    with pytest.raises(InputError, match="not a built-in model"):
        profiles.model_profile("../gpus/card")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"config": []}', '{"config": {}}', '{"config": {}, "name": "m", "hub_id": 5, "source": "s"}'],
)
def test_broken_model_profiles(own_profiles: Path, text: str) -> None:
    (own_profiles / "models" / "m.json").write_text(text)
    with pytest.raises(InputError, match=r"m\.json"):
        profiles.model_profile("m")


def test_suggest() -> None:
    assert profiles.suggest("lama-3-8b", ["llama-3-8b", "qwen"]) == "did you mean llama-3-8b?"
    assert profiles.suggest("zzz", ["llama-3-8b"]) == ""
    assert profiles.suggest("", ["llama-3-8b"]) == ""
