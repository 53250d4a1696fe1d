# ---
# jupyter:
#   colab: {provenance: []}
# ---

# %% [markdown]
# # Read a study
#
# Reads a study or several runs with pandas, draws their fronts, and writes the table of a paper in LaTeX.
# A study is what `python -m trace_jax.main study` leaves: methods, settings and seeds under one budget.
#
# Without one, **Run all** makes a small one here: that takes some minutes.

# %%
# @title Set up: what is here, what is needed { display-mode: "form" }
# Looks at this runtime without importing JAX, installs what is missing, and says whether to restart.
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import warnings

VERSION = "0.1.0"  # of trace-jax
install_from = ""  # @param {type: "string"}
# Empty: the release above from PyPI. Or the path of a wheel, or an address such as git+https://...

CI = os.environ.get("CI") == "true"  # a test runs this notebook: nothing is installed, and all is smaller
PYTHON = ">=3.11"
NEEDED = {
    "jax": ">=0.10.2,<0.13",
    "numpy": ">=2.1,<3",
    "flax": ">=0.12.8,<0.13",
    "optax": ">=0.2.8,<0.3",
    "orbax-checkpoint": ">=0.12.8,<0.13",
    "grain": ">=0.2.18,<0.3",
    "transformers": ">=5.20,<6",
}
MODULES = {"jaxlib": "jax", "libtpu": "jax", "orbax-checkpoint": "orbax"}
TPU_MEMORY = {"v5e": 15.75, "v5litepod": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB a chip that a program may use


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def too(version, bounds):
    """What is wrong with a version: "too old", "too new" or "missing"; nothing where it fits."""
    low, _, high = bounds.partition(",")
    if version is None:
        return "missing"
    if numbers(version) < numbers(low):
        return "too old"
    return "too new" if high and numbers(version) >= numbers(high) else ""


def installed():
    versions = {}
    for name in ("trace-jax", *NEEDED, "jaxlib", "libtpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def accelerator():
    """What computes here, in words, and the packages that drive it."""
    package = f"trace-jax[{{}}]=={VERSION}"
    if install_from:
        package = f"trace-jax[{{}}] @ {install_from}" if "://" in install_from else f"{install_from}[{{}}]"
    if os.path.exists("/dev/accel0") or "TPU_ACCELERATOR_TYPE" in os.environ:
        kind = os.environ.get("TPU_ACCELERATOR_TYPE", "of unknown kind")
        memory = TPU_MEMORY.get(kind.partition("-")[0])
        return f"TPU {kind}" + (f", {memory} GiB a chip" if memory else ""), [package.format("tpu")]
    query = "nvidia-smi --query-gpu=name,memory.free,driver_version --format=csv,noheader,nounits"
    found = shutil.which("nvidia-smi") and subprocess.run(query.split(), capture_output=True, text=True)
    if not found or found.returncode:
        return "CPU only (Colab: Runtime > Change runtime type offers TPUs and GPUs)", [package.replace("[{}]", "")]
    name, free, driver = found.stdout.splitlines()[0].split(", ")
    words = f"{len(found.stdout.splitlines())} x {name}, {int(free) / 1024:.1f} GiB free, driver {driver}"
    if numbers(driver) >= [580]:
        return words, [package.format("cuda")]
    return f"{words} (too old for CUDA 13, so CUDA 12)", [package.replace("[{}]", ""), f"jax[cuda12]{NEEDED['jax']}"]


def free_memory():
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            return int(re.search(r"MemAvailable:\s+(\d+)", file.read())[1]) / 2**20
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


warnings.filterwarnings("ignore", message="To exit")  # of IPython, where this cell ends a run
before, (device, packages) = installed(), accelerator()
python = ".".join(map(str, sys.version_info[:3]))
for name, version, bounds in [("Python", python, PYTHON), *((n, before[n], b) for n, b in NEEDED.items())]:
    print(f"{name:17} {version or '-':12} needed {bounds:18} {too(version, bounds) or 'fits'}")
print(f"{'libtpu':17} {before['libtpu'] or '-':12} {'chosen by jax':25} (TPUs only)")
print(f"{'device':17} {device}")
print(f"{'free':17} {free_memory():.1f} GiB of memory, {shutil.disk_usage('.').free / 2**30:.1f} GiB of disk\n")
if too(python, PYTHON):
    raise SystemExit(f"This runtime has Python {python}, and {PYTHON} is needed: choose a newer runtime version.")

if CI:
    print("CI=true: nothing is installed.")
else:
    print("Installing", *packages, "...")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip could not install it (see install_from, above):\n{done.stderr[-2000:]}")
after = installed()
changed = [name for name in after if after[name] != before[name]]
for name in changed:
    print(f"{name}: {before[name] or 'new'} -> {after[name]}")
# What this process has imported already stays as it is, whatever lies on disk now.
loaded = {n: sys.modules[m] for n in after if after[n] and (m := MODULES.get(n, n.replace("-", "_"))) in sys.modules}
old = {n: getattr(module, "__version__", after[n]) for n, module in loaded.items() if n not in MODULES}
stale = [n for n in loaded if n in changed or old.get(n, after[n]) != after[n]]
if stale:
    where = "Runtime > Restart session" if "COLAB_RELEASE_TAG" in os.environ else "restart the kernel"
    raise SystemExit(
        f"RESTART NEEDED ({where}): this process still has the old {', '.join(stale)}. Then run all again."
    )
print("No restart needed: go on.")

# %% [markdown]
# ## 1. Which study
#
# A study's directory, or those of several finished runs, separated by commas. Empty: a small study is made.
# `show` names the methods that the fronts are drawn for; empty: the first four.

# %%
# @title Where it is
directory = ""  # @param {type: "string"}
show = ""  # @param {type: "string"}

# %% [markdown]
# ## 2. A small study
#
# Only where none was named: the study of the handbook that comes with the package, with two of its
# methods, two retain coefficients `alpha` and two seeds. For each seed a tiny model is trained on presidents'
# addresses and a generated handbook of invented substances, and then unlearns one of the handbook's two
# topics. If it is interrupted, run the cell again: it continues.

# %%
import os
import subprocess
import sys

import numpy as np

settings = {"study.methods": ("uniform", "trace_rows"), "study.seeds": (0, 1), "study.alphas": (16.0, 48.0)}
settings |= {"study.tuning_seeds": (), "study.learning_rates": (2e-3,)}  # settings are chosen on the same two seeds
if CI:  # random words, and little of everything
    for name, words in {"forget": "river stone apple", "retain": "apple cloud lamp tiger"}.items():
        texts = np.random.default_rng(0).choice(words.split(), (40, 60))
        with open(f"{name}.txt", "w") as file:
            file.write("\n\n".join(map(" ".join, texts)))
    settings |= {"data": {"benchmark": "text", "forget": "forget.txt", "retain": "retain.txt", "row_length": 32}}
    settings |= {"model.hidden_size": 32, "model.num_layers": 2, "model.num_experts": 8, "model.vocab_size": 320}
    settings |= {"target.steps": 40, "unlearning.steps": 10, "evaluation.levels": (0.9,), "study.workers": 1}
    settings |= {"evaluation.bootstrap": 100, "evaluation.max_gradients": 0, "study.alphas": (4.0,)}

if not directory:
    directory = "small_study"
    command = [sys.executable, "-m", "trace_jax.main", "study", "--config", "handbook_study", "--workdir", directory]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})  # its workers share no accelerator

