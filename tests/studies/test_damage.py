"""The study of what predicts damage: small and whole, and its readings where the answer is known."""

import damage
import damage_report
import graded
import nearness
import numpy as np
import pytest

import trace_jax as tj

NAMES = ("hazard", "same sentences and values", "people", "recipes", "arithmetic", "Polk, 1845-1848")
TINY = tj.ModelConfig(vocab_size=512, hidden_size=16, head_size=8, num_experts=8, expert_hidden_size=8)
SMALL = damage.Design(
    shapes=(("tiny", TINY),),
    topics=("hazard", "Polk, 1845-1848"),
    training=tj.TrainingConfig(steps=60, batch_size=8, learning_rate=1e-2),
    train_rows=16,
    held_rows=6,
    row_length=64,
    domains=NAMES,
    level=0.2,
    real_level=0.1,
    steps=40,
    learning_rate=5e-3,
    map_shape="tiny",
    map_domains=("same sentences and values", "recipes"),
    map_shares=(0.04, 0.2),
    map_alphas=(4.0,),
    map_rows=25,
    weightings=("uniform", "few experts", "n-grams", "all experts"),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def made(workdir):
    return damage.main(["--workdir", str(workdir), "--seeds", "0", "--workers", "1"], SMALL)


def test_a_small_study_measures_damage_and_gains(made, workdir):
    of_topic = made["raw"]["damage"]["0 / tiny / hazard"]
    assert set(of_topic) == {*NAMES, "forget"} - {"hazard"}
    assert of_topic["forget"] == pytest.approx(SMALL.level, abs=1e-3), "all damage is read where this is forgotten"
    assert of_topic["same sentences and values"] == max(of_topic[name] for name in NAMES[1:])
    gains = made["raw"]["gains"]
    drawn = {w: gains[f"same sentences and values / 0.04 / {w}"]["domain_share"] for w in SMALL.weightings}
    assert drawn["uniform"] == pytest.approx(0.04)
    assert drawn["n-grams"] > 0.08, "a weighting draws what is like the forgotten topic more often"
    assert len(made["claims"]) >= 15 and all(c["value"] is None or np.isfinite(c["value"]) for c in made["claims"])


def test_what_is_kept_is_not_made_again(made, workdir, monkeypatch):
    monkeypatch.setattr(damage, "KINDS", {})
    again = damage.main(["--workdir", str(workdir), "--seeds", "0", "--workers", "0"], SMALL)
    assert again["raw"] == made["raw"]


def test_domains_share_what_their_names_say():
    domains = graded.make_domains(0, things=8, pages=4)
    words = {name: set(" ".join(domain.train).replace(".", "").split()) for name, domain in domains.items()}
    names = {n for n in words["hazard"] if n[0].isupper() and len(n) > 4 and n in words["other relations, same names"]}
    assert len(names) >= 8 and not names & words["same sentences and values"]
    values = {value for relation in graded.FACTS["hazard"].relations for value in relation.values}
    assert len(words["same sentences and values"] & values) > 10 and len(words["same values"] & values) > 10
    assert len(words["same sentences"] & values) < 3 and not words["other relations"] & values
    assert not set(domains["hazard"].train) & set(domains["hazard"].held_out)


def hand_made_features():
    """Three domains and two experts more that all use alike; the second is half way from the third to the first."""
    frequency = np.array([[[0.8, 0.2, 0.5, 0.5]], [[0.6, 0.4, 0.5, 0.5]], [[0.4, 0.6, 0.5, 0.5]]])
    gradients = np.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    ones = np.ones((3, 2))
    return nearness.Features(frequency, ones, ones + 1, ones / 2, gradients, gradients, np.arange(3.0))


def test_nearness_where_it_is_known():
    texts = ["The vault opens.", "The vault opens.", "Rain fell."]
    tokenizer = tj.train_tokenizer(texts, 280)
    train = {name: tj.pack([text], tokenizer, row_length=24) for name, text in zip("abc", texts, strict=True)}
    near = nearness.nearness(hand_made_features(), train, "a", few=2, draws=3)
    # Centre (.5, .5, .5, .5), scaled by 2: (.6, -.6), (.2, -.2), (-.2, .2) along the first's direction
    np.testing.assert_allclose(near["routing, all experts"], np.array([0.6, 0.2, -0.2]) * np.sqrt(2), atol=1e-12)
    # The two highest differences are the first expert's (.3) and, of equals, the third's (0)
    np.testing.assert_allclose(near["routing, few critical experts"], [0.6, 0.2, -0.2], atol=1e-12)
    np.testing.assert_allclose(near["routing, few random experts"], np.tile([0.6, 0.2, -0.2], (3, 1)), atol=1e-12)
    np.testing.assert_allclose(near["gradient"], [1, 0.5, 0], atol=1e-12)
    assert near["n-gram ratio"][1] > near["n-gram ratio"][2]


def test_damage_is_read_at_the_level():
    rows = [{"forget": 0.0, "x": 0.0}, {"forget": 0.8, "x": 0.1}, {"forget": 1.2, "x": 0.3}, {"forget": 0.9, "x": 9.0}]
    assert damage.crossing(rows, 1.0) == pytest.approx({"forget": 1.0, "x": 0.2})
    assert damage.crossing(rows[:2], 1.0) is None


def test_correlations_and_alphas_are_those_of_the_numbers():
    names = ["a", "b", "c", "d"]
    near = {damage_report.ALL: [9, 1, 2, 3], damage_report.FEW: [[9, 3, 2, 1], [9, 1, 2, 3]]}
    rises = {"forget": 1.0, "b": 0.1, "c": 0.2, "d": 5.0}
    design = SMALL._replace(topics=("a",))
    kept = {
        "target": {(0, "tiny"): {"held_out_nll": dict.fromkeys(names, 1.0)}},
        "damage": {(0, "tiny", "a"): {"damage": rises}},
        "nearness": {(0, "tiny"): {"a": near}},
    }
    found = damage_report.correlation_table(design, [0], kept)
    assert found[damage_report.ALL].item() == pytest.approx(1)
    assert found[damage_report.FEW].item() == pytest.approx(0), (
        "the mean of -1 and 1: draws are averaged by what they say"
    )

    def run(validation, test):
        each = {"domain validation": validation, "general validation": 0.0, "domain test": test, "general test": 0.0}
        return {"damage": each}

    design = SMALL._replace(map_domains=("b",), map_shares=(0.1,), weightings=("uniform",))
    runs = {"4": run(0.1, 0.9), "16": run(0.2, 0.1), "64": {"damage": None}}
    cell = {"domain_share": 0.1, "effective_sample": 1.0, "runs": runs}
    entry = damage_report.gain_table(design, [0], {(0, "b", 0.1, "uniform"): cell})["b / 0.1 / uniform"]
    assert entry["alpha"] == "4" and entry["domain"] == [round(float(np.exp(-0.9)), 4)], "chosen without a look at test"
