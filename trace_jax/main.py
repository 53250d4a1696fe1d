"""The command line: a table of commands, whose modules declare their own arguments and do the work.

A command's module has `add_arguments(parser)`, if it has any, and `main(options)`, which returns the exit code. It is
imported when its command is given, so that `--help` and `--version` load nothing.
"""

import argparse
import ast
import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trace_jax
from trace_jax.io.signals import Interrupted, endings, insist, interrupt

# Command: (module in trace_jax, what it does, options that it shares with others).
COMMANDS = {
    "run": ("run.methods", "unlearns with every method of an experiment, measures and reports", "config workdir"),
    "study": ("run.study", "compares methods over settings and seeds", "config workdir"),
    "series": ("run.series", "unlearns several forget sets, one after another", "config workdir"),
    "report": ("run.directory", "writes the report of a finished run again, or of several side by side", ""),
    "table": ("run.table", "writes the comparison of runs or studies as Markdown, LaTeX or CSV", ""),
    "evaluate": ("run.evaluate", "measures a checkpoint on the tasks of an experiment", "config"),
    "export": ("run.export", "writes an unlearned model as a Hugging Face checkpoint", "finished"),
    "lm-eval": ("run.lm_eval", "runs tasks of lm-eval on a checkpoint, or on a model of a run", ""),
    "verify": ("checkpoints.verify", "accounts for every tensor of a checkpoint; compares it with transformers", ""),
    "diagnose": ("run.diagnose", "says whether there is anything to calibrate, before training", ""),
    "plan": ("plan.plan", "says what an experiment takes on a machine that need not be there", "config"),
    "data": ("data.build", "builds published data sets; no TensorFlow", ""),
    "configs": ("run.configs", "lists the experiments that come with the package, for --config NAME", ""),
    "settings": ("run.settings", "every setting of an experiment: its default, what it may be, what it is", ""),
    "doctor": ("io.environment", "versions, devices, what is missing", ""),
}
_COMMANDS = "\n".join(f"  {name:<10}{about}" for name, (_, about, _) in COMMANDS.items())
_OVERVIEW = f"""usage: trace-jax [COMMAND] [OPTION ...]     (or python -m trace_jax.main)

commands (run if none is named; COMMAND --help says more):
{_COMMANDS}

first:       trace-jax --config quickstart
your text:   trace-jax --config text --config.data.forget=forget.jsonl --config.data.retain=retain.jsonl --dry-run
TRACE_JAX_TRACEBACK=1 in the environment shows where an error comes from."""
_EPILOG = """Any setting can be overridden: --config.unlearning.learning_rate=1e-5 (values are Python literals or text).
--config FILE:variant passes the variant to the file's get_config. `settings` lists all settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m trace_jax.main` and of `trace-jax`. Returns the exit code."""
    insist()
    for number in endings():
        signal.signal(number, interrupt)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return options.main(options)
    except KeyboardInterrupt as error:
        print("\ninterrupted; the same command continues where it stopped.", file=sys.stderr)
        return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
    except ModuleNotFoundError as error:
        package, root = (error.name or "").partition(".")[0], Path(trace_jax.__file__).parents[1]
        if package in ("", "trace_jax") or os.environ.get("TRACE_JAX_TRACEBACK"):
            raise
        install = f"{sys.executable} -m pip install {root if (root / 'pyproject.toml').exists() else package}"
        print(
            f"trace_jax: the package {package} is not installed for {sys.executable}; activate the environment that "
            f"has it (after scripts/quickstart.sh: source .venv/bin/activate), or: {install}",
            file=sys.stderr,
        )
        return 2
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        several = "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EPIPE) and _nobody_reads():
            return 128 + (signal.SIGHUP if error.errno == errno.EIO else signal.SIGPIPE)
        said = _of_jax(error, several) if isinstance(error, RuntimeError) else str(error)
        if not said or os.environ.get("TRACE_JAX_TRACEBACK"):
            raise
        print(f"trace_jax: {said}", file=sys.stderr, flush=True)
        if several:
            os._exit(2)  # at once: the other processes must not wait for this one
        return 2


