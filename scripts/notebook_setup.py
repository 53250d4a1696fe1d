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
