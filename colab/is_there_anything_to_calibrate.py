# ---
# jupyter:
#   colab: {provenance: []}
# ---

# %% [markdown]
# # Is there anything to calibrate?
#
# Says before any training whether forget and retain text use the experts of a model differently. If
# they do not, weights by experts have nothing to match, and you can save yourself the run.
#
# You need one of these; without either, **Run all** shows the answer on generated routing:
#
# - the routing of both texts, recorded by a server (vLLM, SGLang, TensorRT-LLM): no weights, no
#   accelerator; or
# - a checkpoint directory and both texts (`.jsonl`, `.txt` or a directory). To get one:
#   `!hf download allenai/OLMoE-1B-7B-0924 --local-dir olmoe`
#
# For recorded routing any runtime will do; for a checkpoint choose one with a TPU or GPU. What the words
# mean is in the documentation, `docs/method.md`.

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
# ## 1. What to look at
#
# Choose a source and say where the files are (drag them into the file browser on the left, or mount a
# drive). `generated_mismatch` belongs to the generated routing: 0 makes two samples of the same text,
# 2 two very different texts.

# %%
# @title Source of the routing
source = "generated"  # @param ["generated", "captures", "checkpoint"]
forget_path = "forget.npz"  # @param {type: "string"}
retain_path = "retain.npz"  # @param {type: "string"}
num_experts = 64  # @param {type: "integer"}
checkpoint = "olmoe"  # @param {type: "string"}
generated_mismatch = 1.5  # @param {type: "slider", min: 0, max: 2, step: 0.25}

# %% [markdown]
# **How to record routing.** A capture is one `.npz` file for each text: the chosen experts of every
# token, and how many tokens each request had. From the answers of vLLM 0.21 (started with routed
# experts returned):
#
# ```python
# requests = [np.concatenate([o.prompt_routed_experts, o.outputs[0].routed_experts]) for o in outputs]
# np.savez("forget.npz", expert_ids=np.concatenate(requests), row_lengths=[len(r) for r in requests])
# ```
#
# From SGLang, whose answers hold text:
# `np.frombuffer(base64.b64decode(a["meta_info"]["routed_experts"]), np.int32).reshape(-1, layers, k)`
# for each answer `a`, then the same `np.savez`.
#
# A capture of forget text is as sensitive as the text: most tokens can be read back from their
# experts. What this notebook keeps are counts.

# %% [markdown]
# ## 2. The routing
#
# Only for `generated`: writes two captures, as a server would. Forget text prefers six of the
# experts of each layer, and so does one retain text in twenty.

# %%
import numpy as np
import pandas as pd

import trace_jax as tj


def generate(path, number, rows, share, layers=4 if CI else 16, top_k=8, length=64):
    """Routing of `rows` texts, of which a share has the topic that prefers six experts."""
    common, own = np.random.default_rng(0), np.random.default_rng(number)
    topic = own.random((rows, 1)) < share
    chosen = []
    for layer in range(layers):
        liking = common.normal(0, 0.5, num_experts) + own.normal(0, 0.4, (rows, num_experts))
        preferred = np.isin(np.arange(num_experts), common.choice(num_experts, 6, replace=False))
        liking = liking + topic * preferred * generated_mismatch * (1 + layer / layers)
        scores = liking[:, None] + own.gumbel(size=(rows, length, num_experts))
        chosen.append(np.argsort(-scores, axis=2)[..., :top_k].reshape(rows * length, top_k))
    np.savez(path, expert_ids=np.array(chosen, np.int32), row_lengths=np.full(rows, length))


if source == "generated":
    forget_path, retain_path = "generated_forget.npz", "generated_retain.npz"
    generate(forget_path, 1, rows=60 if CI else 200, share=1.0)
    generate(retain_path, 2, rows=90 if CI else 400, share=0.05)

# %% [markdown]
# Reads the captures, or lets the checkpoint route both texts. The table says what was read. The more
# rows, the smaller the noise; with fewer than 8 rows of either text there is no verdict.

# %%
if source == "checkpoint":
    model = tj.load_pretrained(checkpoint, dtype="bfloat16")
    num_experts = model.config.num_experts
    texts = (tj.read_rows(path, model, row_length=512) for path in (forget_path, retain_path))
    forget, retain = (tj.expert_assignments(model, rows, batch_size=16) for rows in texts)
else:
    forget, retain = (tj.read_capture(path, num_experts) for path in (forget_path, retain_path))

read = [[*text.indices.shape, len(set(text.rows))] for text in (forget, retain)]
pd.DataFrame(read, index=["forget", "retain"], columns=["layers", "tokens", "experts a token", "rows"])

# %% [markdown]
# ## 3. The verdict
#
# The rows of each text are dealt into two halves. Experts are selected on the first halves; the
# **held-out ratio** says how many times as often forget text uses them as retain text does, in the
# second halves, so that chance can't make it large. The **noise** is the same ratio between two
# samples of one text. The verdict is `present` from a ratio of 2, `weak` from 1.25, both above the
# noise; `absent` below 1.25; else `undecided`.

# %%
found = tj.diagnose(forget, retain, num_experts=num_experts)
print(found.sentence())

# %% [markdown]
# The dot is the held-out ratio, and the grey bar reaches as far as noise does. A dot in the green, right
# of the bar, means that there is something to calibrate.

# %%
import matplotlib.pyplot as plt

plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
RED, BLUE, GREY = "#b5403a", "#2f6690", "#bdbdbd"

end = 1.2 * np.nanmax([found.held_out, found.noise, 2.2])
zones = {"absent": (0.85, 1.25, "#f1e3e2"), "weak": (1.25, 2, "#f6f0dc"), "present": (2, end, "#e2efe2")}
figure, axis = plt.subplots(figsize=(9, 1.6), layout="constrained")
for name, (low, high, colour) in zones.items():
    axis.axvspan(low, high, color=colour)
    axis.text(np.sqrt(low * high), 0.8, name, ha="center", va="center")
axis.barh(0, found.noise - 0.85, left=0.85, height=0.3, color=GREY, label="noise")
axis.plot(found.held_out, 0, "o", color=RED, markersize=11, label="held-out ratio")
axis.set(xscale="log", xlim=(0.85, end), ylim=(-0.6, 1.1), yticks=[])
axis.set(xlabel="times as often on forget as on retain text (logarithmic)")
axis.set_xticks([tick for tick in (1, 1.25, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick < end])
axis.xaxis.set_major_formatter("{x:g}")
axis.minorticks_off()
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %% [markdown]
# ## 4. Mismatch by layer
#
# Left: the largest ratio of any expert of a layer, forget over retain frequency. Right: the gap, which is
# the sum over experts of the differences of their frequencies. Grey is what two halves of one text show:
# only what rises out of the grey says something.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, name, words in zip(axes, ("largest_ratio", "gap"), ("largest ratio", "gap"), strict=True):
    of = found.quantities[name]
    axis.bar(found.layers, of["noise"], width=0.9, color=GREY, label="noise")
    axis.plot(found.layers, of["value"], "o-", color=RED, label="forget against retain")
    axis.set(xlabel="layer", ylabel=words, ylim=(0, 1.25 * np.nanmax([of["value"], of["noise"]])))
    axis.xaxis.get_major_locator().set_params(integer=True)
axes[0].legend(frameon=False, loc="upper left", ncols=2)
plt.show()

# %% [markdown]
# ## 5. The selected experts
#
# A row is a layer, a column an expert. Red experts are used more often on forget text, blue ones on
# retain text. Dots mark those that the default rule selects, the four largest differences of each layer:
# weights would bring them into use on retain text.

# %% tags=["picture"]
difference = found.forget - found.retain
most = np.abs(difference).max()
layers, experts = np.nonzero(found.selected)
figure, axis = plt.subplots(figsize=(9, 1 + 0.2 * len(difference)), layout="constrained")
colours = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
image = axis.imshow(difference, aspect="auto", interpolation="nearest", **colours)
axis.plot(experts, layers, "o", color="black", markersize=3)
axis.set(xlabel="expert", ylabel="layer", yticks=range(len(difference)), yticklabels=found.layers)
figure.colorbar(image, label="share of tokens,\nforget − retain")
plt.show()

# %% [markdown]
# The ten selected experts that differ most. A frequency is the share of a text's tokens that use the expert.

# %%
table = pd.DataFrame({"layer": np.array(found.layers)[layers], "expert": experts})
table["forget"], table["retain"] = found.forget[found.selected], found.retain[found.selected]
table["difference"] = table.forget - table.retain
table["ratio"] = table.forget / table.retain
table.nlargest(10, "difference").style.format(precision=3).hide()

# %% [markdown]
# ## 6. How far calibration can go
#
# Calibration weights retain tokens so that they use the selected experts as forget text does. The closer
# the match, the fewer tokens carry the weight: the **effective sample size** is the share of the retain
# tokens that still counts. Read from left, where all tokens weigh the same, to right. The left figure
# shows how much of the gap is closed, the right one the weight of the heaviest token. You choose the
# place by `min_effective_sample_size`; the default is 0.2.

# %%
curve = pd.DataFrame(found.curve)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(curve.effective_sample_size, curve.closed, "o-", color=RED, label="selected experts")
axes[0].plot(curve.effective_sample_size, curve.closed_all, "s--", color=BLUE, label="all experts")
axes[0].set(ylabel="share of the gap closed", ylim=(min(0, curve.closed_all.min() - 0.05), 1.05))
axes[1].plot(curve.effective_sample_size, curve.largest_weight, "o-", color=RED)
axes[1].set(ylabel="largest weight of a token", ylim=(0, None))
for axis in axes:
    axis.axvline(0.2, color="black", linewidth=0.8, linestyle=":", label="default")
    axis.set(xlabel="effective sample size", xlim=(1, 0))
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The same as numbers: `closed` of the gap of the selected experts, `closed_all` of the gap of all.

# %%
curve.style.format(precision=3).hide()

# %% [markdown]
# ## 7. What to do now
#
# The advice, and a file with the verdict and all numbers above, for your notes or a script.

# %%
import json

NEXT = {
    "present": "Calibrate: the methods trace and trace_rows are worth their comparison with uniform weights.",
    "weak": "Try uniform weights first; calibration may gain a little. Compare both, with intervals.",
    "absent": "Use uniform weights. Weights by experts would follow noise.",
    "undecided": "Record more rows of both texts, and run this again.",
}
print(f"{found.verdict}: {NEXT[found.verdict]}")
with open("diagnosis.json", "w") as file:
    json.dump(found.to_json(), file)
print("Written: diagnosis.json (the verdict and the frequencies; no token's experts).")
