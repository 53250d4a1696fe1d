# ---
# jupyter:
#   accelerator: TPU
#   colab: {gpuType: V5E1, provenance: []}
# ---

# %% [markdown]
# # Unlearn a checkpoint
#
# Makes a published mixture-of-experts checkpoint forget text of yours, and gives you back a checkpoint.
# transformers loads it like the original. Granite 3.1 (1.3 B parameters, 400 M active) on a free TPU v5e-1; OLMoE (6.9
# B, 1.3 B active) on a TPU v6e-1 or one large GPU.
#
# What is tested, from top to bottom, is a tiny checkpoint of the same family. At full size nobody has measured this
# yet: read the table at the end before you trust a result, and tune `alpha` and the learning rate on your text.

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
# Paste text between the quotes; an empty line ends a document, and long documents are welcome.
#
# - **forget**: what the model shall no longer know.
# - **retain**: what it shall keep, of any kind; the more the better.
# - **neighbour** (may stay empty): text close to what is to be forgotten, that must survive.
#
# Leave all three empty to see the example: the annual messages of Abraham Lincoln are forgotten, those of the
# presidents before and after him are neighbours, and those since 1901 are retained.

# %%
forget = """
"""

retain = """
"""

neighbour = """
"""

# %%
import json
from pathlib import Path

import pandas as pd

from trace_jax.tasks.presidents import load_addresses

pasted = {"forget": forget, "retain": retain, "neighbour": neighbour}
texts = {name: [t.strip() for t in text.split("\n\n") if t.strip()] for name, text in pasted.items()}
if not any(texts.values()):
    uses = {"lincoln": "forget", "buchanan": "neighbour", "johnson-17": "neighbour"}
    for address in load_addresses():
        if use := uses.get(address.president, "retain" if address.year >= (1990 if CI else 1901) else None):
            texts[use] += [address.document.text[: 1500 if CI else None]]

files = {name: f"{name}.jsonl" for name in texts if texts[name]}
for name, file in files.items():
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[name]))


def shown(rows, columns):
    """A table with its text to the left."""
    left = [{"selector": "th, td", "props": "text-align: left !important; vertical-align: top"}]
    return pd.DataFrame(rows, columns=columns).style.hide(axis="index").set_table_styles(left)


first = [(name, len(texts[name]), f"{sum(map(len, texts[name])):,}", texts[name][0][:160]) for name in files]
shown(first, ["use", "documents", "characters", "the first begins"])

# %% [markdown]
# ## Settings
#
# TRACE on rows. Only some experts of each layer train, those that forget text uses most beyond retain text; routers,
# attention and embeddings stay as they are. A row whose loss has risen to 6 nats a token is not pushed further.

# %%
precision = "float32" if CI else "bfloat16"


def settings(checkpoint, experts):
    return {
        "name": "checkpoint",
        "methods": ("trace_rows",),
        "export": "trace_rows",
        "model": {"path": checkpoint, "dtype": precision},
        "data": {"benchmark": "text", "row_length": 128 if CI else 512, **files},
        "unlearning": {
            "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
            "trainable": {"name": "selected_experts", "experts": {"name": "difference", "top": experts}},
            "alpha": 16.0,
            "learning_rate": 1e-2 if CI else 1e-5,
            "warmup_steps": 2 if CI else 20,
            "steps": 8 if CI else 200,
            "forget_batch_size": 4,
            "retain_batch_size": 8,
            "evaluate_every": 4 if CI else 25,
        },
        "evaluation": {"batch_size": 8, "max_rows": 16 if CI else 96, "max_prompts": 16, "patching": False},
        "parallel": {"remat": "layer"},
    }


# %% [markdown]
# ## Which checkpoint fits
#
# From the largest down: `config.json` alone is fetched, and the programs of the run are compiled for the device that
# is here, without weights. What trains costs 16 bytes a number: a float32 copy, its gradient and Adam's two moments.

# %%
choices = [
    ("allenai/OLMoE-1B-7B-0924", 8),  # and how many experts of each layer train
    ("ibm-granite/granite-3.1-1b-a400m-base", 8),
    ("ibm-granite/granite-3.1-1b-a400m-base", 2),
]