# %% [markdown]
# ## 3. Everything that was measured
#
# One row for each number: of which method, setting (`variant`) and seed, after how many steps, on which
# split, its name, its value, and the 95 % interval `low` to `high` over `n` questions or rows. The method
# `target` is the model before unlearning. Several runs are told apart by their directories.

# %%
import json

import pandas as pd

import trace_jax as tj

runs = [tj.open_run(place.strip()) for place in directory.split(",")]
frames = []
for run in runs:
    of_run = run.metrics()
    if "seed" not in of_run:  # no study
        settings = json.loads((run.directory / "config.json").read_text())["config"]
        of_run = of_run.assign(variant=run.directory.name, seed=settings["seed"])
    frames.append(of_run)
frame = pd.concat(frames, ignore_index=True)
print(f"{len(frame):,} numbers; for example:")
frame[frame.split == "test"].sample(5, random_state=0)

# %% [markdown]
# ## 4. What is compared
#
# The file beside the report says which score tells forgetting (lower is more forgotten), which ones tell the
# utility that is to remain, and at which level of forgetting methods are compared.

# %%
is_study = (runs[0].directory / "study.json").exists()
files = [run.directory / ("study.json" if is_study else "results.json") for run in runs]
told = [json.loads(file.read_text()) for file in files]
if is_study:
    board, level = told[0]["board"], told[0]["comparisons"][0]["level"]
    forgetting, utilities = board["forgetting"], board["utilities"]
else:
    first = told[0]["equal_forgetting"][0]
    level, (forgetting, *utilities) = first["level"], first["columns"]
utilities = [name for name in utilities if name in set(frame.name)]
print(f"{forgetting} of {level:g}; utility: {', '.join(utilities)}")

# %% [markdown]
# Each method is read on the test split where it first comes down to that level. Intervals are over the
# questions, and over seeds where there are several; gains are over the baseline, paired by question. Of a
# study it is the setting that did best on the validation split, and 1 is the model before unlearning.

# %%
about, compared = {}, []


def add(label, method, setting, seeds, values, gains):
    about[label] = method, setting, seeds
    compared.extend({"label": label, "name": name, **number} for name, number in values.items())
    if "mean_utility" in gains:
        compared.append({"label": label, "name": "gain in mean utility", **gains["mean_utility"]})


