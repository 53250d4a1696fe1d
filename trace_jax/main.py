"""Command line. Kept short, so that everything else can be imported from a notebook."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError, Section, is_read, resolve
from trace_jax.io.progress import say
from trace_jax.io.signals import Interrupted, interrupt

_WITHOUT_WORKDIR = ("plan", "evaluate")
_EPILOG = """any setting can be overridden: --config.unlearning.learning_rate=1e-5 (values are Python literals or text).
--config FILE:variant passes the variant to the file's get_config."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m trace_jax.main` and of `trace-jax`. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in _COMMANDS else "run"
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return _COMMANDS[command](arguments)
    except KeyboardInterrupt as error:
        print("\ninterrupted; the same command continues where it stopped.", file=sys.stderr)
        return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
    except (ConfigError, ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("TRACE_JAX_TRACEBACK"):
            raise
        print(f"trace_jax: {error}", file=sys.stderr, flush=True)
        return _ended(2)


def _ended(code: int) -> int:
    """The exit code of a run that failed. One of several processes ends at once: the others must not wait for it."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)
    return code


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The `ExperimentConfig` of a config file (`FILE` or `FILE:variant`), with dotted overrides applied.

    What the file sets and an override leaves without effect, such as a number of another objective, is left out.

    Raises:
      ConfigError: no such file, no `get_config` in it, an unknown setting or a wrong value.
    """
    from trace_jax.run.experiment import ExperimentConfig

    file, _, variant = name.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such config file. Give --config a Python file with a get_config function.")
    sys.path.insert(0, str(Path(file).resolve().parent))  # for what configs share, which lies beside them
    try:
        get_config = runpy.run_path(file)["get_config"]
        values = _values(get_config, file, variant)
    except KeyError:
        raise ConfigError(f"{file}: has no get_config function.") from None
    finally:
        del sys.path[0]
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    before = copy.deepcopy(values)
    for path, value in (overrides or {}).items():
        _override(values, path, value)
    for path in _left_unread(before, values, overrides or {}):
        section, key = path.split(".")
        say(f"{file}: {path} = {values[section].pop(key)!r} is not read with these settings, and left out")
    return resolve(ExperimentConfig, values)


def _left_unread(before: Mapping[str, Any], values: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Settings of the file that are read without the overrides, and are not with them."""
    from trace_jax.run.experiment import ExperimentConfig

    sections = {f.name: f.default_factory for f in dataclasses.fields(ExperimentConfig)}
    found = []
    for section in {path.partition(".")[0] for path in overrides}:
        cls, given = sections.get(section), before.get(section)
        if isinstance(cls, type) and issubclass(cls, Section) and isinstance(given, Mapping):
            known = {f.name for f in dataclasses.fields(cls)}
            for key in set(given) & known - {path.partition(".")[2] for path in overrides}:
                if is_read(cls, given, key) and not is_read(cls, values[section], key):
                    found.append(f"{section}.{key}")
    return sorted(found)


def _values(get_config: Callable, file: str, variant: str) -> Any:
    """What the file's get_config returns; it takes the variant if the file has any."""
    given = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        expected = "needs a variant: FILE:variant" if not given else f"has no variants, and {variant!r} is given"
        raise ConfigError(f"{file}: {expected}.") from None
    return get_config(*given)


def _override(values: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for depth, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if depth and isinstance(inner, str):  # the name of a variant, such as an objective, that gets settings
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--config.{path}: {section} is a single setting, not a group of settings.")
        values = inner
    known = values.get(key)
    if not (isinstance(known, dict) and isinstance(value, str) and known.get("name") == value):
        values[key] = value  # a variant that is named as in the file keeps its settings there


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _parser(command: str, *, config: bool, parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    about = f"commands: {', '.join(_COMMANDS)} (run if none is named)"
    parser = argparse.ArgumentParser(
        f"trace_jax.main {command}", description=about, epilog=_EPILOG, formatter_class=formatter, parents=parents
    )
    if config:
        parser.add_argument("--config", required=True, metavar="FILE[:variant]", help="the experiment")
    if command not in _WITHOUT_WORKDIR:
        parser.add_argument(
            "--workdir",
            required=not config,
            metavar="DIR",
            help="where its artefacts are (a directory, or gs://BUCKET/NAME)"
            + ("; made if missing. Default: runs/ and the experiment's name" if config else ""),
        )
    return parser


def _parse(command: str, arguments: Sequence[str], *parents: argparse.ArgumentParser) -> tuple[argparse.Namespace, Any]:
    """Options, and the experiment with its `--config.a.b=value` overrides."""
    parser = _parser(command, config=True, parents=parents)
    if command not in _WITHOUT_WORKDIR:
        parser.add_argument("--overwrite", action="store_true", help="replace a workdir of another corpus or model")
    options, rest = parser.parse_known_args(arguments)
    overrides = {}
    while rest:
        name = rest.pop(0)
        if not name.startswith("--config."):
            parser.error(f"unknown argument {name!r}; settings are given as --config.section.name=value")
        name, equals, value = name.removeprefix("--config.").partition("=")
        if not equals and not rest:
            parser.error(f"--config.{name} needs a value: --config.{name}=value")
        overrides[name] = _literal(value if equals else rest.pop(0))
    config = load_config(options.config, overrides)
    if command not in _WITHOUT_WORKDIR:
        options.workdir = options.workdir or f"runs/{config.name}"
    return options, config


def _several() -> argparse.ArgumentParser:
    """Options of a command that runs on several hosts."""
    several = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = several.add_argument_group("several processes", "found by itself on Cloud TPU, GKE, Slurm and Open MPI")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    return several


def _start(options: argparse.Namespace) -> None:
    """What comes before the first use of a device."""
    from trace_jax.parallel.memory import keep_freed_memory
    from trace_jax.parallel.processes import start_processes

    keep_freed_memory()
    start_processes(options.coordinator, options.num_processes, options.process_id)


def _run(arguments: Sequence[str]) -> int:
    several = _several()
    several.add_argument("--dry-run", action="store_true", help="check everything that needs no weights; no --workdir")
    options, config = _parse("run", arguments, several)
    if options.dry_run:
        return _dry_run(config)
    _start(options)
    from trace_jax.run.methods import run

    if text := run(config, options.workdir, overwrite=options.overwrite):
        print(text)
    return 0


def _dry_run(config: Any) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    from trace_jax.run.check import dry_run

    found = dry_run(config)
    print(found.text)
    return 2 if found.wrong else 0


def _study(arguments: Sequence[str]) -> int:
    options, config = _parse("study", arguments)
    from trace_jax.run.study import run_study

    print(run_study(config, options.workdir, overwrite=options.overwrite))
    return 0


def _series(arguments: Sequence[str]) -> int:
    options, config = _parse("series", arguments, _several())
    _start(options)
    from trace_jax.run.series import run_series

    if text := run_series(config, options.workdir, overwrite=options.overwrite):
        print(text)
    return 0


def _report(arguments: Sequence[str]) -> int:
    options = _parser("report", config=False).parse_args(arguments)
    from trace_jax.run.results import write_run_report

    print(write_run_report(options.workdir))
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = _parser("export", config=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="where the checkpoint goes; made")
    parser.add_argument("--method", metavar="LABEL", help="whose model; needed where the run has several methods")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    from trace_jax.run.export import export_run

    print(export_run(options.workdir, options.output, label=options.method, overwrite=options.overwrite))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--checkpoint", required=True, metavar="DIR", help="the Hugging Face checkpoint that is measured")
    own.add_argument("--original", metavar="DIR", help="the model before unlearning, to compare with")
    own.add_argument("--retrained", metavar="DIR", help="a model trained without the forget set, to compare with")
    own.add_argument("--output", required=True, metavar="DIR", help="where results.json and scores go; made if missing")
    checkpoint = own.parse_known_args(arguments)[0].checkpoint
    options, config = _parse("evaluate", [*arguments, f"--config.model.path={checkpoint}"], own)
    from trace_jax.run.evaluate import evaluate_checkpoints

    found = evaluate_checkpoints(
        config, options.checkpoint, options.output, original=options.original, retrained=options.retrained
    )
    print(found)
    return 0


def _lm_eval(arguments: Sequence[str]) -> int:
    parser = _lm_eval_parser()
    options = parser.parse_args(arguments)
    if (options.method and options.checkpoint) or (options.dtype and options.workdir):
        parser.error("--method belongs to --workdir, and --dtype to --checkpoint.")
    from trace_jax.evaluation.lm_eval import evaluate_tasks, table
    from trace_jax.parallel.config import PLAIN

    mesh, include = PLAIN.mesh(), [options.include_path] if options.include_path else []
    if options.workdir:
        from trace_jax.evaluation.lm_eval_task import EMBEDDED, export_tasks
        from trace_jax.run.export import find_model

        found = find_model(options.workdir, options.method)
        identity, load = found.identity, functools.partial(found.load, mesh)
        options.output = options.output or found.workdir / "lm_eval" / f"{found.label}.json"
        if found.config.data.benchmark in EMBEDDED:
            include.append(export_tasks(found.config.data, found.workdir / "lm_eval" / "tasks"))
            options.tasks = options.tasks or found.config.data.benchmark
    else:
        from trace_jax.checkpoints.config import PretrainedConfig
        from trace_jax.checkpoints.pretrained import load_pretrained

        checkpoint = PretrainedConfig(path=options.checkpoint, dtype=options.dtype or "bfloat16")
        identity = checkpoint.identity()
        load = functools.partial(load_pretrained, checkpoint.path, dtype=checkpoint.dtype, mesh=mesh)
    if not options.tasks:
        parser.error("--tasks is needed: which tasks, such as --tasks wmdp_bio,mmlu.")
    given = {name: getattr(options, name) for name in ("num_fewshot", "limit", "batch_size", "max_length", "output")}
    print(table(evaluate_tasks(load, options.tasks.split(","), identity=identity, include=include, mesh=mesh, **given)))
    return 0


def _lm_eval_parser() -> argparse.ArgumentParser:
    about = "runs tasks of lm-eval on a checkpoint, or on a model of a run"
    parser = argparse.ArgumentParser("trace_jax.main lm-eval", description=about)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="DIR", help="a Hugging Face checkpoint")
    which.add_argument("--workdir", metavar="DIR", help="a finished run")
    parser.add_argument("--method", metavar="LABEL", help="whose model of the run; target: what all started from")
    parser.add_argument(
        "--tasks",
        metavar="T,T",
        help="tasks, groups or tags, such as wmdp_bio,mmlu. A run on handbook or presidents has its questions as tasks "
        "of that name, which are the default",
    )
    parser.add_argument("--include-path", metavar="DIR", help="a directory of your own task files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt; default: the task's own")
    parser.add_argument("--limit", type=float, metavar="N", help="questions per task, or a share below 1; to try out")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at a time; default 16")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens read at once; default: as config.json says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a checkpoint's weights; default bfloat16")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the results of a task are kept as soon as it is finished, and found again (JSON); default with "
        "--workdir: lm_eval/LABEL.json in it",
    )
    return parser


def _verify(arguments: Sequence[str]) -> int:
    from trace_jax.checkpoints.verify import verify_main

    return verify_main(arguments)


def _plan(arguments: Sequence[str]) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where = own.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="NAME", help="a slice of TPU chips: v5e:4x4, v5p:2x2x4, v6e:4x4")
    where.add_argument("--gpus", type=int, metavar="N", help="so many GPUs")
    where.add_argument("--cpu", type=int, metavar="N", help="this machine, as N simulated devices")
    own.add_argument("--gpu", default="h100", metavar="NAME", help="which GPUs: a100, h100 (default), h200, b200")
    own.add_argument("--price", type=float, metavar="P", help="of one chip for an hour, for the cost of 1,000 steps")
    own.add_argument("--search", action="store_true", help="try all meshes and microbatches; rank those that fit")
    own.add_argument("--json", metavar="FILE", help="write every number there")
    options, config = _parse("plan", arguments, own)
    import jax

    jax.config.update("jax_platforms", "cpu")  # devices that are planned for are described, not opened
    from trace_jax.plan.plan import plan
    from trace_jax.plan.target import cpus, gpus, tpu_slice

    if options.topology:
        target = tpu_slice(options.topology)
    else:
        target = gpus(options.gpus, options.gpu) if options.gpus else cpus(options.cpu, config.model.dtype)
    print(plan(config, target, price=options.price, search=options.search, output=options.json))
    return 0


