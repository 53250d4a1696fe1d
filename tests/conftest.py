"""Numbers are strict in tests: no silent promotion of types or ranks. Eight simulated devices stand for a real mesh."""

import functools
import os
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little: without optimisation they take a third of the time; and what one test, worker
# or spawned process has compiled the others find on disk. Flags stand once in a spawned process too: they are part of
# the key. XLA ends a process that gives it an unknown flag.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",
            *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),  # unknown to later ones
        ]
    )
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


MOST_MAPS = 40_000  # Linux gives a process 65,530 memory maps, and every compiled program holds some


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs while there is room for those of the next file."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _in_the_repository(pytestconfig):
    os.chdir(pytestconfig.rootpath)


def pytest_addoption(parser):
    about = "write what the tests measured of each family there, one file each"
    parser.addoption("--record-families", metavar="DIR", help=about)


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(model_type): transformers' own tiny random model of a family (`tiny_checkpoints`)."""
    import tiny_checkpoints  # torch and transformers load only for tests that need them

    return functools.cache(tiny_checkpoints.build)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """tiny_checkpoint(model_type, layout="original", legacy=False): the directory where that model is saved."""
    import tiny_checkpoints

    @functools.cache
    def saved(model_type, layout="original", legacy=False):
        directory = tmp_path_factory.mktemp(model_type)
        return tiny_checkpoints.save(tiny_model(model_type), model_type, directory, layout=layout, legacy=legacy)

    return saved


WORDS = [
    "river", "stone", "apple", "cloud", "lamp", "tiger", "violin", "harbour", "window", "garden", "candle", "forest",
    "mirror", "ladder",
]  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Forget text and retain text with words of their own, so that there is something to tell apart."""
    from tests.tiny import write_lines

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    sets = {"forget": (WORDS[:5], 12), "retain": (WORDS[4:], 60), "neighbour": (WORDS[2:8], 30)}
    for name, (words, count) in (sets | {"holdout": sets["forget"]}).items():
        write_lines(folder / f"{name}.jsonl", [{"text": " ".join(rng.choice(words, 60))} for _ in range(count)])
    return folder
