"""Writes what was measured into the documentation: claims, each study's section, the leaderboard, planted faults.

python scripts/results.py            # from benchmarks/results/{studies/*,faults}.json, into docs/ and README.md
python scripts/results.py --check    # names what does not say what the results say; exits with 1 if there is any

Text stands between marks, `<!-- NAME: written by scripts/results.py -->` and `<!-- end of NAME -->`, where NAME is
`claims`, `headlines`, `leaderboard`, `faults` or the name of a study; what is outside is written by hand. A study's
section has all of its claims; those of the place "page" or "readme" are in the table of claims, too, those of "readme"
are the headlines. A claim's verdict is computed: established if its whole interval lies on the side that the claim
says, refuted if it lies on the other, open otherwise.
"""

import argparse
import collections
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.io.drawing import INK, MUTED, SERIES, WIDTH, Figure, as_files, panel

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md", "docs/leaderboard.md", "docs/choosing.md", "docs/reliability.md")
IMAGES = "docs/images/studies"
_BLOCK = re.compile(r"(<!-- (\w+): written by scripts/results\.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MINUS = str.maketrans("-", "\N{MINUS SIGN}")


def studies(directory: Path) -> dict[str, dict[str, Any]]:
    """Every study by name, in the order of their questions."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    return {study["name"]: study for study in sorted(found, key=lambda s: (s["question"], s["name"]))}


def verdict(claim: Mapping[str, Any]) -> str:
    """What the interval says of a claim; one without an interval stays open."""
    low, high, bound, above = claim["low"], claim["high"], claim["bound"], claim["holds"] == "above"
    if low is None or high is None:
        return "open"
    on_side = low > bound if above else high < bound
    on_other = high < bound if above else low > bound
    return "established" if on_side else "refuted" if on_other else "open"


# --- text


def number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}".translate(_MINUS)


def cell(value: Any) -> str:
    """A number, a number with its interval, or text."""
    if isinstance(value, Mapping):
        ends = value.get("low"), value.get("high")
        return number(value["value"]) + ("" if None in ends else f" [{number(ends[0])}, {number(ends[1])}]")
    if isinstance(value, float) or value is None:
        return number(value)
    return str(value).replace("|", "\\|")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table: text to the left, numbers to the right."""
    kinds = [all(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    lines = [list(columns), ["---" if text else "---:" for text in kinds], *([cell(v) for v in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claims_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What all say together, and one row per claim that matters most, by question."""
    said = collections.Counter(verdict(c) for s in found.values() for c in s["claims"])
    total = ", ".join(f"{said[word]} {word}" for word in ("established", "refuted", "open"))
    columns = ["question", "claim", "verdict", "measured", "what"]
    rows = [[f"[{s['question']}](#{anchor(s)})", *_told(c)] for s in found.values() for c in s["claims"] if c["place"]]
    count = f"{sum(said.values())} claims: {total}. Those that matter most; each section has all of its own.\n\n"
    return count + markdown(columns, rows)


def _told(claim: Mapping[str, Any]) -> list[str]:
    return [claim["claim"], f"**{verdict(claim)}**", cell(claim), claim["measure"]]


def anchor(study: Mapping[str, Any]) -> str:
    """As GitHub and myst make it of the heading, which the study's title is."""
    return re.sub(r"[^\w\- ]", "", study["title"].lower()).replace(" ", "-")


def headlines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The claims for the README, a line each."""
    claims = [(s, c) for s in found.values() for c in s["claims"] if c["place"] == "readme"]
    return "".join(f"- **{verdict(c)}**: {c['claim']} ({c['measure']}: {cell(c)}; {c['over']}).\n" for _, c in claims)


def section(study: Mapping[str, Any]) -> str:
    """Command, machine, figures, claims and tables of a study."""
    machine = study["environment"]
    took = f"{study['seconds'] / 60:.0f} minutes on {machine['cores']} cores ({machine['cpu']})"
    seeds = f"; seeds {', '.join(map(str, study['seeds']))}" if study["seeds"] else ""
    link = f"[{study['name']}.json](https://github.com/trace-jax/trace_jax/blob/main/benchmarks/results/studies/"
    parts = [f"    {study['command']}\n", f"{took}{seeds}. Numbers: {link}{study['name']}.json).\n"]
    for figure in study["figures"]:
        parts.append(f"![{figure['title']}](images/studies/{figure['name']}.svg)\n\n*{figure['caption']}*\n")
    rows = [[*_told(claim), claim["over"]] for claim in study["claims"]]
    parts.append(markdown(["claim", "verdict", "measured", "what", "over"], rows))
    for table in study["tables"]:
        parts.append(f"{table['title']}:\n\n{markdown(table['columns'], table['rows'])}")
    return "\n".join(parts)


def leaderboard(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table per benchmark, best mean utility at the level first, with what relearning brings back."""
    parts, back = [], found.get("robustness", {}).get("robustness", {})

    def with_robustness(row: Mapping[str, Any]) -> dict[str, Any]:
        score = back.get(row["benchmark"], {}).get(row["method"])
        return {**row, "numbers": row["numbers"] | {"forgetting score after relearning": score}}

    rows = [with_robustness(row) for study in found.values() for row in study.get("leaderboard", ())]
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        group = sorted((r for r in rows if r["benchmark"] == benchmark), key=lambda r: -(r["score"]["value"] or -1))
        numbers = list(dict.fromkeys(name for row in group for name in row["numbers"]))
        columns = ["method", "setting", "seeds", "mean utility", *numbers]
        lines = [
            [r["method"], r["setting"], r["seeds"], r["score"], *(r["numbers"].get(n) for n in numbers)] for r in group
        ]
        parts.append(f"## {benchmark}\n\n{group[0]['about']}\n\n{markdown(columns, lines)}")
    return "\n".join(parts)


def faults(told: Mapping[str, Any]) -> str:
    """What `python -m tests.faults` planted, and how often something was lost."""
    planted, lost = (sum(row[column] for row in told["rows"]) for column in (2, 3))
    where = f"{told['seconds'] / 60:.0f} minutes on {told['environment']['cores']} cores, {told['environment']['cpu']}"
    head = f"{planted:,} faults planted, {lost} of them lost something ({where}).\n\n"
    return head + markdown(["fault", "where", "tried", "lost"], told["rows"])


def blocks(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Callable[[], str]]:
    """What stands between the marks of each name."""
    whole = {"claims": claims_table, "headlines": headlines, "leaderboard": leaderboard}
    made: dict[str, Callable[[], str]] = {name: lambda make=make: make(found) for name, make in whole.items()}
    return made | {name: lambda study=study: section(study) for name, study in found.items()}


# --- figures


def draw(figure: Mapping[str, Any]) -> bytes:
    """A figure as SVG on white, which GitHub shows in light and in dark."""
    import matplotlib as mpl

    kinds = {"lines": _lines, "points": _points, "bars": _bars, "map": _map}
    with mpl.rc_context({"text.parse_math": False}):
        canvas, axes = panel(1.5 * WIDTH, 3.4, (0.11, 0.98, 0.15, 0.9), grid="both")
        axes.set_axisbelow(True)
        kinds[figure["kind"]](axes, figure)
        axes.set_xlabel(figure["x"])
        axes.set_ylabel(figure["y"])
        canvas.patch.set(visible=True, facecolor="white")
        if len(figure.get("series", ())) > 1:
            axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    data = hashlib.sha256(json.dumps(figure, sort_keys=True).encode()).hexdigest()
    return as_files(Figure(figure["title"], "", canvas))["svg"].rstrip() + f"\n<!-- of {data} -->\n".encode()


def _series(figure: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Mapping[str, Any], list[Any] | None]]:
    """(style, series, error bars [2][N] or None), a colour and a marker each."""
    for index, series in enumerate(figure["series"]):
        style = {"color": SERIES[index % len(SERIES)], "label": series["name"] if len(figure["series"]) > 1 else None}
        errors = None
        if series.get("low"):
            low, high = ([math.nan if x is None else x for x in series[end]] for end in ("low", "high"))
            ends = zip(series["y"], low, high, strict=True)
            errors = [list(e) for e in zip(*[(y - low, high - y) for y, low, high in ends], strict=True)]
        yield style | {"marker": _MARKERS[index % len(_MARKERS)]}, series, errors


def _lines(axes: Any, figure: Mapping[str, Any]) -> None:
    """Side by side where they meet, so that every interval is seen."""
    several, places = figure["series"], [x for series in figure["series"] for x in series["x"]]
    for index, (style, series, errors) in enumerate(_series(figure)):
        aside = (index - (len(several) - 1) / 2) * 0.01
        if figure.get("log_x"):
            x = [place * (max(places) / min(places)) ** aside for place in series["x"]]
        else:
            x = [place + (max(places) - min(places)) * aside for place in series["x"]]
        axes.errorbar(x, series["y"], yerr=errors, capsize=2, markersize=4.5, linewidth=1.6, **style)
    _log(axes, figure)


def _points(axes: Any, figure: Mapping[str, Any]) -> None:
    for style, series, errors in _series(figure):
        axes.errorbar(series["x"], series["y"], yerr=errors, linestyle="", markersize=5, alpha=0.8, **style)
    _log(axes, figure)


def _log(axes: Any, figure: Mapping[str, Any]) -> None:
    """A logarithmic x axis, with ticks where the points are."""
    if figure.get("log_x"):
        places = sorted({x for series in figure["series"] for x in series["x"]})
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()


def _bars(axes: Any, figure: Mapping[str, Any]) -> None:
    """Horizontal, so that names are read without turning the head; x holds the names."""
    names, count = list(figure["series"][0]["x"]), len(figure["series"])
    for index, (style, series, errors) in enumerate(_series(figure)):
        style.pop("marker")
        places = [i + (index - (count - 1) / 2) * 0.8 / count for i in range(len(names))]
        axes.barh(places, series["y"], 0.8 / count, xerr=errors, **style, error_kw={"ecolor": INK, "capsize": 2})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.figure.set_figheight(max(3.0, 0.8 + 0.26 * len(names) * max(1, count / 2)))


def _map(axes: Any, figure: Mapping[str, Any]) -> None:
    """Numbers on colour: purple below 0, orange above."""
    values = figure["values"]
    most = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
    shown = [[math.nan if v is None else v for v in row] for row in values]
    axes.imshow(shown, cmap="PuOr_r", vmin=-1.5 * most, vmax=1.5 * most, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, number(value), ha="center", va="center", color=INK, fontsize=9)
    axes.set_xticks(range(len(figure["x_ticks"])), figure["x_ticks"])
    axes.set_yticks(range(len(figure["y_ticks"])), figure["y_ticks"])
    axes.grid(visible=False)


# --- files


def written(root: Path) -> dict[Path, bytes]:
    """Every file that the studies make, with its content."""
    found = studies(root / "benchmarks" / "results" / "studies")
    made, files, planted = blocks(found), {}, root / "benchmarks" / "results" / "faults.json"
    if planted.exists():
        made["faults"] = lambda: faults(json.loads(planted.read_text(encoding="utf-8")))
    for name in PAGES:
        path = root / name
        if path.exists():
            page = path.read_text(encoding="utf-8")
            files[path] = _BLOCK.sub(lambda m: m[1] + (made[m[2]]() if m[2] in made else "") + m[3], page).encode()
    for study in found.values():
        for figure in study["figures"]:
            files[root / IMAGES / f"{figure['name']}.svg"] = draw(figure)
    return files


def outdated(files: Mapping[Path, bytes]) -> list[Path]:
    """Those on disk that do not say what the results say. Of a figure its last line is compared, which names the data:
    every version of matplotlib draws it a little differently.
    """

    def told(path: Path, content: bytes) -> bytes:
        return content.splitlines()[-1] if path.suffix == ".svg" else content

    return [p for p, content in files.items() if not p.exists() or told(p, p.read_bytes()) != told(p, content)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is outdated")
    options = parser.parse_args()
    files = written(ROOT)
    superfluous = [path for path in (ROOT / IMAGES).glob("*.svg") if path not in files]
    wrong = outdated(files) + superfluous
    for path in wrong:
        print(path.relative_to(ROOT))
    if options.check:
        return bool(wrong)
    for path in superfluous:
        path.unlink()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
