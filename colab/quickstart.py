# ---
# jupyter:
#   accelerator: TPU
#   colab: {gpuType: V5E1, provenance: []}
# ---

# %% [markdown]
# # Quickstart
#
# Trains a small mixture-of-experts model on text that you paste, and makes it forget a part of it.
# You see which experts the text uses, the run as it goes, and what the model says before and after. Three minutes on
# two CPU cores; nothing but Python packages is downloaded.
#
# Choose *Run all*. If the first cell asks for a restart, restart and choose *Run all* again.

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
# ## Your text
#
# Paste text between the quotes; an empty line ends a document.
#
# - **forget**: what the model shall no longer know.
# - **retain**: what it shall keep, of any kind; the more the better.
# - **neighbour** (may stay empty): text close to what is to be forgotten, that must survive. It is the hard part.
#
# Leave all three empty to see the example: a handbook of fictional substances among addresses of US presidents.

# %%
forget = """
"""

retain = """
"""

neighbour = """
"""

# %% [markdown]
# The example, where nothing was pasted: pages about substances that exist nowhere else, so that a model can know them
# from this text only. Those of one topic are to be forgotten; their neighbours differ in nothing but their names.

# %%
import json
from pathlib import Path

import numpy as np
import pandas as pd

from trace_jax.tasks.handbook import make_pages, make_substances
from trace_jax.tasks.presidents import load_addresses

pasted = {"forget": forget, "retain": retain, "neighbour": neighbour}
texts = {name: [t.strip() for t in text.split("\n\n") if t.strip()] for name, text in pasted.items()}
if not any(texts.values()):
    rng = np.random.default_rng(0)
    for substance in make_substances({"forget": 12, "neighbour": 12}, rng=rng):
        texts[substance.topic] += [page.text for page in make_pages(substance, 8 if CI else 24, rng)]
    addresses = [a.document.text for a in load_addresses() if a.year >= (2015 if CI else 1990)]
    texts["retain"] = [paragraph for text in addresses for paragraph in text.split("\n\n")]

files = {name: f"{name}.jsonl" for name in texts if texts[name]}
for name, file in files.items():
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[name]))


def shown(rows, columns):
    """A table with its text to the left."""
    left = [{"selector": "th, td", "props": "text-align: left !important; vertical-align: top"}]
    return pd.DataFrame(rows, columns=columns).style.hide(axis="index").set_table_styles(left)


first = [
    (name, len(texts[name]), text[:160] + " ..." * (len(text) > 160)) for name in files for text in texts[name][:2]
]
shown(first, ["use", "documents", "the first two"])

# %% [markdown]
# ## A model that knows it, and the usual way to unlearn
#
# One call trains a small mixture of experts on all the text (2 layers, 16 experts each, 2 for each token), then
# unlearns as is usual: the loss of forget text up, the loss of retain text down, every retain token alike. It takes
# about a minute and a half on two cores. Whatever is finished is kept in `runs/quickstart`.

# %%
import trace_jax as tj

settings = {
    "name": "quickstart",
    "methods": ("uniform",),
    "data": {"benchmark": "text", **files},
    "target": {"steps": 10 if CI else 250},
    "unlearning": {
        "objective": {"name": "gradient_difference", "nll_ceiling": 8.0},
        "learning_rate": 2e-3,
        "steps": 10 if CI else 40,
        "evaluate_every": 5,
    },
    "evaluation": {"max_rows": 16 if CI else 48, "patching": False},
}
run = tj.run(tj.load_config(settings), overwrite=True)
run

# %% [markdown]
# The table reads all models at the same forgetting: where the forget text has become half as likely as it was.
# *Neighbour utility* is what is left of the model's ability on text close to it (1 = all).
#
# ## Which experts the text uses
#
# Each token is handled by the experts that the router chooses. The heat maps show how often each is chosen, on text to
# forget and on retain text. Bright on the left and dark on the right: an expert that unlearning hits and the retain
# loss hardly ever reaches, so that it drifts.

# %% tags=["picture"]
import matplotlib.pyplot as plt

model, corpora = run.model("target"), tj.build_corpora(run.config.data)
forget_use = tj.expert_statistics(model, corpora.forget)
retain_use = tj.expert_statistics(model, corpora.retain)

