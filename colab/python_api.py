# ---
# jupyter:
#   accelerator: TPU
#   colab: {gpuType: V5E1, provenance: []}
# ---

# %% [markdown]
# # Twenty-five lines of Python
#
# Texts in; weights of retain rows, an unlearned model, a tidy frame and a plot out.
# Every line is here, on a model so small that all of it takes half a minute on two CPU cores.

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
# **Texts** are strings, or pairs `(question, answer)`. These are facts about substances that do not exist.

# %%
import numpy as np
import pandas as pd

import trace_jax as tj
from trace_jax.tasks.handbook import make_pages, make_substances

texts, rng = {"forget": [], "neighbour": []}, np.random.default_rng(0)
for substance in make_substances({"forget": 6, "neighbour": 12}, rng=rng):
    texts[substance.topic] += [page.text for page in make_pages(substance, 16, rng)]

# %% [markdown]
# **Rows** are packed tokens, `[rows, row_length]`. `tj.read_rows` reads files and data sets of the hub.

# %%
tokenizer = tj.train_tokenizer(texts["forget"] + texts["neighbour"], 512)
forget, retain = (tj.pack(texts[name], tokenizer, row_length=64) for name in texts)

# %% [markdown]
# **A model** that knows both, trained here. A checkpoint instead: `model = tj.load_pretrained(DIR)`, and
# `tj.pack(texts, model)` above.

# %%
shape, training = tj.ModelConfig(vocab_size=512), tj.TrainingConfig(steps=20 if CI else 150)
model = tj.train(shape, tj.Rows.concatenate([forget, retain]), config=training, tokenizer=tokenizer)

# %% [markdown]
# **Statistics** say how often each expert is chosen. Here, of each layer, the largest difference between forget and
# retain text, as a share of tokens: without any there would be nothing to calibrate.

# %%
of_forget, of_retain = tj.expert_statistics(model, forget), tj.expert_statistics(model, retain)
abs(of_forget.frequency - of_retain.frequency).max(axis=1)

# %% [markdown]
# **Weights** of the retain rows, which let them use the experts more nearly as the forget text does. The certificate
# says how much of the gap that closes, and at what price.

# %%
settings = tj.CalibrationConfig(weighting={"name": "matching", "unit": "row", "apply": "sampling"})
weights = tj.retain_weights(settings, model=model, forget=forget, retain=retain)
print(weights.calibration.certificate.text(most=0))

# %% [markdown]
# **Unlearn.** The first model stays as it is.

# %%
how = tj.UnlearningConfig(objective="npo", steps=40, learning_rate=2e-3)
done = tj.unlearn(model, forget, retain, config=how, weights=weights, verbose=False)

# %% [markdown]
# **A tidy frame** of every step, and a plot. NPO's forget loss falls to 0 as forget text becomes less likely than
# under the first model; the retain loss, how far retain text is from that model in nats a token, stays low. (`tj.run`
# measures on text that is held out, with intervals, and its `metrics()` are a tidy frame, too.)

# %% tags=["picture"]
frame = pd.DataFrame(done.history).melt("step", ["forget_loss", "retain_loss"], "loss", "value")
axis = frame.pivot(index="step", columns="loss", values="value").plot(figsize=(7, 2.8))

# %% [markdown]
# **In words**: sentences without their last word, three of the forget text and three of its neighbours, and how each
# model goes on.

# %%
sentences = [text.partition(".")[0].rpartition(" ") for name in texts for text in texts[name][:48:16]]
said = pd.DataFrame(sentences, columns=["beginning", "", "in the text"])
for name, one in {"before": model, "after": done.model}.items():
    said[name] = [w.text for w in tj.generate_text(one, list(said["beginning"]), max_new_tokens=8, stop=["."])]
said
