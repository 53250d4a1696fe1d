"""A shrunken model planned for CPU devices, and for a TPU slice where its compiler is there; matmul work is exact."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from trace_jax.config import as_dict, resolve
from trace_jax.main import main
from trace_jax.models.architecture import abstract_params, count_params, flatten, init_params
from trace_jax.models.model import Model
from trace_jax.plan.machine import Chip, Target
from trace_jax.plan.plan import meshes, ranked
from trace_jax.plan.programs import _needed, matmul_work, predict, programs
from trace_jax.run.experiment import ExperimentConfig
from trace_jax.unlearning import unlearn as unlearning
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.trainable import factors, is_of_experts, trainable_paths

CONFIG = {
    "name": "shrunken",
    "model": {
        "vocab_size": 512, "hidden_size": 32, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_size": 8,
        "num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 24,
    },
    "data": {"row_length": 16},
    "unlearning": {"forget_batch_size": 8, "retain_batch_size": 8, "trainable": "down_projections"},
    "evaluation": {"batch_size": 8},
    "parallel": {"expert": 2, "tensor": 2, "remat": "layer"},
}  # fmt: skip


CHIP = Chip("CPU", flops=1e9, memory=1e10, bandwidth=1e9, link=1e9)


@pytest.fixture(scope="module")
def config():
    return resolve(ExperimentConfig, CONFIG)


def planned(config, data=2, expert=2, tensor=2):
    """The step of an experiment on a mesh of these sizes."""
    parallel = dataclasses.replace(config.parallel, data=data, expert=expert, tensor=tensor)
    return next(programs(config, config.model, parallel, tiny.mesh_of(data, expert, tensor)))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {CONFIG!r}\n")
    return str(tmp_path / "config.py")


def test_the_command_prints_and_writes_every_number(file, tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert main(["plan", "--config", file, "--cpu", "8", "--price", "2", "--json", str(output)]) == 0
    text = capsys.readouterr().out
    for words in ("unlearning step", "statistics pass", "decoding step", "peak memory", "bound by", "what moves most"):
        assert words in text
    written = json.loads(output.read_text())
    assert [p["program"] for p in written["programs"]] == ["unlearning step", "statistics pass", "decoding step"]
    assert written["parallel"] == {**as_dict(resolve(ExperimentConfig, CONFIG).parallel), "data": 2}
    for p in written["programs"]:
        assert p["peak"] == p["parameters"] + p["optimizer"] + p["inputs"] + p["temporaries"] and p["fits"]
        assert p["least"] == p["seconds"][p["bound"]] <= p["most"] and p["flops"] > 0 and p["memory_bytes"] > 0
        moved = [each["bytes"] for each in p["operations"]]
        assert moved == sorted(moved, reverse=True) and len(moved) == 10 and sum(moved) <= p["memory_bytes"]
    gathers = next(e for e in written["programs"][0]["exchanges"] if e["kind"] == "all-gather")
    assert gathers["count"] > 6 and gathers["bytes"] > 0  # at least one per layer, though layers stand in a loop


@pytest.mark.parametrize("where", ["--gpus", "--cpu"])
def test_a_machine_of_nothing_is_refused(where, file, capsys):
    assert main(["plan", "--config", file, where, "0"]) == 2
    assert f"{where} is 0; expected" in capsys.readouterr().err


def test_the_step_that_is_planned_is_the_one_that_runs(config, monkeypatch):
    """To the letter of what is compiled; so its peak memory is what XLA reports for the step of a run."""
    seen = []

    def record(*arguments, step=unlearning.unlearning_step, **settings):
        seen.append(step.trace(*arguments, **settings))
        raise InterruptedError

    rows, model = tiny.make_rows(8, length=16), Model(config.model, init_params(config.model, jax.random.key(0)))
    monkeypatch.setattr(unlearning, "unlearning_step", record)
    with pytest.raises(InterruptedError):
        unlearning.unlearn(
            model, rows, rows, config=config.unlearning, mesh=tiny.mesh_of(2, 2, 2), parallel=config.parallel
        )
    program, memory = planned(config), seen[0].lower().compile().memory_analysis()
    assert str(program.traced.jaxpr) == str(seen[0].jaxpr)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = predict(program, CHIP, jax.devices())["peak"]
    assert peak == pytest.approx(used + memory.temp_size_in_bytes, rel=0.1)


def test_what_holds_routers_is_counted(config):
    """Inputs on every device, and its share of the experts' bases and bounds: one expert on each of eight devices."""
    free = dataclasses.replace(config.unlearning, trainable="all")
    held = dataclasses.replace(free, grip={"name": "project", "tokens": 16})
    plain, protected = (planned(dataclasses.replace(config, unlearning=each)) for each in (free, held))
    D, tokens, rank = 32, 16, 8  # twice the average expert's share of the tokens
    assert protected.parameters - plain.parameters == 4 * 6 * (tokens * D + D * rank + tokens) + 8
    assert "while" in str(protected.traced.jaxpr)


def test_more_devices_hold_less_each(config):
    total, alone = 4 * count_params(config.model)[0], planned(config, 1, 1, 1)
    assert alone.parameters == pytest.approx(total, rel=0.001)
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        program = planned(config, *sizes)
        assert program.parameters == pytest.approx(total / 8, rel=0.1)
        assert program.optimizer == pytest.approx(alone.optimizer / 8, rel=0.01)