figure, axes = plt.subplots(1, 2, figsize=(10, 1.9), sharey=True, layout="constrained")
highest = max(forget_use.frequency.max(), retain_use.frequency.max())
for axis, (name, use) in zip(axes, {"forget": forget_use, "retain": retain_use}.items(), strict=True):
    image = axis.imshow(use.frequency, vmin=0, vmax=highest, cmap="magma", aspect="auto")
    axis.set(title=f"{name} text", xlabel="expert", yticks=range(len(use.frequency)))
    axis.set_yticklabels([f"layer {layer}" for layer in range(len(use.frequency))])
figure.colorbar(image, ax=axes, label="share of tokens")
plt.show()

# %% [markdown]
# ## Calibration: let retain text exercise the same experts
#
# TRACE gives every retain row a weight, such that the weighted rows use the experts more nearly as the forget text
# does. A closer match costs sample: few rows with large weights teach little, so the share that must remain is set (20
# % here). You see the experts that differ most; brown ones are used more by forget text, and the paler they are on the
# right, the closer the match.

# %%
calibration = tj.CalibrationConfig(weighting={"name": "matching", "unit": "row", "apply": "sampling"})
weights = tj.retain_weights(calibration, model=model, forget=corpora.forget, retain=corpora.retain)
weights.calibration

# %% [markdown]
# ## Unlearn, and watch
#
# The same loss and the same steps as before; only how often each retain row is drawn has changed. The forget loss is
# what a token of forget text still lacks to 8 nats (0: as unlikely as was asked for), and is to fall; the retain loss,
# how far retain text is from the model before, is to stay low.

# %%
from IPython.display import display

figure, axis = plt.subplots(figsize=(7, 2.8))
plt.close(figure)
live, history = display(figure, display_id=True), []


def draw(step, metrics):
    history.append({"step": step, **metrics})
    if step % 5:
        return
    axis.clear()
    pd.DataFrame(history).plot(x="step", y=["forget_loss", "retain_loss"], ax=axis, ylabel="nats a token")
    live.update(figure)


how = {"config": run.config.unlearning, "weights": weights, "callback": draw, "verbose": False}
unlearned = tj.unlearn(model, corpora.forget, corpora.retain, **how)

# %% [markdown]
# ## What it says, before and after
#
# First sentences without their last word, and how each model goes on, always with the likeliest token. Green: as in
# the text. After unlearning, rows of *forget* should no longer be green, and the others should still be.

# %%
models = {"before": model, "uniform": run.model("uniform"), "TRACE": unlearned.model}
shown_of = ("forget", "neighbour" if texts["neighbour"] else "retain")
chosen = [(name, text) for name in shown_of for text in texts[name][:: len(texts[name]) // 6 or 1][:6]]
sentences = [text.partition(".")[0].rpartition(" ") for _, text in chosen]
columns = {
    "use": [name for name, _ in chosen],
    "beginning": [s[0] for s in sentences],
    "in the text": [s[2] for s in sentences],
}
for name, one in models.items():
    written = tj.generate_text(one, columns["beginning"], max_new_tokens=8, stop=["."])
    columns[name] = [w.text.strip() for w in written]


def green(row):
    return ["background-color: #b7e4c7; color: black" * (cell == row["in the text"]) for cell in row]


shown(columns, list(columns)).apply(green, axis=1, subset=["in the text", *models])

# %% [markdown]
# ## The same, measured
#
# `run` once more, now with both methods: what is finished is kept, and only `trace_rows` is new. Every number comes
# with a 95 % interval over the test text.
#
# Two things that this table cannot tell. It is one seed: to rank methods, `trace-jax study` runs several. And it does
# not show that experts are the best guide: on such text, rows found by their words do as well
# ([results](https://github.com/trace-jax/trace_jax/blob/main/docs/results.md)).

# %%
run = tj.run(tj.load_config({**settings, "methods": ("uniform", "trace_rows")}))
run

# %% [markdown]
# ## The report
#
# One HTML file, with all figures, every setting and every number: `runs/quickstart/report.html`.

# %%
import html

from IPython.display import HTML

page = html.escape(Path(run.report).read_text(encoding="utf-8"))
HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700" style="border: 1px solid #ccc"></iframe></div>')

# %% [markdown]
# ## Where to go from here
#
# - A published checkpoint, and back to transformers: `unlearn_a_checkpoint.ipynb`.
# - Whether your text is worth calibrating for at all: `is_there_anything_to_calibrate.ipynb`.
# - The same in 25 lines of Python: `python_api.ipynb`.
# - Numbers as a frame: `run.metrics()`; several runs side by side: `study.ipynb`.