# %%
# @title (A test without a network makes a tiny checkpoint instead. Skip this cell.) { display-mode: "form" }
if CI:
    import numpy as np
    import transformers
    from safetensors.numpy import save_file

    import trace_jax as tj

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shapes = {"embed_tokens": (512, 64), "norm": (64,)}
    of_layer = {f"self_attn.{x}_proj": (32 if x in "kv" else 64, 64) for x in "qkvo"}
    of_layer |= {"input_layernorm": (64,), "post_attention_layernorm": (64,), "block_sparse_moe.router.layer": (8, 64)}
    of_layer |= {"block_sparse_moe.input_linear": (8, 64, 64), "block_sparse_moe.output_linear": (8, 64, 32)}
    shapes |= {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in of_layer.items()}
    shapes = {"lm_head.weight": (512, 64)} | {f"model.{name}.weight": shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    tensors = {n: np.ones(s) if "norm" in n else 0.02 * rng.standard_normal(s) for n, s in shapes.items()}
    Path("untrained").mkdir(exist_ok=True)
    save_file(
        {name: x.astype(np.float32) for name, x in tensors.items()}, "untrained/model.safetensors", {"format": "pt"}
    )
    tokenizer = tj.train_tokenizer(texts["forget"], sizes["vocab_size"])
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    for part in (transformers.GraniteMoeConfig(**sizes, **marks, dtype="float32"), tokenizer):
        part.save_pretrained("untrained")
    tiny = tj.load_pretrained("untrained")
    rows = tj.pack([text for name in files for text in texts[name]], tiny, row_length=128)
    trained = tj.train(tiny.config, rows, config=tj.TrainingConfig(steps=10))
    tj.save_pretrained(tiny.replace(params=trained.params), "tiny-granite", overwrite=True)
    choices = [("tiny-granite", 2)]

# %%
import trace_jax as tj
from trace_jax.plan.machine import here
from trace_jax.plan.plan import plan


def fetch(repository, **what):
    """The directory of a checkpoint, or of a part of it."""
    if CI:
        return repository
    from huggingface_hub import snapshot_download

    return snapshot_download(repository, local_dir=repository.partition("/")[2], **what)


device, spare = here(precision), 2**30  # bytes that what is not planned for shall find free
for repository, experts in choices:
    checkpoint = fetch(repository, allow_patterns=["config.json"])
    config = tj.load_config(settings(checkpoint, experts))
    plan(config, device, output="plan.json")
    programs = pd.DataFrame(json.loads(Path("plan.json").read_text())["programs"]).set_index("program")
    fits = bool((programs["peak"] + spare <= device.chip.memory).all())
    of = config.model.shape().num_experts
    print(f"{repository}, {experts} of {of} experts of each layer train: {'fits' if fits else 'does not fit'}")
    if fits:
        break
if not fits:
    raise SystemExit("Nothing fits here. Runtime > Change runtime type: TPU v5e-1 is free.")
(programs[["parameters", "optimizer", "inputs", "temporaries", "peak", "capacity"]] / 2**30).map("{:.3g}".format)  # GiB

# %% [markdown]
# The table is of the checkpoint that is taken, in GiB on each device: `peak` is what a program needs while it runs,
# `capacity` what the device has.
#
# ## Fetch it, and unlearn
#
# Granite is 2.7 GB, OLMoE 13.8 GB. Then the stages of a run, one after the other: routing statistics, calibration,
# unlearning with an evaluation every few steps, evaluation. Interrupt it when you like: the same cell goes on where it
# stopped.

# %%
fetch(repository, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt"])
run = tj.run(config, overwrite=True)
run

# %% [markdown]
# ## Before and after, in numbers
#
# Along the way, on text that was held out. *Forget probability ratio*: how likely a token of the forget text is,
# against before (1). *Utility*: the same of text to keep, at most 1. A good run falls in the first and stays up in the
# others.

# %% tags=["picture"]
import matplotlib.pyplot as plt

measured = run.metrics().query("split == 'test'")
names = ["forget_probability_ratio", "neighbour_utility", "general_utility"]
along = measured.query("method == 'trace_rows' and name in @names")
figure, axis = plt.subplots(figsize=(7, 2.8))
for name, line in along.groupby("name"):
    axis.plot(line["step"], line["value"], marker="o", label=name)
    axis.fill_between(line["step"], line["low"], line["high"], alpha=0.2)
axis.set_title(f"{repository}, {experts} of {of} experts of each layer trained")
axis.set(xlabel="step", ylim=(0, 1.05))
axis.legend()
plt.show()

# %% [markdown]
# Everything that was measured on test text, before and after, with 95 % intervals.

# %%
last = measured[measured["step"] == measured.groupby("method")["step"].transform("max")]
last = last.assign(shown=[f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in last.itertuples()])
last.pivot(index="name", columns="method", values="shown").fillna("")

# %% [markdown]
# ## Before and after, in words
#
# Each model goes on with the beginning of a document, always with the likeliest token. A base model that never learnt
# your text by heart says something else already before; what counts is what changes.

# %%
models = {"before": run.model("target"), "after": run.model("trace_rows")}
beginnings = [" ".join(text.split()[:24]) for name in files for text in texts[name][:2]]
said = {"use": [name for name in files for _ in texts[name][:2]], "beginning": beginnings}
for name, model in models.items():
    said[name] = [w.text for w in tj.generate_text(model, beginnings, max_new_tokens=8 if CI else 32)]
shown(said, list(said))

# %% [markdown]
# ## The checkpoint, in transformers
#
# `export` has the names, types and layout of the original; tensors that did not train are the original's byte for
# byte. Loaded with transformers it must give the same numbers: to about 1e-5 in float32. In bfloat16 every step rounds
# at the third digit: a tiny checkpoint differed by 4 % of the largest logit, and the likeliest tokens were the same.

# %%
import importlib.util

import numpy as np

export = run.directory / "export"
if importlib.util.find_spec("torch"):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    served = AutoModelForCausalLM.from_pretrained(export, dtype=getattr(torch, precision))
    ids = AutoTokenizer.from_pretrained(export)(beginnings[0], return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = served(ids).logits[0].float().numpy()
    after = models["after"]
    ours = tj.forward(after.params, after.config, ids.numpy().astype(np.int32)).logits[0]
    ours = np.asarray(ours, np.float32)
    difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"largest difference of {ours.size:,} logits: {difference:.2g} of {largest:.3g}")
    print(f"the likeliest token is the same at {same:.1%} of the positions")
else:
    print("PyTorch is not installed here; transformers needs it to load", export)

# %% [markdown]
# ## Take it with you
#
# One archive, uncompressed: weights hardly shrink. On Colab a copy on your Drive is quicker than a download by the
# browser. Its README.md says what was unlearned, how, and what was measured.

# %%
import os
import shutil

from IPython.display import FileLink, display

archive = shutil.make_archive("unlearned", "tar", export)
print(f"{archive}: {os.path.getsize(archive) / 1e9:.2f} GB")
if "COLAB_RELEASE_TAG" in os.environ:
    from google.colab import drive

    drive.mount("/content/drive")
    print("copied to", shutil.copy(archive, "/content/drive/MyDrive"))
else:
    display(FileLink("unlearned.tar"))
