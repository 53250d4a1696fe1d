"""Every file of a finished run is cut short, emptied, changed by a bit, replaced by that of another run, removed: what
reads the run refuses it by name, and the next start makes it anew; nothing is believed.
"""

import collections
import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.harness import Place, leftovers, numbers
from tests.faults.interruptions import Tried
from trace_jax.config import ConfigError
from trace_jax.main import main
from trace_jax.run.result import open_run

# A person looks at these, and nothing reads them; every start writes them.
SHOWN = ("report.html", "figures/")
AT_ONCE = 16
KINDS = ("cut short", "emptied", "a bit", "of another run", "removed")


def damaged(path: Path, kind: str, other: Path, rng: random.Random) -> bool:
    """Whether the file could be damaged so; `other` is the same file of another run."""
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "of another run":
        if not other.exists() or other.read_bytes() == content:
            return False
        shutil.copy(other, path)
    elif not content:
        return False
    elif kind == "a bit":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "cut short" else b"")
    return True


def told(command: list[str]) -> tuple[int, str]:
    """Exit code and what was said, of a command in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(command)
    return code, said.getvalue()


def damage_all(place: Place, kind: str, whole: Path, other: Path, *, most: int | None = None) -> Iterator[Tried]:
    """Each damage of each file of the finished run `whole`, or `most` of them; `other`: a run of other data.

    What reads a run is asked of each alone. Starts take seconds, so that one of them finds several files damaged.
    """
    expected, rng, workdir = numbers(kind, whole), random.Random(0), whole.with_name(f"{whole.name}-damaged")
    files = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    cases = [(file, how) for file in files if not file.startswith(SHOWN) for how in KINDS]
    if most is not None:
        cases = rng.sample(cases, most)
    rng.shuffle(cases)
    waiting = collections.deque(cases)
    while waiting:
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(whole, workdir)
        together: dict[
            str, tuple[str, bytes | None, str]
        ] = {}  # of each damaged file: how, its content, who refused it
        for _ in range(len(waiting)):
            file, how = waiting.popleft()
            alone = Path(file).name == "config.json"  # without it nobody knows which run it is
            refuses = any(Path(other).name == "config.json" for other in together)
            if file in together or len(together) == AT_ONCE or (alone and together) or refuses:
                waiting.append((file, how))
                continue
            if damaged(workdir / file, how, other / file, rng):
                together[file] = how, content(workdir / file), reader(workdir)
                if not alone:
                    shutil.copy(whole / file, workdir / file)
        for file, (_, broken, _) in together.items():
            (workdir / file).unlink(missing_ok=True)
            if broken is not None:
                (workdir / file).write_bytes(broken)
        wrong = start_again(place, kind, workdir, expected) if together else ""
        for file, (how, broken, refused) in together.items():
            yield Tried(f"file {how}", file, verdict(file, broken, refused, wrong, content(workdir / file)))
    shutil.rmtree(workdir, ignore_errors=True)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def reader(workdir: Path) -> str:
    """Why what reads a finished run refuses it; "" if it doesn't."""
    try:
        open_run(workdir)
    except (ConfigError, ValueError) as error:
        return str(error)
    return ""


def start_again(place: Place, kind: str, workdir: Path, expected: Any) -> str:
    """What is wrong after the same command; "" if nothing, or its sentence where it refuses."""
    try:
        code, said = told(place.command(kind, workdir)[3:])
    except Exception as error:  # what a person would see as a traceback
        return f"a traceback, {type(error).__name__}: {error}"
    if code:
        return next((line for line in said.splitlines() if line.startswith("trace_jax: ")), said[-300:])
    if numbers(kind, workdir) != expected:
        return "other numbers"
    left = leftovers(workdir)
    return f"left behind: {', '.join(left)}" if left else ""


def verdict(file: str, broken: bytes | None, refused: str, wrong: str, now: bytes | None) -> str:
    """What should not have been; "" if nothing."""
    # A marker tells of the files that it names, and of a directory of them as a whole.
    named = Path(file).name in refused or ".stage." in file or f"{Path(file).parent} is not" in refused
    if refused and not named and "holds no run" not in refused:
        return f"refused without naming it: {refused}"
    if Path(file).name == "config.json" and wrong.startswith("trace_jax: ") and str(Path(file).parent) in wrong:
        return ""  # refused at the start as well
    if wrong:
        return wrong
    if now == broken:
        return "refused, but not made anew" if refused else "unnoticed"
    return ""


def as_lines() -> None:
    """A line of JSON for each damage: folder of the data, kind, whole run, other run, and at most how many."""
    folder, kind, whole, other, *most = sys.argv[1:]
    out, place = sys.stdout, Place(Path(folder))
    for one in damage_all(place, kind, Path(whole), Path(other), most=int(most[0]) if most else None):
        print(json.dumps(one), file=out, flush=True)
