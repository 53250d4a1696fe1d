"""What trains, family by family and preset by preset, is written down; whoever changes it sees it here.

To write the files again after a change that is meant: TRACE_JAX_WRITE_GOLDEN=1 pytest THIS_FILE
"""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import fields_of

from trace_jax.models.arrays import abstract_params, flatten
from trace_jax.models.families import model_config
from trace_jax.unlearning.config import SomeExperts, Trainable
from trace_jax.unlearning.trainable import PRESETS, table_text, trainable_table

GOLDEN, WRITE = Path(__file__).parents[1] / "golden", "TRACE_JAX_WRITE_GOLDEN"


def some_experts(config, preset):
    """SEUF's default, one expert of the model, or two of each layer; None where whole arrays train."""
    selected = np.zeros((len(config.moe_layers), config.num_experts), bool)
    if preset == "seuf":
        selected[-1, 3] = True
    else:
        selected[:, :2] = True
    return selected if issubclass(Trainable.kinds[preset], SomeExperts) else None


def text_of(config, preset):
    rank = 8 if preset == "lora" else None
    return (
        f"{preset}\n{table_text(trainable_table(config, preset, selected=some_experts(config, preset), rank=rank))}\n"
    )


@pytest.mark.parametrize(("family", "layers"), [("olmoe", 3), ("qwen2_moe", 3), ("deepseek_v2", 4)])
def test_what_trains_is_what_is_written_down(family, layers):
    fields = {"model_type": family, **fields_of(family), "num_hidden_layers": layers}
    config = model_config(fields, dtype="bfloat16")
    text, path = "\n".join(text_of(config, preset) for preset in PRESETS), GOLDEN / f"trained_{family}.txt"
    if os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"what trains has changed; if that is meant, run this test with {WRITE}=1"


def test_the_table_counts_every_number_once():
    config = model_config({"model_type": "qwen2_moe", **fields_of("qwen2_moe")}, dtype="float32")
    params = abstract_params(config)
    table = {row["path"]: row for row in trainable_table(config, "seuf", selected=some_experts(config, "seuf"))}
    D, E, F = config.hidden_size, config.num_experts, config.expert_hidden_size
    trained = {path: row["trained"] for path, row in table.items() if row["trained"]}
    assert trained == {"layers/experts/gate_up": D * 2 * F, "layers/experts/down": F * D, "layers/router": D * E}
    assert {path: row["parameters"] for path, row in table.items()} == {p: x.size for p, x in flatten(params).items()}


def test_every_preset_has_a_name_in_the_settings():
    assert set(Trainable.kinds) - {"patterns"} == set(PRESETS)