def _nobody_reads() -> bool:
    """Whether standard output is gone: its terminal is closed, or its reader has ended. Then it goes nowhere."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _of_jax(error: RuntimeError, several: bool) -> str:
    """What is said of an error of JAX's runtime; "" of any other, and of one whose cause isn't known."""
    if type(error).__name__ != "JaxRuntimeError":
        return ""
    first = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in first:
        return f"{first} ... The command `plan` says what takes the memory, and which settings would fit."
    again = "Another process has ended, or is too slow to answer. Start all again: the run continues."
    return f"{first} ... {again}" if several else ""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; its command is their `main`, and `load_config()` makes the experiment."""
    rest = list(arguments)
    if rest[:1] == ["help"]:
        rest = [*rest[1:2], "--help"]
    if rest and rest[0] in ("-h", "--help", "--version"):
        print(trace_jax.__version__ if rest[0] == "--version" else _OVERVIEW)
        sys.exit(0)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "run"
    if name not in COMMANDS:
        near = "".join(f"; did you mean {close!r}?" for close in difflib.get_close_matches(name, COMMANDS, n=1))
        raise ValueError(f"there is no command {name!r}{near or '.'} Commands: {', '.join(COMMANDS)}.")
    module, about, shared = COMMANDS[name]
    command = importlib.import_module(f"trace_jax.{module}")
    parser = argparse.ArgumentParser(f"trace-jax {name}", description=about)
    if "config" in shared:
        parser.epilog = _EPILOG
        parser.add_argument(
            "--config",
            required=True,
            metavar="FILE[:variant]",
            help="the experiment: a Python file, or a name that `configs` lists",
        )
    if "workdir" in shared:
        where = "for its artefacts (or gs://BUCKET/NAME); made if missing; default: runs/ and the experiment's name"
        parser.add_argument("--workdir", metavar="DIR", help=where)
        parser.add_argument("--overwrite", action="store_true", help="replace a workdir of another corpus or model")
        parser.add_argument("--dry-run", action="store_true", help="check whether it would start; exit code 2 if not")
    if "finished" in shared:
        parser.add_argument("--workdir", required=True, metavar="DIR", help="a finished run, or gs://BUCKET/NAME")
    if hasattr(command, "add_arguments"):
        command.add_arguments(parser)
    parser.set_defaults(main=command.main)
    options, rest = parser.parse_known_args(rest)
    if getattr(options, "dry_run", False):
        options.main, options.command = importlib.import_module("trace_jax.run.check").main, name
    options.overrides = _overrides(parser, rest, settings="config" in shared)
    options.load_config = lambda: trace_jax.load_config(options.config, options.overrides)
    return options


def _overrides(parser: argparse.ArgumentParser, rest: list[str], *, settings: bool) -> dict[str, Any]:
    """Settings by dotted name: `--config.a.b=value` and `--config.a.b value` of what the parser left over."""
    overrides, words = {}, iter(rest)
    for word in words:
        if not (settings and word.startswith("--config.")):
            parser.error(f"unknown argument {word!r}" + (f"; {_spelling(word)}" if settings else ""))
        name, equals, value = word.removeprefix("--config.").partition("=")
        value = value if equals else next(words, None)
        if value is None:
            parser.error(f"--config.{name} needs a value: --config.{name}=value")
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        overrides[name] = value
    return overrides


def _spelling(word: str) -> str:
    """How the setting is given that an unknown argument seems to mean."""
    from trace_jax.run.settings import settings

    name, equals, value = word.lstrip("-").partition("=")
    paths = [s.path for s in settings() if f".{s.path}".endswith(f".{name}")]
    if not paths:
        return "settings are --config.section.name=value; the command `settings` lists them"
    return f"did you mean {' or '.join(f'--config.{path}{equals}{value}' for path in dict.fromkeys(paths))}?"


if __name__ == "__main__":
    sys.exit(main())
