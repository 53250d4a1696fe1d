"""One experiment: the settings of every room together, the named methods that it compares, and how it is read.

An experiment is a Python file with a `get_config` function, and the overrides of the command line.
"""

import dataclasses
import functools
import inspect
import operator
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from trace_jax.attacks import AttacksConfig
from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError, Section, as_dict, fingerprint, nearest, option, resolve
from trace_jax.evaluation.task import EvaluationConfig
from trace_jax.io.progress import say
from trace_jax.io.tracking import TrackingConfig
from trace_jax.models.architecture import ModelConfig
from trace_jax.parallel.mesh import PLAIN, ParallelConfig
from trace_jax.routing.config import CalibrationConfig, Matching, Online, Weighting
from trace_jax.run.configs import shipped_configs
from trace_jax.tasks.benchmarks import DataConfig
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.objectives import Objective
from trace_jax.unlearning.optimizer import MOST, TrainingConfig

_ROWS = {"name": "matching", "unit": "row", "apply": "sampling"}
_TOKENS = {"name": "matching", "unit": "token", "apply": "both"}
_NGRAM = {"name": "ngram", "apply": "sampling"}


class Preset(NamedTuple):
    """A named way of weighting the retain loss. `steps` multiplies the steps of the run (1 = equal budget)."""

    summary: str
    weighting: Mapping[str, Any]
    steps: int = 1

    @property
    def reads(self) -> set[str]:
        """The settings of `calibration` that it reads: those of its weighting, and the seed."""
        own = {field.name for field in dataclasses.fields(Weighting.kinds[self.weighting["name"]])}
        return own and own | {"seed"}


METHODS: dict[str, Preset] = {
    "uniform": Preset("every retain token counts the same", {"name": "uniform"}),
    "uniform_2x": Preset("uniform with twice the steps", {"name": "uniform"}, steps=2),
    "trace": Preset("token weights, rows drawn by their mean weight", _TOKENS),
    "trace_rows": Preset("one weight per row, rows drawn by it", _ROWS),
    "token_weights": Preset("token weights on uniformly drawn rows", {**_TOKENS, "apply": "weights"}),
    "row_weights": Preset("row weights on uniformly drawn rows", {**_ROWS, "apply": "weights"}),
    "permuted": Preset("control: trace_rows' weights shuffled over rows", {**_ROWS, "name": "permuted"}),
    "random_experts": Preset("control: as many experts, drawn at random", {**_ROWS, "name": "random_experts"}),
    "least_experts": Preset("control: as many experts, the least critical", {**_ROWS, "name": "least_experts"}),
    "ngram": Preset("rival: n-gram density ratio of rows", _NGRAM),
    "ngram_dsir": Preset("the same without bound on the sample (DSIR)", {**_NGRAM, "min_effective_sample_size": 0.0}),
    "hidden": Preset("rival: hidden states matched instead of experts", {"name": "hidden", "apply": "sampling"}),
    "similarity": Preset("rival: rows most similar to forget rows", {"name": "similarity", "apply": "sampling"}),
    "gradient": Preset("rival: rows with gradients like forget rows'", {"name": "gradient", "apply": "sampling"}),
    "loss": Preset("rival: tokens weighted by their loss", {"name": "loss", "apply": "both"}),
    "ratio_weights": Preset("frequency ratio of a token's experts, unsolved", {"name": "ratio", "apply": "both"}),
    "oracle": Preset("upper reference: told which rows are neighbours", {"name": "domain", "apply": "sampling"}),
}


class Method(NamedTuple):
    """One fully resolved way to unlearn."""

    name: str
    calibration: CalibrationConfig
    unlearning: UnlearningConfig


_NONE: Mapping = {}
_VARIANTS = "compared, by name: settings of unlearning and calibration; a list of numbers is tuned over"


class StudyConfig(Section):
    """Many runs under one budget: methods x settings x seeds."""

    methods: tuple[str, ...] = option(tuple(METHODS), help="methods compared", choices=tuple(METHODS))
    seeds: tuple[int, ...] = option((0, 1, 2), help="seeds of data, base model and batch order", minimum=0)
    tuning_seeds: tuple[int, ...] = option((), help="seeds that settings are chosen on; none: `seeds`", minimum=0)
    alphas: tuple[float, ...] = option((4.0, 16.0, 48.0, 150.0), help="retain coefficients; tuned over", minimum=0.0)
    learning_rates: tuple[float, ...] = option(
        (), help="learning rates; tuned likewise; none: unlearning.learning_rate", minimum=0.0, maximum=MOST
    )
    workers: int = option(0, help="runs side by side; 0 = one per core", minimum=0)
    variants: dict = dataclasses.field(default_factory=dict, metadata=option(help=_VARIANTS).metadata)

    def __post_init__(self):
        super().__post_init__()
        if both := sorted({*self.seeds} & {*self.tuning_seeds}):
            raise ConfigError(
                f"tuning_seeds has {both}, which are seeds, too; what is reported needs seeds of its own."
            )
        for name, given in self.variants.items():
            sections = given.items() if isinstance(given, Mapping) else [("", given)]
            for section, settings in sections:
                if section not in ("unlearning", "calibration") or not isinstance(settings, Mapping) or "/" in name:
                    expected = "expected a name without /, and settings of unlearning, calibration or both."
                    raise ConfigError(f"variants has {name!r}: {given!r}; {expected}")