def _data(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("trace_jax.main data", description="builds published data sets; no TensorFlow")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print which there are: rows, revision, licence, gated")
    what.add_argument("--name", metavar="NAME[/CONFIG]", help="build this one, or one configuration of it")
    parser.add_argument("--source", default="hub", metavar="DIR", help="its files as downloaded; default: the hub")
    parser.add_argument("--revision", metavar="R", help="commit, branch or tag of the hub, instead of the pinned one")
    parser.add_argument("--data-dir", metavar="DIR", help="where it goes; default: TFDS_DATA_DIR or tfds' own")
    parser.add_argument("--accept-counts", action="store_true", help="build with other numbers of rows than recorded")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = vars(parser.parse_args(arguments))
    from trace_jax.data.published.build import build
    from trace_jax.data.published.table import overview

    print(overview() if options.pop("list") else build(**options))
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser("trace_jax.main doctor", description="versions, devices, what is missing").parse_args(
        arguments
    )
    from trace_jax.io.environment import diagnose

    text, healthy = diagnose()
    print(text)
    return 0 if healthy else 1


_COMMANDS = {
    "run": _run,
    "study": _study,
    "series": _series,
    "report": _report,
    "evaluate": _evaluate,
    "export": _export,
    "lm-eval": _lm_eval,
    "verify": _verify,
    "plan": _plan,
    "data": _data,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
