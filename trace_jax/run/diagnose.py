"""Whether there is anything to calibrate, from texts or captures of routing: `python -m trace_jax.main diagnose`."""

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from trace_jax.checkpoints.pretrained import load_pretrained
from trace_jax.config import ConfigError
from trace_jax.data.rows import read_codec, sequential_batches
from trace_jax.data.sources import read_source
from trace_jax.data.text import rows_of_documents
from trace_jax.io import files
from trace_jax.io.environment import describe
from trace_jax.io.progress import tracked
from trace_jax.parallel.mesh import PLAIN
from trace_jax.report.page import render
from trace_jax.routing.captures import join, read_capture
from trace_jax.routing.diagnosis import MIN_ROWS, diagnose
from trace_jax.routing.statistics import Assignments, expert_assignments

_LONGEST_ROW, _SHORTEST_ROW, _ROWS = 512, 32, 4 * MIN_ROWS  # of texts; rows are halved until there are so many
_BATCH_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", required=True, metavar="F", help="a capture (.npz, .npy), or a text (.jsonl, ...)")
    parser.add_argument("--retain", required=True, nargs="+", metavar="R", help="one capture or text, or several")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--num-experts", type=int, metavar="E", help="routed experts of a layer: F and R are captures")
    which.add_argument("--checkpoint", metavar="DIR", help="the model that routes F and R, which are texts")
    parser.add_argument("--output", required=True, metavar="DIR", help="for diagnosis.json and diagnosis.html; made")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier diagnosis there")


def main(options: argparse.Namespace) -> int:
    output = Path(os.path.abspath(options.output))
    if files.is_remote(options.output) or (output.exists() and not options.overwrite):
        raise ConfigError(f"{options.output}: exists, or is no local path; choose another directory (or --overwrite).")
    if output.exists() and not (output / "diagnosis.json").exists():
        raise ConfigError(f"{output}: holds no earlier diagnosis, and is not replaced by one; choose another place.")
    if options.checkpoint:
        forget, retain, num_experts = _route(options.checkpoint, [options.forget], options.retain)
    else:
        num_experts = options.num_experts
        forget, *rest = (read_capture(path, num_experts) for path in (options.forget, *options.retain))
        retain = join(rest)
    found = diagnose(forget, retain, num_experts=num_experts)
    given = {name: getattr(options, name) for name in ("forget", "retain", "num_experts", "checkpoint")}
    saved = found.to_json() | {"given": given, "environment": describe()}
    frequency = {name: saved[name] for name in ("forget", "retain", "layers")}
    frequency |= {"uniform": found.top_k / num_experts, "calibrated": {}, "selected": {"": saved["selected"]}}
    page = {
        "title": "Diagnosis before training", "benchmark": "", "forgetting": "", "chance": None,
        "generated": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        "verdict": saved["sentence"], "diagnosis": saved, "frequency": frequency, "config": given,
        "environment": saved["environment"],
    }  # fmt: skip
    with files.replacing(output) as directory:
        directory.mkdir()
        files.write_json(directory / "diagnosis.json", saved)
        (directory / "diagnosis.html").write_text(render(page), encoding="utf-8")
    print(f"{found.text()}\n\ndiagnosis: {output / 'diagnosis.html'}")
    return 0


def _route(checkpoint: str, *texts: Sequence[str]) -> tuple[Assignments, Assignments, int]:
    """Routing of two texts, of one or several sources each, and the number of experts."""
    codec, mesh, routed = read_codec(checkpoint), PLAIN.mesh(), []
    documents = [[d for source in sources for d in read_source(source)[0]] for sources in texts]
    model = load_pretrained(checkpoint, dtype="bfloat16", mesh=mesh)
    for text in documents:
        length, rows = _LONGEST_ROW, rows_of_documents(codec, text, _LONGEST_ROW)
        while len(rows) < _ROWS and length > _SHORTEST_ROW:
            length //= 2
            rows = rows_of_documents(codec, text, length)
        batches = tracked(sequential_batches(rows, _BATCH_SIZE), "routing", -(-len(rows) // _BATCH_SIZE))
        routed.append(expert_assignments(model, batches, mesh=mesh))
    return routed[0], routed[1], model.config.num_experts