class SeriesConfig(Section):
    """Several requests to forget on one model, for the command `series`."""

    kind: str = option(
        help="scalability: every set is unlearned from the target; sustainability: from the model before",
        choices=("scalability", "sustainability"),
    )
    forget: tuple[str, ...] = option(help="the forget source of each step, in order (in place of data.forget)")

    def __post_init__(self):
        super().__post_init__()
        if not self.forget:
            raise ConfigError("forget is an empty list; name the forget source of each step.")


class ExperimentConfig(Section):
    """Everything that decides a result. `resolve(ExperimentConfig, config_dict)` builds it."""

    name: str = option(help="name of the experiment")
    seed: int = option(0, help="seed of initial parameters and of batch order", minimum=0)
    methods: tuple[str, ...] = option(("uniform", "trace", "trace_rows"), help="compared", choices=tuple(METHODS))
    data: DataConfig = option("handbook", help="the corpora: `benchmark` and its settings")
    model: PretrainedConfig | ModelConfig = dataclasses.field(default_factory=ModelConfig)  # with a path: imported
    target: TrainingConfig | None = None  # how the model is trained; an imported one is not
    calibration: dict = dataclasses.field(default_factory=dict)
    unlearning: UnlearningConfig = dataclasses.field(default_factory=UnlearningConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    attacks: AttacksConfig | None = None
    parallel: ParallelConfig = PLAIN
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    series: SeriesConfig | None = None
    export: str | None = option(None, help="method whose model is exported into WORKDIR/export at the end")

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ConfigError(f"methods is empty; name at least one of {', '.join(METHODS)}.")
        if not self.name:
            raise ConfigError("name is empty; give the experiment a name.")
        if self.export is not None and self.export not in self.methods:
            raise ConfigError(f"export is {self.export!r}; expected one of the methods {', '.join(self.methods)}.")
        if isinstance(self.model, PretrainedConfig):
            for name, value in (("target", self.target), ("data.vocab_size", self.data.vocab_size)):
                if value is not None:
                    raise ConfigError(f"{name} would have no effect: model.path names a checkpoint. Remove one.")
        else:
            size = self.data.vocab_size or self.model.vocab_size
            if size > self.model.vocab_size:
                raise ConfigError(f"data.vocab_size is {size}, and the model knows {self.model.vocab_size} tokens.")
            object.__setattr__(self, "data", dataclasses.replace(self.data, vocab_size=size))
            object.__setattr__(self, "target", self.target or TrainingConfig())
        for method in self.methods:
            self.method(method)
        read = set().union(*(METHODS[method].reads for method in self.methods + self.study.methods))
        of_variants = (variant.get("calibration", {}) for variant in self.study.variants.values())
        given = functools.reduce(operator.or_, of_variants, self.calibration)
        for key in sorted(given.keys() - read):
            if not any(key in preset.reads for preset in METHODS.values()):
                resolve(Matching, {key: given[key]}, path="calibration")  # says what there is
            names = ", ".join(self.methods)
            raise ConfigError(f"calibration.{key} would have no effect: none of the methods {names} reads it.")

    def method(self, name: str, unlearning: Mapping = _NONE, calibration: Mapping = _NONE) -> Method:
        """The settings of one method: its preset, then `calibration` where the method reads it, then `unlearning`. What
        is given takes the place of the experiment's.
        """
        preset = METHODS[name]
        own = {key: value for key, value in {**self.calibration, **calibration}.items() if key in preset.reads}
        seed = {"seed": own.pop("seed")} if "seed" in own else {}
        settings = {**preset.weighting, **own}
        weighting = resolve(Weighting.kinds[settings.pop("name")], settings, path="calibration")
        weights = resolve(CalibrationConfig, {"weighting": weighting, **seed}, path="calibration")
        changes = as_dict(self.unlearning)
        if "objective" in unlearning:  # what goes with an objective follows the new one where it was not set
            usual = as_dict(UnlearningConfig(objective=self.unlearning.objective))
            changes = {name: value for name, value in changes.items() if value != usual[name] or name == "steps"}
            if not UnlearningConfig(objective=unlearning["objective"]).retains:
                changes = {name: value for name, value in changes.items() if name not in UnlearningConfig.OF_RETAIN}
        changes |= unlearning
        for length in ("steps", "epochs"):
            changes[length] = changes.get(length, 0) * preset.steps
        training = resolve(UnlearningConfig, changes, path="unlearning")
        if isinstance(getattr(weighting, "routing", None), Online):
            training.check_online()
        return Method(name, weights, training)

    def identity(self, data: DataConfig | None = None) -> str:
        """Hash of what a run directory stays the same run by: corpus and model. Other settings may change in it."""
        return fingerprint(data or self.data, self.model_identity())

    def identities(self) -> dict[str, str]:
        """Hashes of which one that stays is enough: files of text as they are spelled, and by their full paths."""
        return {"identity": self.identity(), "located": self.identity(self.data.located())}

    def model_identity(self) -> Any:
        """What tells the model apart: its settings, or the content of its checkpoint."""
        return self.model.identity() if isinstance(self.model, PretrainedConfig) else as_dict(self.model)


def load_config(
    name: str | Mapping[str, Any] | ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ExperimentConfig:
    """The experiment of a config file, or of settings, with overrides by dotted name applied.

    Another objective, or another kind of anything that has kinds, takes the place of the file's with its settings.
    What the file sets of a retain term that overrides take away is left out.

    Args:
      name: `FILE` or `FILE:variant`; or the settings that its get_config would return, in a mapping. These are left as
        they are.
      overrides: such as {"unlearning.steps": 100}.

    Raises:
      ConfigError: no such file, no `get_config` in it, an error in it, an unknown setting or a wrong value.

    Example:
      >>> data = {"benchmark": "text", "forget": "forget.txt", "retain": "retain.txt"}
      >>> config = tj.load_config({"name": "mine", "data": data}, {"unlearning.learning_rate": 1e-4})
      >>> config.methods, config.unlearning.learning_rate
      (('uniform', 'trace', 'trace_rows'), 0.0001)
    """
    values, overrides = _plain(name) if not isinstance(name, str) else _read(name), overrides or {}
    for path, value in overrides.items():
        _override(values, path, value)
    unlearning = values.get("unlearning")
    if isinstance(unlearning, dict) and {"unlearning.objective", "unlearning.retain_loss"} & overrides.keys():
        objective = unlearning.get("objective")
        kind = Objective.kinds.get(objective.get("name", "") if isinstance(objective, dict) else objective or "")
        if unlearning.get("retain_loss") == "none" or (kind is not None and not kind.retains):
            for setting in UnlearningConfig.OF_RETAIN:
                if f"unlearning.{setting}" not in overrides and unlearning.pop(setting, None) is not None:
                    say(f"unlearning.{setting} of the config file is left out: there is no retain term")
    return resolve(ExperimentConfig, values)


def _plain(values: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    return values.to_dict() if isinstance(values, ConfigDict) else as_dict(values)


def _read(name: str) -> dict[str, Any]:
    """What the get_config of `FILE` or `FILE:variant` returns; it takes the variant if the file has any."""
    file, _, variant = name.partition(":")
    if not Path(file).is_file():
        own, short = shipped_configs(), file.removeprefix("configs/").removesuffix(".py")
        if short not in own:
            raise ConfigError(
                f"{file}: no such config file{nearest(short, own)} Give --config a Python file with a get_config "
                f"function, or the name of one that comes with the package: {', '.join(own)}."
            )
        file = str(own[short])
    arguments = [variant] if variant else []
    sys.path.insert(0, str(Path(file).resolve().parent))  # for what configs share, which lies beside them
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise ConfigError(f"{file}: has no get_config function.")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            problem = f"has no variants, and {variant!r} is given" if variant else "needs a variant: FILE:variant"
            raise ConfigError(f"{file}: {problem}.") from None
        values = get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's code can raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        problem = f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            file, lines = error.filename or file, [error.lineno] * bool(error.lineno)
            problem = f"is not Python ({error.msg}); --config takes a Python file with a get_config function."
        line = f":{lines[-1]}" if lines else ""
        raise ConfigError(f"{file}{line}: {problem}") from error
    finally:
        del sys.path[0]
    if not isinstance(values, (Mapping, ConfigDict)):
        raise ConfigError(f"{file}: get_config returned {values!r}; expected a ConfigDict, or settings in a dict.")
    return _plain(values)


def _override(values: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for depth, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if depth and isinstance(inner, str):  # the name of a variant, such as an objective, that gets settings
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--config.{path}: {section} is a single setting, not a group of settings.")
        values = inner
    before = values.get(key)
    if not (isinstance(before, dict) and isinstance(value, str) and before.get("name") == value):
        values[key] = value  # a variant that is named as in the file keeps its settings there
