"""The certificates of the calibrations (trace_jax.routing.calibration, as JSON) as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_jax.report.words import MISSING, format_number, format_share

MOST_EXPERTS = 300  # rows in the list of experts
_EXPERT_COLUMNS = ("layer", "expert", "forget", "retain", "target", "weighted")

Certificate = Mapping[str, Any]


def certificate_table(certificates: Mapping[str, Certificate]) -> dict[str, Any] | None:
    """One line of totals per method, with notes and the experts one by one; None if there is no certificate."""
    if not certificates:
        return None
    rows = [{"method": m, "cells": _totals(c), **_details(c)} for m, c in certificates.items()]
    return {"columns": list(_totals({})), "rows": rows}


def _totals(certificate: Certificate) -> dict[str, str]:
    def number(name: str) -> str:
        return format_number(certificate.get(name))

    def change(name: str) -> str:
        before, after = number(f"{name}_before"), number(f"{name}_after")
        return MISSING if before == after == MISSING else f"{before} → {after}"

    matched, infeasible = certificate.get("layer"), certificate.get("infeasible")
    strength, asked = number("strength"), number("strength_asked")
    return {
        "experts matched": MISSING if matched is None else f"{len(matched):,}",
        "infeasible": MISSING if infeasible is None else f"{len(infeasible):,}",
        "gap to forget": change("gap"),
        "gap of other experts": change("gap_elsewhere"),
        "strength (asked)": strength if asked in (strength, MISSING) else f"{strength} ({asked})",
        "effective sample size": format_share(certificate.get("effective_sample_size")),
        "largest weight": number("largest_weight"),
        "tokens touched": format_share(certificate.get("touched")),
    }


def _details(certificate: Certificate) -> dict[str, Any]:
    """Notes, the solver, and the matched experts, those with the largest gap between forget and retain first."""
    columns = [name for name in _EXPERT_COLUMNS if certificate.get(name) is not None]
    experts = list(zip(*(certificate[name] for name in columns), strict=True))
    if {"forget", "retain"} <= set(columns):
        forget, retain = columns.index("forget"), columns.index("retain")
        experts.sort(key=lambda expert: -abs(expert[forget] - expert[retain]))
    infeasible = certificate.get("infeasible") or ()
    solver = {
        "retain tokens": format_number(certificate.get("tokens")),
        "tokens whose weight was clipped": format_share(certificate.get("clipped")),
        "ridge": format_number(certificate.get("ridge")),
        "Newton steps": format_number(certificate.get("iterations")),
        "final gradient": format_number(certificate.get("gradient_norm")),
        "infeasible (layer, expert)": ", ".join(f"({layer}, {expert})" for layer, expert in infeasible[:100]),
    }
    return {
        "notes": list(certificate.get("notes") or ()),
        "solver": [(name, value) for name, value in solver.items() if value not in (MISSING, "")],
        "columns": columns,
        "experts": [[format_number(value) for value in expert] for expert in experts[:MOST_EXPERTS]],
        "count": len(experts),
        "left_out": max(0, len(experts) - MOST_EXPERTS),
    }
