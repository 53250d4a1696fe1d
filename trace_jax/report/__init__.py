"""A run as one HTML page that opens offline."""

from trace_jax.report.attacks import attack_rows
from trace_jax.report.data import (
    AttackRow,
    Front,
    Number,
    Point,
    ReportData,
    Routing,
    SummaryRow,
    report_data,
    report_front,
)
from trace_jax.report.page import render_report, write_report

__all__ = [
    "AttackRow",
    "Front",
    "Number",
    "Point",
    "ReportData",
    "Routing",
    "SummaryRow",
    "attack_rows",
    "render_report",
    "report_data",
    "report_front",
    "write_report",
]
