"""A run, a study or a series as one HTML page that opens offline."""

from trace_jax.report.page import render, write_report

__all__ = ["render", "write_report"]
