"""A plan for people and for programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pkv.plan.chips import Slice
from pkv.plan.planning import Plan
from pkv.plan.roofline import ASSUMED

GIB = 2**30


def as_record(plan: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "fits": plan.fits,
        "topology": plan.wanted.name,
        "chips": plan.wanted.chips,
        "machines": plan.wanted.machines,
        "machine_chips": plan.wanted.host_chips,
        "devices_a_chip": plan.wanted.chip.cores,  # each of which counts as a chip here
        "mesh": dict(plan.mesh),
        "limit_bytes": plan.wanted.chip.hbm_gib * GIB,
        "kv_bytes": plan.kv_bytes,
        "rows_at_once": plan.rows,
        "micro_batch": list(plan.micro),
        "programs": [
            {
                "name": program.name,
                "phase": program.phase,
                "bytes_per_chip": program.bytes_per_chip,
                "limit_bytes": program.limit_bytes,
                "fits": program.fits,
                "kinds": dict(program.kinds),
                "host_bytes": program.host_bytes,
                "flops": program.flops,
                "sent_bytes": dict(program.sent),
                "seconds_estimate": program.seconds_estimate if math.isfinite(program.seconds_estimate) else None,
            }
            for program in plan.programs
        ],
        "rounds": [
            {"name": round_.name, "steps": round_.steps, "hours": round_.hours}
            | {"seconds": dataclasses.asdict(round_.seconds) | {"step": round_.seconds.total}}
            for round_ in plan.rounds
        ],
        "hours": plan.hours,
        "dollars": plan.dollars if plan.wanted.chip.dollars else None,  # no price is known
        "assumed": dict(ASSUMED),
        "took_s": plan.took_s,
    }


def in_words(plan: Plan) -> str:
    """Tables of memory by program and of time by round, and the verdict."""
    kinds = list(dict.fromkeys(kind for program in plan.programs for kind in program.kinds))
    head = ["program", *kinds, "all", "sent, GB", "TFLOP"]
    rows = [
        [
            program.name,
            *(_gib(program.kinds.get(kind, 0.0)) for kind in kinds),
            _gib(program.bytes_per_chip) + ("" if program.fits else " !"),
            f"{sum(program.sent.values()) / 1e9:.2f}",
            f"{program.flops / 1e12:.0f}",
        ]
        for program in plan.programs
    ]
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one chip"
    tight = plan.tightest
    lines = [
        f"{plan.wanted.name}: {_machines(plan.wanted)}, as {mesh}; {plan.wanted.chip.hbm_gib:.2f} GiB a chip",
        "",
        f"GiB a chip while a program runs (micro-batches of {plan.micro[0]} × {plan.micro[1]} tokens)",
        *_aligned([head, *rows]),
        "",
    ]
    if not plan.wanted.compiles:
        lines += ["By arithmetic: nothing was compiled, and what chips send each other is counted by formulas.", ""]
    if plan.fits:
        lines.append(f"Fits, with {-tight.lacks / GIB:.2f} GiB to spare in {tight.name}, the tightest.")
    else:
        broken = [program for program in plan.programs if not program.fits]
        lines.append("Does not fit: " + ", ".join(f"{p.name} needs {p.lacks / GIB:.2f} GiB more" for p in broken))
    if plan.fits:
        lines += ["", f"{plan.rows:.0f} rows decode at the same time on each of the groups of chips that share rows."]
        lines += _aligned(
            [
                ["round", "steps", "prefill, s", "decode, s", "reshard, s", "update, s", "step, s", "hours"],
                *(
                    [
                        round_.name,
                        str(round_.steps),
                        *(f"{value:.1f}" for value in dataclasses.astuple(round_.seconds)),
                        f"{round_.seconds.total:.1f}",
                        f"{round_.hours:.1f}",
                    ]
                    for round_ in plan.rounds
                ),
            ]
        )
        price = plan.wanted.chip.dollars * plan.wanted.chip.cores
        money = f"{plan.dollars:,.0f} dollars at {price:.2f} a chip and hour" if price else "no price known (--prices)"
        lines += [
            "",
            f"{plan.hours:.1f} hours, {money}; of rounds alone: a warm-up, evaluations, compilation, checkpoints and "
            "refills are not counted.",
            "Times are estimates by roofline, never measured; they assume "
            + ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items())
            + ".",
        ]
    return "\n".join([*lines, "", f"Planned in {plan.took_s:.0f} s."])


def _machines(wanted: Slice) -> str:
    each = f"{wanted.host_chips} chip{'s' * (wanted.host_chips > 1)}"
    if wanted.chip.cores > 1:
        each = f"{wanted.host_chips // wanted.chip.cores} chips, {wanted.host_chips} devices"
    return f"{wanted.machines} machines of {each}" if wanted.machines > 1 else f"1 machine of {each}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
