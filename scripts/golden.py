"""Keeps the numbers of a few whole runs, and compares those of the code as it is now with them, to the last digit.

    python scripts/golden.py record ~/golden     # before a change that should move no number
    python scripts/golden.py check ~/golden      # after it; exit code 1 and the first differences if one moved
    python scripts/golden.py check ~/golden --only dry_runs imported

A record belongs to one machine: other instruction sets round otherwise. It needs what the tests need (`pip install
".[test]"`). Sixteen minutes on two cores for all parts, most of it the first two:

    quickstart   configs/quickstart.py
    attacks      its variant `attacks`, on top of it
    imported     a tiny checkpoint, made here, through every method of `METHODS`, exported at the end
    dry_runs     `--dry-run` of the published benchmarks
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before numpy and jax are imported: with another number of threads they sum in another order.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ.pop("NPROC", None)  # XLA takes as many as there are cores
ROOT = Path(__file__).resolve().parents[1]
# What a clock, a date or the spelling of settings decides.
PASSING = ("time", "seconds", "seconds_per_step", "step_seconds", "tokens_per_second", "generated", "table", "identity")
SETTINGS = re.compile(r"^/results/methods/[^/]+/(calibration|unlearning|attacks/[^/]+/settings)/")
SHOWN = 12
TEXT = "river stone apple cloud lamp tiger violin harbour window garden candle forest mirror ladder"
WORDS = TEXT.split(" ")
BENCHMARKS = ("wmdp_bio", "wmdp_cyber", "muse_books", "muse_news", "tofu")
IMPORTED = {
    "name": "golden",
    "model.dtype": "float32",
    "data.row_length": 32,
    "unlearning.steps": 6,
    "unlearning.learning_rate": 1e-2,
    "unlearning.warmup_steps": 1,
    "unlearning.evaluate_every": 2,
    "unlearning.checkpoint_every": 3,
    "evaluation.max_rows": 8,
    "evaluation.max_prompts": 4,
    "evaluation.bootstrap": 100,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the record is kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    options = parser.parse_args()
    directory, moved = options.directory.resolve(), []
    if options.action == "record":
        directory.mkdir(parents=True, exist_ok=True)
        make_inputs(directory)
    with tempfile.TemporaryDirectory(prefix="golden") as folder:
        for part in options.only:
            file = directory / f"{part}.json"
            if options.action == "check" and not file.is_file():
                sys.exit(f"{file} is not there; make it with the code that is trusted: golden.py record {directory}")
            print(f"{part}: running", flush=True)
            found = dict(flat(PARTS[part](directory, Path(folder) / "quickstart"), ""))
            if options.action == "record":
                file.write_text(json.dumps(found, indent=0, sort_keys=True))
                print(f"{part}: {len(found):,} values kept in {file}", flush=True)
            else:
                moved += [part] * report(part, json.loads(file.read_text()), json.loads(json.dumps(found)))
    return 1 if moved else 0


def report(part: str, expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Prints what differs, in the order of the record. Returns whether anything does."""
    keys = [key for key in {**expected, **found} if key.rpartition("/")[2] not in PASSING and not SETTINGS.match(key)]
    missing = object()
    moved = [key for key in keys if repr(expected.get(key, missing)) != repr(found.get(key, missing))]
    print(f"{part}: {len(keys) - len(moved):,} of {len(keys):,} values are the same", flush=True)
    for key in moved[:SHOWN]:
        print(f"  {key}: {expected.get(key, 'not there')!r} before, {found.get(key, 'not there')!r} now")
    if len(moved) > SHOWN:
        print(f"  and {len(moved) - SHOWN:,} more")
    return bool(moved)


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested mappings and lists, without what passes."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if key not in PASSING:
                yield from flat(item, f"{path}/{key}")
    else:
        yield path, value


def command(*arguments: str) -> str:
    """Runs the command line in this process; returns what it prints."""
    from trace_jax.main import main as run

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run(list(arguments))
    text = printed.getvalue()
    if code and "--dry-run" not in arguments:
        sys.exit(f"{' '.join(arguments)} ended with {code}:\n{text}")
    return text


def numbers(workdir: Path) -> dict[str, Any]:
    """Every number that a run leaves: results, the history of each method, and the tensors of its export."""
    found: dict[str, Any] = {"results": json.loads((workdir / "results.json").read_text())}
    for file in sorted(workdir.glob("methods/*/metrics.jsonl")):
        found[file.parent.name] = history(file)
    for file in sorted(workdir.glob("export/*.safetensors")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def history(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as records have them: an evaluation is one, and a step's hold what it computed."""
    found, measured = [], []
    for line in map(json.loads, file.read_text().splitlines()):
        kind, step, of_step = line.pop("kind"), line.pop("step"), ("tokens", "learning_rate")
        line.pop("identity")
        if kind == "measurement":
            measured.append(line)
        elif kind == "evaluation":
            found.append({"step": step, "evaluation": measured, **line})
            measured = []
        elif kind == "recalibration":
            found.append({"step": step, "recalibration": line})
        else:
            found.append({"step": step} | {name: value for name, value in line.items() if name not in of_step})
    return found


def quickstart(_: Path, workdir: Path) -> dict[str, Any]:
    command("--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(workdir))
    return numbers(workdir)


def attacks(_: Path, workdir: Path) -> dict[str, Any]:
    command("--config", str(ROOT / "configs/quickstart.py:attacks"), "--workdir", str(workdir))
    return {"results": numbers(workdir)["results"]}


def imported(record: Path, workdir: Path) -> dict[str, Any]:
    inputs, workdir = record / "inputs", workdir.with_name("imported")
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {
        **IMPORTED,
        "model.path": inputs / "checkpoint",
        "methods": _methods(),
        **{f"data.{name}": inputs / f"{name}.jsonl" for name in ("forget", "retain", "neighbour")},
    }
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    command("--config", str(ROOT / "configs/huggingface.py"), "--workdir", str(workdir), *overrides)
    return numbers(workdir)


def dry_runs(*_: Path) -> dict[str, Any]:
    """How often each number is printed; words and layout may change."""
    texts = {name: command("--config", str(ROOT / f"configs/{name}.py"), "--dry-run") for name in BENCHMARKS}
    return {name: collections.Counter(re.findall(r"\d[\d,.]*", text)) for name, text in texts.items()}


def _methods() -> tuple[str, ...]:
    from trace_jax.run.experiment import METHODS

    return tuple(METHODS)


def make_inputs(record: Path) -> None:
    """A tiny checkpoint with a tokenizer, and three files of text, kept with the record."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_checkpoints

    from trace_jax.data.rows import train_tokenizer

    inputs = record / "inputs"
    if inputs.exists():
        return
    inputs.mkdir()
    draw = random.Random(0)
    for name, words, count in (("forget", WORDS[:5], 12), ("retain", WORDS[4:], 60), ("neighbour", WORDS[2:8], 30)):
        texts = [" ".join(draw.choices(words, k=60)) for _ in range(count)]
        (inputs / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    checkpoint = inputs / "checkpoint"
    checkpoint.mkdir()
    model = tiny_checkpoints.build("olmoe", vocab_size=320, bos_token_id=None, eos_token_id=[2, 1], pad_token_id=2)
    tiny_checkpoints.save(model, "olmoe", checkpoint)
    train_tokenizer([TEXT] * 3, 320).save(str(checkpoint / "tokenizer.json"))


PARTS = {"quickstart": quickstart, "attacks": attacks, "imported": imported, "dry_runs": dry_runs}

if __name__ == "__main__":
    sys.exit(main())
