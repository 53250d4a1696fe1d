"""A finished run in Python: its models, tables and measurements, read from its directory when they are asked for."""

import collections
import dataclasses
import html
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from trace_jax.config import ConfigError, SectionT, nearest, resolve
from trace_jax.evaluation.comparison_text import conclusion, step_text
from trace_jax.io.files import as_path, link, shown
from trace_jax.models.model import Model
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.weights import RetainWeights
from trace_jax.run.directory import calibration_directory, check_files, finished, needed
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.run.export import RETRAINED, TARGET, find_model, load_model
from trace_jax.unlearning.metrics import front_rows, step_rows

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ("split", "name", "value", "low", "high", "n")


def trial_label(method: str, setting: str, variant: str = "") -> str:
    """The name of a study's run under `seed-N/methods`."""
    return f"{variant + '+' if variant else ''}{method}@{setting}"


def measured_frame(
    groups: Iterable[tuple[Mapping[str, Any], Iterable[Mapping[str, Any]]]], columns: Sequence[str]
) -> "pd.DataFrame":
    """A row for each measurement (`Measurement.to_json`) of the groups, after the columns that its group has."""
    import pandas as pd

    rows = [{**about, **measurement} for about, measurements in groups for measurement in measurements]
    frame = pd.DataFrame(rows, columns=[*columns, *MEASURED])
    return frame.astype({name: float for name in ("value", "low", "high")})


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A finished run, or a study or series of runs; what `trace_jax.run` and `trace_jax.open_run` return.

    It holds no more than its directory, and stands for it wherever a path is taken. `print(run)` writes what the
    command line writes.

    A label names a method of a run. Methods of a study or series have the run's place in the label:
    "seed-0/trace_rows@alpha=4", "step-1/uniform".

    Example:
      >>> run = tj.open_run("runs/mine")
      >>> run.methods, run.config.unlearning.steps
      (('uniform', 'trace_rows'), 6)
      >>> frame = run.metrics().query("split == 'test' and name == 'general_nll'")
      >>> frame[frame.method == "trace_rows"].step.tolist()
      [0, 3, 6]
      >>> run.model("trace_rows").config == run.model("target").config
      True
    """

    directory: Path

    @property
    def config(self) -> ExperimentConfig:
        """The settings that it was made with. Raises ConfigError where an earlier version spelled them otherwise."""
        return _settings(ExperimentConfig, self.directory / "config.json", "config")

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of its methods."""
        return tuple(place + label for place, labels in self._runs().items() for label in labels)

    @property
    def report(self) -> Path:
        """Where the page is that a browser shows."""
        return self.directory / "report.html"

    def table(self) -> str:
        """The tables that the command line prints; those of a study in Markdown."""
        told = finished(self.directory)
        return told["table"] if "table" in told else (self.directory / "tables.md").read_text("utf-8").strip()

    def model(self, label: str | None = None, *, mesh: Mesh | None = None) -> Model:
        """The model that a method made, or "target", the one that all methods of the run started from.

        Args:
          label: one of `methods`; None: the only one. A study has targets "seed-0/target", a series "step-1/target".
          mesh: the devices that share it; None: the first device.
        """
        directory, name = self._place(label, TARGET)
        config, name, _ = find_model(directory, name)
        return load_model(config, directory, name, mesh)

    def calibration(self, label: str | None = None) -> RetainWeights:
        """The weights of the retain tokens that a method unlearned with, and where they act; of methods that match
        experts its `calibration.certificate` says what was reached. Raises ConfigError as `config` does.
        """
        directory, name = self._place(label)
        made = _settings(CalibrationConfig, directory / "methods" / name / "results.json", "calibration")
        return RetainWeights.load(calibration_directory(directory, name)).applied(made.weighting)

    def history(self, label: str | None = None) -> "pd.DataFrame":
        """What was measured at every step of unlearning with a method: a row for each, a column for each number
        (docs/tracking.md).
        """
        import pandas as pd

        directory, name = self._place(label)
        return pd.DataFrame(step_rows(directory / "methods" / name))

    def metrics(self, *, final: bool = False) -> "pd.DataFrame":
        """Everything that was measured, a number a row: columns method, step, split, name, value, low, high, n.

        low and high are the ends of the 95 % interval over n items; NaN where there are too few. The rows are:

        - of the target model, method "target", and of the retrained one where there is one, "retrained": step 0;
        - of every evaluation while a method unlearned, step 0 among them: what the quick tasks measure; not if `final`;
        - of a method's final evaluation, at the step whose state was kept, which need not be the last: all that is
          measured. What was measured at that step on the way is the same, and not repeated.

        A study and a series have two columns more. `seed` is the run's; `variant` is the setting of a study's run,
        such as "alpha=4" (after its variant, where several are compared), or the step's directory in a series.
        """
        groups, runs, columns = [], self._runs(), ["variant", "seed", "method", "step"]
        for place, labels in runs.items():
            directory = self.directory / place
            seed = needed(directory / "config.json")["config"]["seed"]
            of_step = place.rstrip("/") if "steps" in finished(self.directory) else ""
            for name, measurements in needed(directory / "references.json")["measurements"].items():
                groups.append((of_step, seed, name, 0, measurements))
            for label, (variant, method) in labels.items():
                result = needed(directory / "methods" / label / "results.json")
                lines = [] if final else front_rows(directory / "methods" / label)
                measured = [(line["step"], line["evaluation"]) for line in lines if line["step"] != result["step"]]
                measured.append((result["step"], result["measurements"]))
                groups += [(variant, seed, method, step, measurements) for step, measurements in measured]
        frame = measured_frame([(dict(zip(columns, about, strict=True)), rows) for *about, rows in groups], columns)
        return frame.drop(columns=columns[:2]) if "" in runs else frame

    def attacks(self) -> "pd.DataFrame":
        """What attacks measured on the models of a run: columns method, attack, at (its form, such as "4 bits"), split,
        name, value, low, high, n. Method "target" and "retrained": what the same attack gives on these, where it was
        asked. Empty without attacks.
        """
        groups = []
        for label, result in finished(self.directory).get("methods", {}).items():
            for attack, found in result.get("attacks", {}).items():
                for point in found["points"]:
                    about = {"attack": attack, "at": point["at"]}
                    models = {label: "measurements", TARGET: "original", RETRAINED: "retrained"}
                    groups += [({"method": m, **about}, point.get(key, ())) for m, key in models.items()]
        return measured_frame(groups, ["method", "attack", "at"]).drop_duplicates(ignore_index=True)

    def _runs(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Of every run by its place, "" or "PLACE/": (variant, method) by label, as `metrics` has them."""
        told, runs = finished(self.directory), collections.defaultdict(dict)
        if "methods" in told:
            return {"": {label: ("", label) for label in told["methods"]}}
        for run in told.get("runs", ()):
            method, setting, variant = run["method"], run["setting"], run.get("variant", "")
            label = run.get("label") or trial_label(method, setting, variant)
            runs[f"seed-{run['seed']}/"][label] = f"{variant} {setting}".strip(), method
        for step in told.get("steps", ()):
            runs[f"{step['directory']}/"] |= {method: (step["directory"], method) for method in step["methods"]}
        return dict(runs)

    def _place(self, label: str | None, *others: str) -> tuple[Path, str]:
        """The directory of the run that a label names a method of, and the method's name there."""
        labels = [*self.methods, *(place + other for place in self._runs() for other in others)]
        if label is None and len(self.methods) == 1:
            label = self.methods[0]
        if label not in labels:
            there = f"there is no method {label!r}" if label else "name one of its methods"
            raise ConfigError(f"{self.directory}: {there}{nearest(label, labels)} It has {', '.join(labels)}.")
        place, _, name = label.rpartition("/")
        return self.directory / place, name

    def __fspath__(self) -> str:
        return os.fspath(self.directory)

    def __str__(self) -> str:
        export = needed(self.directory / "config.json")["config"].get("export")
        lines, best = [f"{self.table()}\n"], None
        for table in finished(self.directory).get("equal_forgetting", ())[:1]:
            best = table["best"]
            lines += [conclusion(table) + " One seed: `study` compares several." * bool(best)]
        lines += [f"report: {link(self.report)}"] + [f"export: {shown(self.directory / 'export')}"] * bool(export)
        if best and not export:
            where = f"--workdir {self.directory} --method {best} --output DIR"
            lines += [f"next: python -m trace_jax.main export {where}  # a checkpoint of {best}'s model"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Run({self.directory}: {textwrap.shorten(', '.join(self.methods), 100, placeholder=' ...')})"

    def _repr_html_(self) -> str:
        import pandas as pd

        told, text, page = finished(self.directory), self.table(), ""
        for table, lines in zip(told.get("equal_forgetting", ()), text.split("\n\n"), strict=False):
            frame = pd.DataFrame([{"": row["name"], **row["values"]} for row in table["rows"]])
            frame["step"] = [step_text(row) for row in table["rows"]]
            frame.columns = [name.replace("_", " ") for name in frame]
            written = frame.to_html(index=False, border=0, na_rep="-", float_format="{:.3f}".format)
            page += f"<p>{html.escape(lines.splitlines()[0])}</p>{written}"
        page = page or f"<pre>{html.escape(text)}</pre>"
        return f"{page}<p>report: {html.escape(shown(self.report))}</p>"


def _settings(kind: type[SectionT], file: Path, name: str) -> SectionT:
    """The settings `name` of a file."""
    values = needed(file)[name]
    try:
        return resolve(kind, values)
    except ConfigError as error:
        raise ConfigError(
            f"{file}: an earlier version spelled its settings otherwise ({error}); read them there."
        ) from None


def open_run(workdir: str | os.PathLike) -> Run:
    """A finished run, study or series by its directory, or its address gs://BUCKET/NAME.

    Raises:
      ConfigError: none is there, or it is not finished.
      ValueError: one of its files was damaged since.

    Example:
      >>> tj.open_run("runs/mine")
      Run(runs/mine: uniform, trace_rows)
    """
    run = Run(as_path(workdir))
    check_files(run.directory)
    finished(run.directory)
    return run