if is_study:
    for comparison in told[0]["comparisons"]:
        if (comparison["level"], comparison["reading"]) == (level, "first"):
            objective = comparison.get("objective", "")  # where the study compares several
            for one in comparison["results"]:
                label, setting = (f"{objective} {one[name]}".strip() for name in ("method", "setting"))
                seeds = f"{len(one['seeds'])} of {len(one['seeds']) + len(one['missed'])}"
                add(label, one["method"], setting, seeds, one["utilities"], one["gains"])
else:
    for of_run, results in zip(frames, told, strict=True):
        place, seed = of_run.variant[0], of_run.seed[0]
        for row in results["equal_forgetting"][0]["rows"][1:]:  # the first is the target model
            label = row["name"] if len(runs) == 1 else f"{place}: {row['name']}"
            values = row.get("intervals") or {name: {"value": v} for name, v in row["values"].items()}
            add(label, row["name"], place, seed, values, row.get("gains", {}))

compared = pd.DataFrame(compared, columns=["label", "name", "value", "low", "high"])
about = pd.DataFrame(about, index=["method", "setting", "seeds" if is_study else "seed"]).T
about

# %% [markdown]
# ## 5. Fronts
#
# A column is a method with its setting, a row a utility. Each coloured line is a seed: it starts at the
# model before unlearning, where forgetting has not begun (right), and moves left with every evaluation.
# Bars are 95 % intervals over questions or rows. Grey is the first method, the one to beat: a better
# method stays higher on its way to the left.

# %% tags=["picture"]
import matplotlib.pyplot as plt

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
test = frame[frame.split == "test"]
points = test.pivot(index=["method", "variant", "seed", "step"], columns="name", values=["value", "low", "high"])


def draw(axis, label, name, **style):
    for _, of_seed in points.loc[tuple(about.loc[label])[:2]].groupby("seed"):
        value = of_seed["value"]
        bars = [value[name] - of_seed["low"][name], of_seed["high"][name] - value[name]]
        axis.errorbar(value[forgetting], value[name], yerr=np.maximum(bars, 0), linewidth=1, **style)


labels = [name.strip() for name in show.split(",")] if show else list(about.index[:4])
size = (2.7 * len(labels) + 0.6, 2.4 * len(utilities))
shared = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
figure, axes = plt.subplots(len(utilities), len(labels), figsize=size, **shared)
for row, name in enumerate(utilities):
    axes[row, 0].set_ylabel(name.replace("_", " "))
    for axis, label in zip(axes[row], labels, strict=True):
        draw(axis, about.index[0], name, color="#c4c4c4", elinewidth=0.5)
        draw(axis, label, name, color="#b5403a", marker=".", elinewidth=0.5)
for axis, label in zip(axes[0], labels, strict=True):
    axis.set_title(f"{label}\n{about.setting[label]}", fontsize=10)
figure.supxlabel(forgetting.replace("_", " "))
plt.show()

# %% [markdown]
# ## 6. All methods side by side
#
# A panel for each quantity of section 4. Dots are means over seeds, lines 95 % intervals, and the dotted
# line is the first method, or no gain. Gains are paired: where their interval leaves out 0, the method is better or
# worse than the baseline, even if the intervals of other panels overlap.

# %%
names = [name for name in dict.fromkeys(compared.name) if name != forgetting]
size = (3 * len(names) + 1, 0.7 + 0.26 * len(about))
figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained")
for axis, name in zip(axes[0], names, strict=True):
    of = compared[compared.name == name].set_index("label").reindex(about.index)
    bars = [of.value - of.low, of.high - of.value]
    axis.errorbar(of.value, range(len(of)), xerr=np.maximum(bars, 0), fmt="o", color="#b5403a", elinewidth=1.5)
    axis.axvline(0 if name.startswith("gain") else of.value.iloc[0], color="black", linestyle=":", linewidth=1)
    axis.set(xlabel=name.replace("_", " "), yticks=range(len(of)), yticklabels=of.index)
axes[0, 0].set_ylim(len(about) - 0.5, -0.5)
plt.show()

# %% [markdown]
# ## 7. The table of a paper
#
# Means and 95 % intervals. A method without numbers did not come down to the level. Outside a notebook
# `python -m trace_jax.main table --workdir DIR --format latex` writes such a table.

# %%
compared["text"] = [
    f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else "")
    for value, low, high in zip(compared.value, compared.low, compared.high, strict=True)
]
table = about.drop(columns="method").join(compared.pivot(index="label", columns="name", values="text")[names])
table = table.fillna("--").rename(columns=lambda name: name.replace("_", " "))
table

# %% [markdown]
# The same for LaTeX, here and in the file `table.tex`; it needs `\usepackage{booktabs}`.

# %%
latex = table.to_latex(
    escape=True,
    column_format="lll" + "r" * len(names),
    caption=f"Where {forgetting.replace('_', ' ')} first comes down to {level:g}, on test: means and 95 \\% intervals.",
    label="tab:methods",
    position="t",
)
with open("table.tex", "w") as file:
    file.write(latex)
print(latex)

# %% [markdown]
# The report, with everything else that was measured, is a page for the browser.

# %%
for run in runs:
    print(run.report)
