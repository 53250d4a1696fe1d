"""The command `table`: the comparison of runs and studies, side by side, for a spreadsheet or a paper."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trace_jax.config import ConfigError
from trace_jax.evaluation import fronts
from trace_jax.evaluation.comparison_text import interval_text, markdown_table
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.task import Scoreboard
from trace_jax.io.files import as_path, decode
from trace_jax.io.progress import MISSING, plain_name
from trace_jax.report.routing import BASELINE
from trace_jax.run.directory import check_files, equal_forgetting, finished, needed
from trace_jax.run.result import open_run

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("md", "latex", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", nargs="+", required=True, metavar="DIR", help="finished runs or studies")
    about = (
        "md, latex: methods at equal forgetting, with 95 %% intervals; csv: every number that was measured, one a line"
    )
    parser.add_argument("--format", default="md", choices=FORMATS, help=about)


def main(options: argparse.Namespace) -> int:
    print(table(options.workdir, options.format))
    return 0


def table(workdirs: Sequence[str], form: str = "md") -> str:
    """Runs or studies side by side, as text. Raises ConfigError where one is not finished."""
    import pandas as pd

    if form == "csv":
        frames = [open_run(workdir).metrics(final=True) for workdir in workdirs]
        return pd.concat(frames, keys=workdirs, names=["run"]).reset_index(level="run").to_csv(index=False).strip()
    frame = pd.concat([compared(workdir) for workdir in workdirs], keys=workdirs, names=["run"])
    frame = frame.reset_index(level="run", drop=len(workdirs) == 1).fillna(MISSING)
    if form == "latex":
        return frame.to_latex(index=False, escape=True).strip()
    return markdown_table([list(frame.columns), *frame.astype(str).to_numpy().tolist()])


def compared(workdir: str) -> "pd.DataFrame":
    """Methods of a run or study at its first level: a row each, numbers with intervals as text."""
    import pandas as pd

    path = as_path(workdir)
    check_files(path)
    told = finished(path)
    if "methods" in told:
        config, board = needed(path / "config.json")["config"], decode(Scoreboard, told["board"])
        first = equal_forgetting(path, config, told, board)[0]
        rows = [_row(row["name"], row["intervals"], row["gains"]) for row in first["rows"][1:]]
        missed = [(one, row) for one, row in zip(rows, first["rows"][1:], strict=True) if not row["reached"]]
        for one, row in missed:
            one[plain_name(fronts.MEAN)] = f"not reached (lowest {row['lowest']:.3f})"
        return pd.DataFrame(rows)
    if "comparisons" not in told:
        raise ConfigError(f"{path}: is a series, which compares no methods at one level; its numbers: --format csv.")
    rows = []
    for one in told["comparisons"]:
        if one["reading"] == "first" and one["level"] == told["comparisons"][0]["level"]:
            variant = f"{name}: " if (name := one.get("variant")) else ""
            rows += [_row(variant + r["method"], r["utilities"], r["gains"], r["setting"]) for r in one["results"]]
    return pd.DataFrame(rows)


def _row(method: str, utilities: Mapping[str, Any], gains: Mapping[str, Any], setting: str = "") -> dict[str, str]:
    row = {"method": method, **({"setting": setting} if setting else {})}
    row |= {plain_name(name): interval_text(decode(Interval, number)) for name, number in utilities.items()}
    if (gain := gains.get(fronts.MEAN)) and not method.endswith(BASELINE):
        row["gain over uniform"] = interval_text(decode(Interval, gain), percent=True)
    return row
