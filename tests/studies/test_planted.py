"""The study of planted experts: what rules find is judged by hand, and all of it runs once on a few substances."""

import json
import runpy
import types

import numpy as np
import planted as study
import pytest

import trace_jax as tj
from trace_jax.data.corpora import Probes, encode_questions
from trace_jax.models.architecture import flatten
from trace_jax.models.model import SpecialTokens, TextCodec
from trace_jax.tasks.handbook import make_pages, make_questions, make_substances

SHAPE = {"vocab_size": 400, "hidden_size": 16, "head_size": 8, "num_experts": 8, "expert_hidden_size": 8}
RESULTS = runpy.run_path("scripts/results.py")


def test_chance_finds_half_of_the_pairs_and_a_rule_that_knows_finds_all():
    reached = np.array([[True] * 6 + [False] * 2] * 2)
    planted = study.drawn(reached, 3, np.random.default_rng(0))
    assert sorted(planted.sum(axis=1)) == [1, 2] and (reached | ~planted).all()
    with pytest.raises(ValueError, match="are to be planted, and forget text reaches"):
        study.drawn(reached, 14, np.random.default_rng(0))
    knows = study.agreement(planted.astype(float), planted, reached)
    assert knows == {"precision": 1.0, "auc": 1.0}
    same = study.agreement(reached.astype(float), planted, reached)  # of all that are reached, none before another
    assert same["auc"] == 0.5
    misled = study.agreement(-planted.astype(float), planted, reached)
    assert misled == {"precision": 0.0, "auc": 0.0}
    assert study.overlap(reached, planted) == {"precision": 3 / 12, "recall": 1.0, "selected": 12}


def corpora(seed):
    """Eight substances a topic, of which every other one is asked for on test."""
    rng = np.random.default_rng(seed)
    substances = make_substances({"forget": 8, "neighbour": 8}, rng=rng)
    pages = {s: [page.text for page in make_pages(s, 8, rng)] for s in substances}
    texts = {topic: [p for s in substances if s.topic == topic for p in pages[s]] for topic in ("forget", "neighbour")}
    texts["general"] = [f"The house {n} has {n % 7} rooms and {n % 5} gardens." for n in range(200)]
    tokenizer = tj.train_tokenizer([text for several in texts.values() for text in several], SHAPE["vocab_size"])
    codec = TextCodec(tokenizer, SpecialTokens(), SHAPE["vocab_size"])
    rows = {name: tj.pack(several, tokenizer, row_length=64) for name, several in texts.items()}
    probes = {}
    for place, split in enumerate(("validation", "test")):
        asked = {t: [s for s in substances if s.topic == t][place::2] for t in ("forget", "neighbour")}
        questions = {t: encode_questions(codec, make_questions(of, rng)) for t, of in asked.items()}
        own = tj.pack([text for s in asked["forget"] for text in pages[s]], tokenizer, row_length=64)
        probes[split] = Probes(questions, {"general": rows["general"], "forget": own}, {}, {})
    retain = tj.Rows.concatenate([rows["general"], rows["neighbour"]])
    return types.SimpleNamespace(tokenizer=tokenizer, train=rows, forget=rows["forget"], retain=retain, **probes)


def test_a_whole_study_in_small(tmp_path, monkeypatch):
    ways = (("calibrate", "nothing"), ("calibrate", "random"), ("train", "planted"))
    for name, value in (("corpora_of", corpora), ("WAYS", ways), ("LEVEL", 2.0)):  # any accuracy is below the level
        monkeypatch.setattr(study, name, value)
    few = {"steps": 4, "batch_size": 8, "warmup_steps": 1}
    small = {"planting_steps": 3, "steps": 2, "alphas": (1.0,), "learning_rates": (1e-3,), "relearning_steps": 1}
    scale = study.Scale({"tiny": SHAPE}, {"tiny": (2,)}, training=few, unlearned_from=0.0, max_rows=4, **small)
    arguments = ["--workdir", str(tmp_path), "--seeds", "0", "1", "--workers", "0"]
    told = study.main(arguments, scale)
    assert told == json.loads((tmp_path / "planted.json").read_text())

    planted = told["raw"]["plantings"]["tiny-0-2"]
    base, after = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("base-tiny-0", "plant-tiny-0-2"))
    expected = {tuple(place) for place in planted["experts"]}
    for path in base:
        moved = base[path] != after[path]
        if path.startswith("layers/experts/"):
            assert {(i, j) for i, j in np.argwhere(moved.reshape(2, 8, -1).any(axis=2)).tolist()} == expected
        else:
            assert not moved.any(), path

    chosen = {way: planted[way]["chosen"] for way in planted if way in ("calibrate nothing", "train planted")}
    for point in chosen.values():  # any accuracy is below the level, so that the original model is read
        assert point["test"]["forget"] == planted["after"]["known"]["forget"] and point["test"]["general"] == 1.0
    assert planted["calibrate random"]["sample"] >= 0.199 and planted["calibrate random"]["closed"] > 0
    says = "Training C* alone keeps more than training all."
    [claim] = [c for c in told["claims"] if c["claim"] == says]
    assert (claim["value"], claim["n"], claim["over"]) == (0.0, 2, "2 seeds, 2 planted models")
    assert says in RESULTS["claims_table"]({"planted": told}) and "precision" in RESULTS["section"](told)
    assert all(RESULTS["draw"](figure).startswith(b"<?xml") for figure in told["figures"])

    monkeypatch.setattr(study.tj, "unlearn", None)  # nothing is computed twice
    again = study.main(arguments, scale)
    assert again == told | {"seconds": again["seconds"]}
    with pytest.raises(SystemExit, match="other settings"):
        study.main(arguments, study.FULL)


def test_the_model_after_planting_is_what_was_learnt():
    """A task vector is subtracted; mirrored, the loss on what was learnt has gone down."""
    world, shape = corpora(0), tj.ModelConfig(**SHAPE)
    model = tj.train(shape, world.retain, config=tj.TrainingConfig(steps=2), tokenizer=world.tokenizer, verbose=False)
    how = {"steps": 6, "learning_rate": 1e-2, "forget_batch_size": 8}
    learnt = study.learnt(model, world.forget, selected=None, seed=0, **how)
    losses = [float(study.score_rows(one, world.forget).sum()) for one in (model, learnt)]
    assert losses[1] < losses[0] - 10 and set(flatten(learnt.params)) == set(flatten(model.params))
