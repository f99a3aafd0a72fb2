"""`fit --probe`: a card that comes to rest or does not, children that fit or do not, others who come in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_tools import CARD, Bench

import vramplan
from vramplan.cli import run as run_cli
from vramplan.core.room import judge
from vramplan.core.types import Plan, Probe, RunSpec
from vramplan.core.units import GIB, MIB
from vramplan.errors import VramplanError
from vramplan.launch.probing import Place, _environment
from vramplan.launch.tenants import GROWTH_BYTES, IDLE_BYTES, Look, intruders, unrest, wait_until_quiet
from vramplan.launch.verifying import STEP_SHARE, next_plan
from vramplan.sources import gpu, records

FINISH, OOM = "finish()\n", "oom()\n"
Fit = Callable[..., Any]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def fit(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    """fit(script, *flags): `vramplan fit llama-3.1-8b --probe` on a 12 GB card with these children."""

    def call(script: str, *flags: object, model: str = "llama-3.1-8b", name: str = "plan.json") -> Any:
        bench.children(script)
        capsys.readouterr()
        target = tmp_path / name
        words = ["fit", model, "--effective-batch-size", "16", "--probe", "-o", str(target), *map(str, flags)]
        code = run_cli(words)
        captured = capsys.readouterr()
        plan = records.read_json(target, Plan) if target.exists() else None
        return SimpleNamespace(
            code=code, out=captured.out, err=captured.err, plan=plan, error=(captured.err.splitlines() or [""])[-1]
        )

    return call


# -------------------------------------------------------------------------------------------------------- verified
def test_a_plan_that_fits_is_verified_with_its_numbers(fit: Fit, bench: Bench) -> None:
    result = fit(FINISH)
    assert result.code == 0, result.err
    (probe,) = result.plan.probes
    assert result.plan.verified and probe.fits and probe.ended == "finished"
    assert (probe.allocated_bytes, probe.reserved_bytes, probe.process_bytes, probe.tokens_per_s) == (
        7000 * MIB, 7200 * MIB, 7600 * MIB, 1000,
    )  # fmt: skip
    assert probe.predicted_bytes == result.plan.ledger.peak.allocated_bytes
    chosen = next(c for c in result.plan.candidates if c.micro_batch_size == probe.micro_batch_size
                  and c.levers == probe.levers)  # fmt: skip
    assert probe.predicted_tokens_per_s == chosen.tokens_per_s
    assert "Verified on this machine's card: 7.42 GiB for the process" in result.out
    assert "1,000 tokens/s, ~" in result.out


def test_what_is_played_is_the_worst_batch_and_nothing_is_left(fit: Fit, bench: Bench) -> None:
    plan = fit(FINISH, "--seq-len", 1024).plan
    run = records.decode(bench.played(0), RunSpec)
    assert (run.micro_batch_size, run.seq_len, run.levers) == (
        plan.run.micro_batch_size, 1024, plan.run.levers,
    )  # fmt: skip
    assert run.accumulation == min(2, plan.run.accumulation)
    assert run.random_weights and run.data is None and run.schedule.save_steps == 0
    assert bench.played(0, "config")["hidden_size"] == 4096
    assert not plan.run.random_weights and plan.run.schedule.max_steps is None  # what is trained is as asked
    assert not Path((bench.place / "folder0").read_text()).exists()
    assert "VRAMPLAN_CAP_BYTES" not in bench.played(0, "env")


def test_json_alone_is_on_stdout(fit: Fit) -> None:
    payload = json.loads(fit(FINISH, "--json").out)
    assert payload["verified"] is True and payload["probes"][0]["process_bytes"] == 7600 * MIB


def test_without_a_probe_it_says_unverified(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fit", "llama-3.1-8b", "--effective-batch-size", "16", "--gpu", "rtx-4090"]) == 0
    assert "Unverified: predicted, not tried" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- does not fit
@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("oom()", "ran out of memory"),
        ("finish(process=11911)", "took more than there is"),
    ],
)
def test_the_next_best_that_needs_enough_less_is_taken(
    fit: Fit,
    bench: Bench,
    first: str,
    said: str,
) -> None:
    result = fit(f"{first} if turn == 0 else finish()\n")
    assert result.code == 0, result.err
    plan, (failed, good) = result.plan, result.plan.probes
    assert plan.verified and good.fits and not failed.fits and bench.count() == 2
    run = plan.run
    assert (run.micro_batch_size, run.accumulation, run.levers) == (
        good.micro_batch_size, good.accumulation, good.levers,
    )  # fmt: skip
    assert run.micro_batch_size * run.accumulation == 16
    before = vramplan.plan("llama-3.1-8b", gpu=CARD, effective_batch_size=16)
    assert (before.run.micro_batch_size, before.run.levers) == (failed.micro_batch_size, failed.levers)
    less = before.ledger.peak.device_bytes - plan.ledger.peak.device_bytes
    assert less >= STEP_SHARE * plan.budget_bytes
    assert plan.headroom_bytes == plan.budget_bytes - plan.ledger.peak.device_bytes
    assert judge(plan.ledger, plan.gpu) == plan.verdict != "does_not_fit"
    enough = [c for c in plan.candidates if c.verdict != "does_not_fit"
              and c.device_bytes <= before.ledger.peak.device_bytes - STEP_SHARE * plan.budget_bytes]  # fmt: skip
    assert good.predicted_tokens_per_s == max(c.tokens_per_s for c in enough)
    assert (said in plan.reason and "out of memory" in result.out) or "too large" in result.out


def test_a_plan_that_never_fits_is_refuted(fit: Fit, bench: Bench) -> None:
    result = fit(OOM)
    assert result.code == 3 and result.plan is None
    assert bench.count() <= 3
    assert "Refuted" in result.out and "predicted, but the card refutes it." in result.out


def test_more_probes_than_three_are_not_made_and_the_last_is_the_smallest(fit: Fit, bench: Bench) -> None:
    bench.usable(40 * GIB)  # many candidates, each far below the one before
    result = fit("oom() if turn < 2 else finish()\n")
    assert bench.count() == 3 and result.plan.verified
    assert result.plan.ledger.peak.device_bytes <= min(c.device_bytes for c in result.plan.candidates)


@settings(max_examples=30, deadline=None)
@given(st.integers(6 * GIB, 60 * GIB), st.none() | st.floats(1.0, 1.3), st.booleans())
def test_the_next_plan_needs_enough_less(usable: int, over: float | None, last: bool) -> None:
    card = vramplan.GpuProfile(**{**_fields(CARD), "usable_bytes": usable})
    plan = vramplan.plan("llama-3.2-1b", gpu=card, effective_batch_size=8)
    if plan.verdict == "does_not_fit":
        return
    process = None if over is None else int(over * usable)
    run = plan.run
    failed = Probe(levers=run.levers, micro_batch_size=run.micro_batch_size, accumulation=run.accumulation,
                   ended="oom" if over is None else "finished", fits=False, predicted_bytes=1,
                   predicted_process_bytes=1, process_bytes=process)  # fmt: skip
    following = next_plan(plan, failed, last=last)
    if following is not None:
        saved = plan.ledger.peak.device_bytes - following.ledger.peak.device_bytes
        assert saved >= max(int(STEP_SHARE * usable), (process or 0) - usable)
        assert following.run.micro_batch_size * following.run.accumulation == 8
        assert judge(following.ledger, card) == following.verdict != "does_not_fit"


def test_a_longest_context_that_does_not_fit_is_shortened(fit: Fit, bench: Bench) -> None:
    """No candidate is for this length: the same levers with fewer tokens are the next best."""
    result = fit("oom() if turn == 0 else finish()\n", "--objective", "context", "--seq-len", 8192)
    assert result.code == 0 and result.plan.verified
    tried = [bench.played(turn)["seq_len"] for turn in range(bench.count())]
    assert len(tried) == 2 and tried[0] > tried[1] == result.plan.run.seq_len and tried[1] % 128 == 0
    assert f"rows of {tried[1]:,} tokens" in result.plan.reason
    failed, _ = result.plan.probes
    assert result.plan.headroom_bytes >= STEP_SHARE * result.plan.budget_bytes
    assert result.plan.ledger.peak.allocated_bytes < failed.predicted_bytes


def _fields(card: Any) -> dict[str, Any]:
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


# -------------------------------------------------------------------------------------------------------- co-tenants
APPEARS = "card(sizes={'77': 150 * MIB, str(os.getpid()): 7000 * MIB, '999': 300 * MIB}, used=7500 * MIB)\n"
GROWS = "card(sizes={'77': 900 * MIB, str(os.getpid()): 7000 * MIB}, used=7900 * MIB)\n"
TWO_STRANGERS = "card(sizes={'77': 150 * MIB, '4001': 7000 * MIB, '999': 300 * MIB}, used=7500 * MIB)\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (APPEARS, "process 999 (program-999) appeared on the card"),
        (GROWS, "process 77 (program-77) grew on the card"),
        (TWO_STRANGERS, "process 999 (program-999) appeared on the card"),
    ],
)
def test_a_co_tenant_makes_the_probe_unreliable(fit: Fit, bench: Bench, change: str, said: str) -> None:
    for ending in (FINISH, "time.sleep(0.5)\noom()\n"):
        bench.set()
        result = fit(change + ending)
        assert result.code == 0
        (probe,) = result.plan.probes  # and no other plan is taken because of it
        assert probe.disturbances == (said,) and not result.plan.verified
        assert f"warning: {said} while the plan was tried" in result.err
        assert "Unverified: process" in result.out and "unreliable" in result.out


@pytest.mark.parametrize("change", ["card(sizes={'77': 150 * MIB, '4001': 7000 * MIB}, used=7200 * MIB)\n", ""])
def test_the_child_itself_is_no_co_tenant(fit: Fit, change: str) -> None:
    """Also where the driver knows it by another number, or lists no processes at all."""
    assert fit(change + FINISH).plan.verified


def test_where_the_driver_tells_no_processes_the_cards_use_counts(fit: Fit, bench: Bench) -> None:
    bench.set(sizes={})
    grown = "card(used={used} * MIB)\nsay('held', reserved_bytes=7200 * MIB)\ntime.sleep(0.3)\nfinish(process=None)\n"
    plan = fit(grown.format(used=200 + 7600)).plan
    assert plan.verified and plan.probes[0].process_bytes == 7600 * MIB
    bench.set(sizes={})
    result = fit(grown.format(used=200 + 7200 + 400 + 1100))
    assert not result.plan.verified
    assert "more are in use than PyTorch has reserved" in result.plan.probes[0].disturbances[0]


# ------------------------------------------------------------------------------------------------------- before it
def looks(*states: tuple[int | None, dict[int, int | None], int | None]) -> list[Look]:
    return [Look(*state) for state in states]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((GIB, {5: GIB}, 0), (GIB, {5: GIB}, 0), ""),
        ((GIB, {5: GIB}, 5), (GIB + GROWTH_BYTES, {5: GIB + GROWTH_BYTES}, 9), ""),
        ((GIB, {5: GIB}, 0), (2 * GIB, {5: 2 * GIB}, 0), "process 5 (a program) grows, now 2.00 GiB"),
        ((2 * GIB, {5: 2 * GIB}, 0), (GIB, {5: GIB}, 0), "process 5 (a program) shrinks"),
        ((GIB, {}, 0), (GIB, {5: None}, 0), "process 5 (a program) has just started"),
        ((GIB, {}, None), (2 * GIB, {}, None), "the memory in use changes, now 2.00 GiB"),
        ((GIB, {5: None}, 90), (GIB, {5: None}, 80), "something computes on it (90 % of the time): process 5"),
        ((None, {5: None}, 90), (None, {5: None}, 90), "something computes"),
        ((IDLE_BYTES, {}, 99), (IDLE_BYTES, {}, 99), ""),  # a driver that is just waking up: nobody is there
        ((None, {}, None), (None, {}, None), ""),
    ],
)
def test_a_card_at_rest(before: Any, after: Any, said: str) -> None:
    found = unrest(looks(before, before, before, after, after), lambda pid: "a program")
    assert found.startswith(said) if said else found == ""


def test_one_busy_moment_is_no_work() -> None:
    states = [(GIB, {5: GIB}, busy) for busy in (0, 60, 0, 0, 0)]
    assert unrest(looks(*states), lambda pid: None) == ""


def test_waiting_says_what_for_and_goes_on_when_it_is_over(bench: Bench) -> None:
    told: list[str] = []
    bench.set(busy=80)

    def say(text: str) -> None:
        told.append(text)
        bench.set()

    wait_until_quiet(gpu.Nvml(), 0, say)
    assert told == [
        "waiting up to 0 s for the card to come to rest: something computes on it (80 % of the time): "
        "process 77 (program-77)"
    ]
    bench.set(busy=80)
    with pytest.raises(VramplanError, match="did not come to rest within 0 s: something computes"):
        wait_until_quiet(gpu.Nvml(), 0, told.append)


def test_a_card_that_never_rests_leaves_the_plan_unverified(fit: Fit, bench: Bench) -> None:
    bench.set(busy=95)
    result = fit(FINISH)
    assert result.code == 1 and bench.count() == 0
    assert result.error.startswith("error: nothing was verified: the card did not come to rest")
    assert "note: waiting up to" in result.err
    assert "Unverified" in result.out and not result.plan.verified


def test_a_card_that_does_not_come_to_rest_again_leaves_the_next_plan_untried(fit: Fit, bench: Bench) -> None:
    result = fit("card(busy=90)\noom()\n")
    assert result.code == 1 and bench.count() == 1 and "did not come to rest" in result.error
    failed = result.plan.probes[0]
    assert not result.plan.verified and result.plan.run.levers != failed.levers  # not the one that failed
    assert "Unverified: what was tried on the card did not fit" in result.out


@pytest.mark.parametrize("flags", [(), ("--gpu", "rtx-4090")])
def test_without_cuda_it_is_exit_2(
    fit: Fit,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    def refuse() -> Any:
        raise VramplanError("no NVIDIA driver library (NVML) on this machine")

    monkeypatch.setattr(gpu, "Nvml", refuse)
    result = fit(FINISH, *flags)
    assert result.code == 2 and bench.count() == 0
    assert "there is no CUDA GPU to probe on: no NVIDIA driver library" in result.error
    assert len(result.err.splitlines()) == 1
    if flags:  # a plan there is, and it is marked
        assert "Unverified" in result.out and not result.plan.verified
    else:
        assert result.out == "" and result.plan is None


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("end('error', 2, 'torch 2.13 sees no CUDA GPU')", 2, "nothing was verified: torch 2.13 sees no CUDA GPU"),
        ("print('Traceback of the child', flush=True)\nend('error', 1, 'KeyError: x')", 1, "verified: KeyError: x"),
    ],
)
def test_a_child_that_cannot_run_leaves_the_plan_unverified(fit: Fit, ending: str, code: int, said: str) -> None:
    result = fit(ending + "\n")
    assert result.code == code and said in result.error
    assert "Unverified" in result.out and not result.plan.verified
    assert ("Traceback of the child" in result.err) == (code == 1)


def test_interrupted_says_nothing_and_leaves_nothing(fit: Fit, bench: Bench) -> None:
    result = fit("end('interrupted', 130, 'stopped')\n")
    assert (result.code, result.out, result.plan) == (130, "", None)
    assert not Path((bench.place / "folder0").read_text()).exists()


# ----------------------------------------------------------------------------------------------------- another card
def test_a_named_card_is_tried_under_its_cap(fit: Fit, bench: Bench) -> None:
    result = fit(FINISH, "--gpu", "rtx-3060-12gb")
    card = result.plan.gpu
    cap = result.plan.budget_bytes - card.context_bytes
    assert card.source == "file" and bench.played(0, "env")["VRAMPLAN_CAP_BYTES"] == str(cap)
    (probe,) = result.plan.probes
    assert (probe.cap_bytes, probe.process_bytes, probe.tokens_per_s) == (cap, None, 1000)
    assert result.plan.verified and "for PyTorch" in result.out
    other = fit(FINISH, "--gpu", "rtx-4060").plan.probes[0]
    assert other.tokens_per_s is None and other.predicted_tokens_per_s is None  # the speed is that of the card here


def test_a_card_that_is_too_small_cannot_stand_in(fit: Fit, bench: Bench) -> None:
    result = fit(FINISH, "--gpu", "rtx-4090")
    assert result.code == 2 and bench.count() == 0
    assert "too little to stand in for rtx-4090" in result.error


@pytest.mark.parametrize("index", [0, 2])
def test_one_of_several_cards_is_the_childs_first(index: int) -> None:
    nvml = SimpleNamespace(uuid=lambda index: f"GPU-{index}", count=lambda: 3)
    assert _environment(Place(card=CARD, nvml=nvml, index=index), 5) == {
        "CUDA_VISIBLE_DEVICES": f"GPU-{index}", "VRAMPLAN_CAP_BYTES": "5",
    }  # fmt: skip
    nvml = SimpleNamespace(count=lambda: 1)
    assert _environment(Place(card=CARD, nvml=nvml), None) == {}


def test_strangers() -> None:
    before = Look(GIB, {5: GIB}, 0)
    assert intruders(before, Look(GIB, {5: GIB, 7: GIB}, 0), 7, str) == []
    assert intruders(before, Look(GIB, {5: GIB, 8: GIB}, 0), 7, str) == []  # the child by another number
    assert intruders(before, Look(GIB, {5: GIB, 7: GIB, 8: None}, 0), 7, str) == ["process 8 (8) appeared on the card"]
    assert intruders(before, Look(GIB, {5: None, 7: GIB}, 0), 7, str) == []
    assert intruders(before, Look(GIB, {7: GIB}, 0), 7, str) == []  # somebody left


def test_old_plans_are_read_as_unverified() -> None:
    data = records.encode(make_plan())
    del data["probes"]
    assert records.decode(data, Plan).probes == () and not records.decode(data, Plan).verified
