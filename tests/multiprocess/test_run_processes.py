"""Two processes run the whole pipeline on one mesh, statistics to export, and end in the numbers of one process."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.run.toy import SMALL, on_one_device, save_checkpoint
from tests.two_processes import DEVICES, run_processes
from trace_jax.io.files import read_json, read_lines
from trace_jax.main import main
from trace_jax.models import decoder
from trace_jax.routing.statistics import ExpertStatistics
from trace_jax.routing.weights import RetainWeights
from trace_jax.run.directory import calibration_directory

# Layers in a scan compile sooner than layers written out.
RUN = f"""{DEVICES}
import sys
from trace_jax.main import main
from trace_jax.models import decoder
decoder.UNROLLED_LAYERS = 1
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = {
    **SMALL,
    "methods": "('trace_rows',)",
    "unlearning.objective.nll_ceiling": 20.0,
    "unlearning.trainable": "selected_experts",
    "evaluation.max_members": 4,
    "evaluation.max_gradients": 2,
    "evaluation.patching": True,
    "attacks": {
        "relearning": {"steps": [2], "batch_size": 2, "learning_rate": 1e-3},
        "quantization": {"bits": [4]},
        "router_swap": {},
        "expert_forcing": {},
    },
}


def numbers_of(directory):
    """Values of all measurements, those of attacks too, but AUCs of four texts, which a rounding moves by a sixth."""
    points = [read_json(directory / "results.json")]
    for name in SETTINGS["attacks"]:
        points += read_json(directory / "attacks" / f"{name}.json")["points"]
    values = [(m["name"], m["value"]) for point in points for m in point["measurements"]]
    put = read_json(directory / "patching.json")["models"]
    values += [(name, number["value"]) for row in put for name, number in row["values"].items()]
    return [value for name, value in values if not name.startswith(("membership", "privleak"))]


def test_two_processes_end_in_the_numbers_of_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "UNROLLED_LAYERS", 1)
    one, two, checkpoint = tmp_path / "one", tmp_path / "two", tmp_path / "olmoe"
    save_checkpoint(checkpoint, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    files = {f"data.{name}": data / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}

    def arguments(workdir, **more):
        values = {**SETTINGS, "model.path": checkpoint, **files, **more}
        options = [f"--config.{name}={value}" for name, value in values.items()]
        return ["--config", "configs/huggingface.py", "--workdir", str(workdir), *options]

    with on_one_device():
        assert main(arguments(one)) == 0
    ended = run_processes(RUN, [arguments(two, **{"parallel.expert": 2, "parallel.tensor": 1})] * 2, seconds=900)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-3000:] + ended[1][2][-3000:]

    for name in ("forget", "retain"):
        counts = [ExpertStatistics.load(path / "statistics" / f"{name}.npz").counts for path in (one, two)]
        np.testing.assert_array_equal(*counts)
    method = "methods/trace_rows"
    weights = [RetainWeights.load(calibration_directory(path, "trace_rows")) for path in (one, two)]
    assert weights[0].selected.any() and np.array_equal(weights[0].selected, weights[1].selected)
    np.testing.assert_allclose(weights[1].row_probability, weights[0].row_probability, atol=1e-9)
    steps = [[row for row in read_lines(path / method / "metrics.jsonl") if "loss" in row] for path in (one, two)]
    assert [row["step"] for row in steps[1]] == [1, 2], "one process writes each line once"
    for mine, other in zip(*steps, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
    tensors = [load_file(path / "export" / "model.safetensors") for path in (one, two)]
    for name, array in tensors[0].items():
        np.testing.assert_allclose(tensors[1][name], array, atol=1e-3, err_msg=name)
    before = load_file(checkpoint / "model.safetensors")
    assert any(not np.allclose(tensors[0][name], array, atol=1e-2) for name, array in before.items())
    for mine, other in zip(*(numbers_of(path / method) for path in (one, two)), strict=True):
        assert mine == pytest.approx(other, rel=0.02, abs=0.02)
    assert (two / "report.html").exists() and not list(two.rglob("*.tmp*"))
