"""TOFU on a model that is trained here: what it learns, what is asked, and configs/tofu_small.py on made-up sets."""

import numpy as np
import pytest

from tests import tiny
from tests.run.toy import EVALUATION, VOCABULARY, WORDS, measured
from tests.tiny import write_lines
from trace_jax.config import as_dict
from trace_jax.data.corpora import build_corpora
from trace_jax.run.experiment import load_config
from trace_jax.run.methods import run
from trace_jax.run.study import trials
from trace_jax.tasks.tofu import TofuCorpora

COUNTS = {"forget10": 6, "retain90": 30, "real_authors": 4, "world_facts": 4}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The sets, named so that a pair tells where it is from; every other retain pair is asked."""
    directory, rng = tmp_path_factory.mktemp("tofu"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        pairs = [{"question": f"{name} {i} of?", "answer": " ".join(rng.choice(WORDS, 6))} for i in range(count)]
        write_lines(directory / name / "train.jsonl", pairs)
        wrong = {"perturbed_answer": ["lamp lamp", "stone"], "paraphrased_answer": "window of the tiger"}
        asked = [pair | wrong for pair in (pairs[::2] if name == "retain90" else pairs)]
        write_lines(directory / f"{name.replace('retain90', 'retain')}_perturbed" / "train.jsonl", asked)
    return str(directory)


def test_all_is_learnt_alike_what_is_asked_is_not_held_out_and_only_the_retain_set_is_retained(sets):
    config = TofuCorpora(data=sets, row_length=32, vocab_size=VOCABULARY)
    benchmark = config.build()
    assert {name: len(several) for name, several in benchmark.train.items()} == {"general": 24, "known": 8, "forget": 6}
    held = [d for part in (benchmark.validation, benchmark.test) for d in part.held_out["general"]]
    assert len(held) == 6 and all(int(d.text.split()[2]) % 2 for d in held)
    seen = {name: benchmark.mixture[name] / sum(len(d.text) + len(d.answer or "") for d in several)
            for name, several in benchmark.train.items()}  # fmt: skip
    assert np.ptp(list(seen.values())) < 1e-12 and sum(benchmark.mixture.values()) == pytest.approx(1)
    corpora = build_corpora(config)
    np.testing.assert_array_equal(corpora.retain.tokens, corpora.train["general"].tokens)
    assert set(corpora.retrain_mixture) == {"general", "known"}


def test_the_config_measures_forget_quality_and_utility_along_a_run(sets, tmp_path):
    small = {"data.data": sets, "data.row_length": 32, "data.vocab_size": VOCABULARY, "evaluation.tofu.data": sets}
    small |= {f"model.{name}": value for name, value in as_dict(tiny.CONFIG).items() if name != "vocab_size"}
    small |= {"model.vocab_size": VOCABULARY, "evaluation.tofu.max_new_tokens": 4, "methods": ["uniform"]}
    small |= {"target.steps": 4, "target.batch_size": 8, "unlearning.steps": 2, "unlearning.evaluate_every": 1}
    small |= {f"evaluation.{name}": value for name, value in EVALUATION.items()}
    config = load_config("configs/tofu_small.py", small)
    assert config.evaluation.tofu.forget == config.data.forget == "forget10"
    labels = {trial.label for part in ("weightings", "objectives")
              for trial in trials(load_config(f"configs/tofu_small.py:{part}", small))}  # fmt: skip
    assert {"trace@alpha=4", "npo+uniform@alpha=4", "undial+trace_rows@alpha=1"} <= labels
    run(config, tmp_path)
    target, retrained, made = (measured(tmp_path, name) for name in ("target", "retrained", "uniform"))
    assert retrained["tofu_forget_ks"]["value"] == 0 and made["tofu_forget_ks"]["n"] == COUNTS["forget10"]
    assert target["tofu_forget_probability"]["value"] != made["tofu_forget_probability"]["value"]
    assert 0 <= made["tofu_model_utility"]["value"] <= 1
