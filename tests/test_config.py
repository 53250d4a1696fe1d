"""Settings are checked at the door: every mistake is one sentence that names the setting and the way out."""

import dataclasses
import json
import os

import ml_collections
import pytest

from trace_jax.checkpoints.pretrained import PretrainedConfig
from trace_jax.config import ConfigError, as_dict, fingerprint, resolve
from trace_jax.models.architecture import ModelConfig
from trace_jax.routing.config import CalibrationConfig
from trace_jax.run.experiment import METHODS, ExperimentConfig
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.objectives import NPO, GradientDifference, SimNPO
from trace_jax.unlearning.optimizer import TrainingConfig


def experiment(**values) -> ExperimentConfig:
    return resolve(ExperimentConfig, {"name": "x", **values})


HIDDEN = {"methods": ["hidden"], "study": {"methods": ["hidden"]}}
IMPORTED = {"model": {"path": "x"}}
WRONG = [
    ({"naem": "y"}, r"naem: .* did you mean 'name'"),
    ({"series": {"kind": "scalability"}}, r"series\.forget is missing: the forget source of each step"),
    ({"unlearning": {"steps": "60"}}, r"unlearning\.steps is '60' \(str\); expected a whole number"),
    ({"unlearning": {"steps": True}}, r"unlearning\.steps is True"),
    ({"unlearning": {"steps": -1}}, r"unlearning\.steps is -1; expected a value at least 0"),
    ({"unlearning": {"alpha": float("nan")}}, r"unlearning\.alpha is not a number"),
    ({"unlearning": {"objective": "npoo"}}, r"unlearning\.objective is 'npoo'; .* did you mean 'npo'"),
    ({"unlearning": {"objective": 3}}, r"unlearning\.objective is 3 \(int\); expected one of gradient_ascent, "),
    ({"unlearning": {"objective": {"name": "npo", "bta": 1}}}, r"unlearning\.objective\.bta: .* did you mean 'beta'"),
    ({"unlearning": {"objective": {"nll_ceiling": -1}}}, r"unlearning\.objective\.nll_ceiling is -1"),
    ({"unlearning": {"beta": 0.1}}, r"unlearning\.beta: .* write unlearning\.objective\.beta"),
    ({"calibration": {"tau": 1.5}}, r"calibration\.tau: .* write calibration\.rule\.tau"),
    ({"calibration": {"rule": {"name": "difference", "tau": 1.5}}}, r"calibration\.rule\.tau would have no effect"),
    ({**HIDDEN, "calibration": {"rule": "all"}}, r"calibration\.rule would have no effect"),
    ({"model": {"experts_per_token": 17}}, r"17 but there are only 16 experts"),
    ({"methods": ("trase",)}, r"methods is 'trase'; .* did you mean 'trace'"),
    ({"methods": ()}, r"methods is empty"),
    ({"study": {"seeds": [0, 1], "tuning_seeds": [1, 2]}}, r"study\.tuning_seeds has \[1\], which are seeds"),
    ({"study": {"variants": {"npo": {"objective": {}}}}}, r"study\.variants has 'npo': .* settings of unlearning, cal"),
    ({"study": {"variants": {"a/b": {"unlearning": {}}}}}, r"study\.variants has 'a/b': .* a name without /"),
    ({"study": {"variants": {"a": {"calibration": {"rulle": 1}}}}}, r"calibration\.rulle: there is no setting"),
    ({"data": {"benchmark": "text"}}, r"data\.forget is missing"),
    ({"data": {"benchmark": "presidents", "forget_substances": 9}}, r"data\.forget_substances .* belongs to handbook"),
    ({"model": {"path": "x", "hidden_size": 8}}, r"model\.hidden_size: .* Known here: dtype, .*path"),
    ({**IMPORTED, "target": {"steps": 9}}, r"target would have no effect: model\.path names a checkpoint"),
    ({**IMPORTED, "data": {"vocab_size": 400}}, r"data\.vocab_size would have no effect: model\.path names"),
    ({"data": {"vocab_size": 4096}}, r"data\.vocab_size is 4096, and the model knows 2048 tokens"),
    ({"export": "trace", "methods": ("uniform",)}, r"export is 'trace'; expected one of the methods uniform"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[m for _, m in WRONG])
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**values)