@pytest.mark.parametrize("trainable", ["seuf", "lora"])
def test_a_plan_of_a_part_counts_the_numbers_of_the_part(config, trainable):
    """On one device, where nothing is split: weights and two moments in float32 of trainable parameters."""
    model, some = config.model, UnlearningConfig(trainable=trainable, forget_batch_size=8)
    paths, shapes = trainable_paths(model, some.trainable), flatten(abstract_params(model))
    if trainable == "lora":
        numbers = sum(np.prod(spec.shape) for spec in factors(model, paths, 8).values())
    else:  # one of the eight experts of every layer, and the routers
        numbers = sum(shapes[path].size // (8 if is_of_experts(path) else 1) for path in paths)
    program = planned(dataclasses.replace(config, unlearning=some), 1, 1, 1)
    assert program.optimizer == pytest.approx(3 * 4 * numbers, rel=0.001)


def test_inputs_that_do_not_fit_are_not_compiled(config):
    prediction = predict(planned(config), dataclasses.replace(CHIP, memory=1000.0), jax.devices())
    assert not prediction["fits"] and prediction["peak"] > 100_000 and prediction["temporaries"] is None


def test_search_takes_the_fewest_microbatches_that_fit_and_ranks_by_time(config, monkeypatch):
    """With a compiler that says: two rows a device fit at a time, experts cost time, and two of them are too large."""
    tried = []

    def compiled(parallel, target, mesh):
        tried.append(parallel)
        rows = config.unlearning.forget_batch_size / (parallel.data * parallel.expert * parallel.microbatches)
        peak = 200 if parallel.expert == 2 else 50 * rows
        numbers = {"parameters": 20, "optimizer": 10, "capacity": 100, "least": float(parallel.expert)}
        return {**numbers, "peak": peak, "fits": peak <= 100}

    monkeypatch.setattr("trace_jax.plan.plan.programs", lambda config, model, parallel, mesh: iter([parallel]))
    monkeypatch.setattr("trace_jax.plan.plan._predicted", compiled)
    monkeypatch.setattr("trace_jax.plan.plan.meshes", lambda *_: [(1, 4, 2), (1, 2, 4), (1, 1, 8)])
    layouts = ranked(config, config.model, Target("eight", CHIP, jax.devices()))
    assert [(p.expert, p.microbatches, q["fits"]) for p, q in layouts] == [(1, 4, True), (4, 1, True), (2, 4, False)]
    assert len(tried) == 3 + 1 + 3  # until two rows fit; at once; until no rows are left to divide


def test_meshes_divide_experts_and_heads(config):
    assert (2, 2, 2) in meshes(8, config.model) and (1, 8, 1) in meshes(8, config.model)
    assert all(np.prod(mesh) == 8 and mesh[2] <= 4 for mesh in meshes(8, config.model))


def test_a_tpu_slice_is_planned_without_one_or_the_answer_is_what_to_install(file, capsys):
    code = main(["plan", "--config", file, "--topology", "v5e:2x4"])
    out, err = capsys.readouterr()
    if importlib.util.find_spec("libtpu") is None:  # the TPU compiler
        assert code == 2 and f'pip install "jax[tpu]=={jax.__version__}"' in err
    else:
        assert code == 0 and "TPU v5e" in out and "DOESN'T FIT" not in out


# --- the work of matmuls

N, D, F, E, LAYERS = 32, 16, 24, 4, 3
MATMUL = 2 * N * D * F


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def flops(fn, *arguments):
    return matmul_work(jax.jit(fn).trace(*arguments).jaxpr)[0]


def test_layers_in_a_scan_and_their_gradients():
    def loss(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    arguments = shape(N, D), shape(LAYERS, D, D)
    assert flops(loss, *arguments) == LAYERS * 2 * N * D * D
    assert flops(jax.grad(loss, argnums=(0, 1)), *arguments) == 3 * LAYERS * 2 * N * D * D  # backward: two more each


def test_a_checkpointed_layer_is_computed_twice():
    def loss(x, w, v):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ v))(x))

    assert flops(jax.grad(loss, argnums=0), shape(N, D), shape(D, F), shape(F, D)) == 3 * 2 * MATMUL


def test_grouped_matmul_counts_each_row_once():
    def loss(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    arguments = shape(N, D), shape(E, D, F), shape(E, dtype="int32")
    assert flops(loss, *arguments) == MATMUL
    assert flops(jax.grad(loss, argnums=(0, 1)), *arguments) == 3 * MATMUL
    assert matmul_work(jax.jit(loss).trace(*arguments).jaxpr, filled=0.5)[0] == MATMUL / 2


def test_a_device_counts_its_own_share():
    specs = P("data"), P()
    split = jax.shard_map(jnp.matmul, mesh=tiny.mesh_of(4, 1, 1), in_specs=specs, out_specs=specs[0])
    assert flops(split, shape(N, D), shape(D, F)) == MATMUL / 4


def test_full_precision_takes_six_passes_on_a_bfloat16_unit():
    def fn(x, w):
        return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)

    for dtype, passes in (("float32", 6), ("bfloat16", 1)):
        work = matmul_work(jax.jit(fn).trace(shape(N, D, dtype=dtype), shape(D, F, dtype=dtype)).jaxpr)
        assert work.tolist() == [MATMUL, passes * MATMUL]


def test_what_the_compiler_refuses_says_what_it_needs():
    refused = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.54G of 15.75G hbm."
    assert _needed(RuntimeError(refused)) == int(22.54 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        _needed(RuntimeError("INTERNAL: Used 1G of 2G"))
