"""Plants faults in small runs, studies and series, and says what was lost: python -m tests.faults

Kills and signals come at random moments; a run that was disturbed has to end in the numbers of one that was not. Files
are damaged; a long run has to stay as small as it was, and a pod of four hosts in the numbers of one process. Takes
about 45 minutes on 2 cores; as root also on a disk that fills up or turns read-only.
"""

import argparse
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.faults import harness, interruptions, pod, soak, space
from tests.faults.interruptions import Tried
from trace_jax.io.environment import describe
from trace_jax.io.files import write_json

RESULTS = harness.ROOT / "benchmarks" / "results" / "faults.json"
KILLS = {"run": 20, "study": 15, "series": 15}
FEW_DAMAGES, DAMAGES = 24, {"study": 80, "series": 80}  # of a run every file in every way
ASKED = ("SIGTERM", "SIGINT", "SIGHUP", "terminal")


def disturbances(place: harness.Place, expected: dict[str, Any], *, kills: dict[str, int], seed: int) -> list[Callable]:
    """What is done to runs, each a call that returns what it tried."""
    rng, jobs = random.Random(seed), []
    for kind, count in kills.items():
        faults = ["SIGKILL"] * count + list(ASKED) * max(1, count // 8)
        rng.shuffle(faults)
        for number, part in enumerate((faults[::2], faults[1::2])):
            jobs.append(lambda k=kind, p=part, n=number: interruptions.chains(place, k, p, expected[k], seed + n))
    for kind in kills:
        most = interruptions.SECONDS[kind]
        jobs += [lambda k=kind, s=size: space.quota(place, k, expected[k], largest=s) for size in (300, 6000, 30_000)]
        for fault in (space.full_disk, space.read_only):
            moments = [rng.uniform(2.0, most) for _ in range(2)]
            jobs += [lambda k=kind, f=fault, m=moment: f(place, k, expected[k], after=m) for moment in moments]
    return jobs


def two_at_once(place: harness.Place) -> list[Tried]:
    """The second of two processes on one workdir is refused and told who is there; the first goes on."""
    workdir = place.folder / "two"
    first = place.start("run", workdir)
    while not (workdir / ".lock").exists():
        time.sleep(0.05)
    second = place.run("run", workdir)
    refused = second.code == 2 and f"process {first.pid} on" in second.sentence and not second.problem
    problem = "" if refused else f"exit code {second.code}: {second.said[-500:]}"
    ended = harness.wait(first)
    if ended.code:
        problem = problem or f"the first ended with {ended.code}: {ended.said[-500:]}"
    return [Tried("two at once", "data", problem)]


def done(jobs: Iterable[Callable[[], Any]], workers: int) -> Iterator[list[Tried]]:
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(job) for job in jobs]):
            try:
                found = future.result()
                yield found if isinstance(found, list) else [found] * (found is not None)
            except PermissionError as error:
                print(f"left out: {error}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--few", action="store_true", help="a few of each, no pod and no long run: two minutes")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(harness.ROOT)}; none if --few")
    options = parser.parse_args()
    began, tried = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        place = harness.Place(Path(scratch) / "place")
        kills = {"run": 3} if options.few else KILLS
        whole = {kind: place.folder / f"whole-{kind}" for kind in kills}
        for kind, path in whole.items():
            if (ended := place.run(kind, path)).code:
                print(ended.said, file=sys.stderr)
                return 1
        place.run("run", other := place.folder / "other", "--config.seed=1", "--config.data.seed=1")
        expected = {kind: harness.numbers(kind, path) for kind, path in whole.items()}
        jobs = disturbances(place, expected, kills=kills, seed=options.seed)
        jobs = jobs[::3] if options.few else [lambda: soak.soak(place), *jobs]
        for found in done([lambda: two_at_once(place), *jobs], options.workers):
            tried += told(found, began)
        tried += told(damages(place, whole, other, few=options.few), began)
        if not options.few:
            tried += told(pod.scenarios(place), began)
    rows = table(tried)
    print("\n".join(" | ".join(map(str, row)) for row in rows))
    lost = sum(bool(one.problem) for one in tried)
    print(f"{len(tried)} faults planted, {lost} of them lost something, {time.monotonic() - began:.0f} s")
    if options.output or not options.few:
        about = {"command": "python -m tests.faults", "seconds": round(time.monotonic() - began), "seed": options.seed}
        write_json(options.output or RESULTS, about | {"environment": describe(), "rows": rows[1:]})
    return int(lost > 0)


def told(found: Iterable[Tried], began: float) -> Iterator[Tried]:
    for one in found:
        outcome = f"LOST: {one.problem}" if one.problem else "nothing lost"
        print(f"{time.monotonic() - began:5.0f} s  {one.fault}, {one.stage}: {outcome}", file=sys.stderr, flush=True)
        yield one


def damages(place: harness.Place, whole: dict[str, Path], other: Path, *, few: bool) -> Iterator[Tried]:
    """In a process whose programs are as small as the runs': the starts are in it."""
    code = "from tests.faults.damage import as_lines; as_lines()"
    for kind, path in whole.items():
        most = FEW_DAMAGES if few else DAMAGES.get(kind)
        arguments = [str(place.folder), kind, str(path), str(other), *([] if most is None else [str(most)])]
        with harness.start([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=None) as process:
            yield from (Tried(*json.loads(line)) for line in process.stdout or ())
        if process.returncode:
            yield Tried("damage", kind, f"the check itself ended with {process.returncode}")


def table(tried: Iterable[Tried]) -> list[list[Any]]:
    """Of each fault and stage how often it was tried, and how often something was lost."""
    groups = collections.defaultdict(list)
    for one in tried:
        where = one.stage if "/" not in one.stage and "." not in one.stage else "a finished run"
        groups[one.fault, where].append(bool(one.problem))
    return [["fault", "stage", "tried", "lost"], *([*k, len(v), sum(v)] for k, v in sorted(groups.items()))]


if __name__ == "__main__":
    sys.exit(main())