def test_a_model_with_a_path_is_imported_and_another_is_trained_with_a_vocabulary_of_its_own():
    trained, imported = experiment(model={"vocab_size": 400}), experiment(model={"path": "x"})
    assert (trained.data.vocab_size, trained.target) == (400, TrainingConfig())
    assert (imported.data.vocab_size, imported.target) == (None, None)
    assert isinstance(imported.model, PretrainedConfig) and imported.model.path == os.path.abspath("x")
    assert resolve(ExperimentConfig, json.loads(json.dumps(as_dict(imported)))) == imported


def test_config_dict_and_json_give_the_same_settings():
    values = {"name": "x", "methods": ("uniform",), "unlearning": {"alpha": 2, "optimizer": {"b2": 0.9}}}
    direct, wrapped = experiment(**values), resolve(ExperimentConfig, ml_collections.ConfigDict(values))
    again = resolve(ExperimentConfig, json.loads(json.dumps(as_dict(direct))))
    assert direct == wrapped == again and isinstance(direct.unlearning.alpha, float)
    assert direct.unlearning.optimization.optimizer.b2 == 0.9 and direct.target.optimization.learning_rate == 5e-3


def test_conditional_defaults_follow_the_deciding_setting():
    assert UnlearningConfig(objective="simnpo").objective == SimNPO(beta=4.5, gamma=0.125)
    rmu, ascent = UnlearningConfig(objective="rmu"), UnlearningConfig(objective="gradient_ascent")
    assert (rmu.retain_loss.name, rmu.layer, rmu.trainable.name) == ("hidden", 1, "down_projections")
    rmu.check_layer(4)
    with pytest.raises(ConfigError, match=r"the model has 24: set unlearning\.objective\.layer"):
        rmu.check_layer(24)
    assert not ascent.retains and ascent.trainable.name == "all"
    assert CalibrationConfig("matching").weighting.rule.name == "difference"


def test_settings_are_hashable_and_frozen_and_told_apart_by_their_content():
    one, same, other = ModelConfig(), ModelConfig(), ModelConfig(num_layers=3)
    assert len({one, same, other}) == 2
    assert fingerprint(one, 1) == fingerprint(same, 1) not in (fingerprint(one, 2), fingerprint(other, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.num_layers = 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves_at_the_budget_of_the_run(name):
    method = experiment().method(name)
    assert method.unlearning.steps == 60 * METHODS[name].steps
    assert METHODS[name].weighting.items() <= as_dict(method.calibration)["weighting"].items()


def test_calibration_settings_reach_the_methods_that_read_them():
    config = experiment(calibration={"rule": {"name": "ratio", "tau": 1.5}, "max_weight": 9.0, "seed": 3})
    trace, hidden = (config.method(name).calibration for name in ("trace", "hidden"))
    assert (trace.weighting.rule.tau, trace.weighting.max_weight, trace.seed) == (1.5, 9.0, 3)
    assert (hidden.weighting.name, hidden.weighting.max_weight) == ("hidden", 9.0)
    assert config.method("uniform").calibration == CalibrationConfig()
    config = experiment(calibration={"rule": {"name": "difference", "top": 3}})
    assert config.method("trace").calibration.weighting.rule.top == 3


def test_the_two_presets_of_trace():
    """docs/method.md: `trace` is the abstract read literally, `trace_rows` this project's variant."""
    trace, rows = (experiment().method(n).calibration.weighting for n in ("trace", "trace_rows"))
    assert (trace.unit, trace.apply) == ("token", "both")
    assert (trace.rule.name, trace.rule.top) == ("difference", 4)
    assert (rows.unit, rows.apply) == ("row", "sampling")
    assert trace.min_effective_sample_size == rows.min_effective_sample_size == 0.2
    assert trace.divergence == rows.divergence == "chi2" and trace.max_weight == rows.max_weight == 50.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, GradientDifference()),
        ({"objective": "npo"}, NPO(beta=0.1)),
        ({"objective": {"name": "npo", "beta": 1}}, NPO(beta=1.0)),
        ({"objective": {"nll_ceiling": 4}}, GradientDifference(nll_ceiling=4.0)),  # of the default
        ({"objective": NPO(beta=5.0)}, NPO(beta=5.0)),
    ],
)
def test_a_variant_is_given_by_name_or_with_its_settings(values, expected):
    config = resolve(UnlearningConfig, values)
    assert config.objective == expected
    assert as_dict(config)["objective"]["name"] == expected.name
    assert resolve(UnlearningConfig, as_dict(config)) == config
