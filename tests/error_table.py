"""Prints the table "predicted against measured" of docs/memory-model.md: python tests/error_table.py"""

from __future__ import annotations

from measured import MIB, TRAINED, h200, model, trained
from processes import step_memory

from vramplan.core.ledger import simulate


def main() -> None:
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for row, sim in step_memory():
        mib = row["mib"]
        groups.setdefault(row["model"], []).append(
            (
                sim.allocated_bytes / MIB / mib["peak"] - 1,
                sim.played.reserved_bytes / MIB / mib["reserved"] - 1,
                sim.played.allocated["optimizer"] / MIB / mib["opt_peak"] - 1 if mib["opt_peak"] else 0.0,
            )
        )
    groups["all seven, stock recipe"] = [e for errors in groups.values() for e in errors]
    for row in TRAINED:
        run, phases = trained(row)
        sim = simulate(model(run.model), run, h200())
        groups.setdefault("fourteen models, `vramplan train`", []).append(
            (
                sim.allocated_bytes / phases["step"]["peak_bytes"] - 1,
                sim.played.reserved_bytes / phases["step"]["reserved_bytes"] - 1,
                sim.played.allocated["optimizer"] / phases["optimizer"]["peak_bytes"] - 1,
            )
        )
    print("| model | cases | peak allocated, mean | worst | reserved, mean | worst | optimizer phase, worst |")
    print("|---|---|---|---|---|---|---|")
    for name, errors in groups.items():
        cells = [name, str(len(errors))]
        for i in (0, 1):
            absolute = [abs(e[i]) for e in errors]
            cells += [f"{sum(absolute) / len(absolute):.2%}", f"{max((e[i] for e in errors), key=abs):+.2%}"]
        cells.append(f"{max((e[2] for e in errors), key=abs):+.2%}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
