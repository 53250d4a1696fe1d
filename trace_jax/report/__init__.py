"""A run as one HTML page that opens offline."""

from trace_jax.report.data import (
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
    "Front",
    "Number",
    "Point",
    "ReportData",
    "Routing",
    "SummaryRow",
    "render_report",
    "report_data",
    "report_front",
    "write_report",
]
