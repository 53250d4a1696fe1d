"""Tasks of lm-eval on a checkpoint, or on a model of a run: `python -m trace_jax.main lm-eval`."""

import argparse
import functools

from trace_jax.checkpoints.pretrained import PretrainedConfig, load_pretrained
from trace_jax.config import ConfigError
from trace_jax.io.files import as_path
from trace_jax.parallel.mesh import PLAIN
from trace_jax.run.export import find_model, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="DIR", help="a Hugging Face checkpoint")
    which.add_argument("--workdir", metavar="DIR", help="a finished run")
    parser.add_argument("--method", metavar="LABEL", help="whose model of the run; target: what all started from")
    names = "tasks, groups or tags, such as wmdp_bio,mmlu; default with --workdir: the questions of its benchmark"
    parser.add_argument("--tasks", metavar="T,T", help=names)
    parser.add_argument("--include-path", metavar="DIR", help="a directory of your own task files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt; default: the task's own")
    parser.add_argument("--limit", type=float, metavar="N", help="questions per task, or a share below 1; to try out")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at a time; default 16")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens read at once; default: as config.json says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a checkpoint's weights; default bfloat16")
    where = "JSON, where each finished task is kept and found again; default with --workdir: lm_eval/LABEL.json in it"
    parser.add_argument("--output", metavar="FILE", help=where)


def main(options: argparse.Namespace) -> int:
    if (options.method and options.checkpoint) or (options.dtype and options.workdir):
        raise ConfigError("--method belongs to --workdir, and --dtype to --checkpoint.")
    from trace_jax.tasks.lm_eval import evaluate_tasks, export_tasks, table  # needs lm-eval

    mesh, tasks, output = PLAIN.mesh(), options.tasks, options.output
    include = [options.include_path] if options.include_path else []
    if options.workdir:
        path = as_path(options.workdir)
        config, label, identity = find_model(path, options.method)
        load = functools.partial(load_model, config, path, label, mesh)
        output = output or path / "lm_eval" / f"{label}.json"
        if not config.data.forget_sources:
            include.append(export_tasks(config.data, path / "lm_eval" / "tasks"))
            tasks = tasks or config.data.name
    else:
        checkpoint = PretrainedConfig(path=options.checkpoint, dtype=options.dtype or "bfloat16")
        identity = checkpoint.identity()
        load = functools.partial(load_pretrained, checkpoint.path, dtype=checkpoint.dtype, mesh=mesh)
    if not tasks:
        raise ConfigError("--tasks is needed: which tasks, such as --tasks wmdp_bio,mmlu.")
    settings = {name: getattr(options, name) for name in ("num_fewshot", "limit", "batch_size", "max_length")}
    where = {"output": output, "include": include, "mesh": mesh}
    print(table(evaluate_tasks(load, tasks.split(","), identity=identity, **where, **settings)))
    return 0
