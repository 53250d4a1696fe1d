"""Decoding with a cache equals a whole new forward pass for every token, and its draws follow the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trace_jax.models import generate as decoding
from trace_jax.models.arrays import init_params
from trace_jax.models.config import ModelConfig, Rope
from trace_jax.models.decoder import forward
from trace_jax.models.generate import CHUNK, filter_logits, generate, generate_text, padded_size
from trace_jax.models.model import Model, SpecialTokens

CONFIG = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    num_experts=6,
    experts_per_token=2,
    expert_hidden_size=8,
)
LATENT = {"attention": "latent", "latent_size": 6, "rotary_size": 2, "value_size": 3, "query_latent_size": 5}
ATTENTIONS = {
    "grouped": {},
    "latent, dense layer": {**LATENT, "dense_layers": (0,), "dense_hidden_size": 12},
    "windows, sinks, two ropes": {
        "windows": (0, 3),
        "sinks": True,
        "ropes": (Rope(), Rope(50.0)),
        "layer_ropes": (0, 1),
    },
    "no rope in a layer": {"layer_ropes": (-1, 0), "windows": (4, 0)},
    "another amplitude in long texts": {"ropes": (Rope(long_amplitude=1.7, original_length=9),)},
}
NEW = CHUNK + 3  # more than one chunk
LENGTHS = np.array([3, 7, 1, 5])


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(3))


@pytest.fixture(scope="module")
def prompt():
    return np.asarray(jax.random.randint(jax.random.key(4), (4, 7), 0, CONFIG.vocab_size))


def forward_without_cache(params, config, rows):
    """Logits [B, V] after the last token of each of `rows`."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), 7 + NEW), np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    places = np.arange(7 + NEW, dtype=np.int32)[None]
    mask, positions = places < lengths[:, None], np.minimum(places, lengths.max() - 1)
    logits = _forward(params, config, padded, mask=mask, positions=np.broadcast_to(positions, mask.shape)).logits
    return np.asarray(logits)[np.arange(len(rows)), lengths - 1]


_forward = jax.jit(forward, static_argnames="config")


def continuations(params, config, prompt, lengths):
    rows = [list(row[:used]) for row, used in zip(prompt, lengths, strict=True)]
    for _ in range(NEW):
        likeliest = np.argmax(forward_without_cache(params, config, rows), axis=-1)
        rows = [[*row, int(token)] for row, token in zip(rows, likeliest, strict=True)]
    return np.array([row[used:] for row, used in zip(rows, lengths, strict=True)])


@pytest.mark.parametrize("switches", ATTENTIONS.values(), ids=ATTENTIONS)
def test_equals_repeated_forward_passes_for_prompts_of_unequal_length(switches, prompt):
    config = dataclasses.replace(CONFIG, **switches)
    params = jax.tree.map(lambda a: a + jnp.asarray(0.1, a.dtype), init_params(config, jax.random.key(3)))
    expected = continuations(params, config, prompt, LENGTHS)
    got = generate(params, config, prompt, lengths=LENGTHS, max_new_tokens=NEW)
    np.testing.assert_array_equal(got, expected)
    # What stands behind a prompt in its row is never read.
    other = np.where(np.arange(7)[None] < LENGTHS[:, None], prompt, 9)
    np.testing.assert_array_equal(generate(params, config, other, lengths=LENGTHS, max_new_tokens=NEW), expected)


def test_a_prompt_longer_than_one_piece_is_read_in_pieces(params, prompt, monkeypatch):
    expected = generate(params, CONFIG, prompt, lengths=LENGTHS, max_new_tokens=NEW)
    monkeypatch.setattr(decoding, "_PIECE", 2)
    np.testing.assert_array_equal(generate(params, CONFIG, prompt, lengths=LENGTHS, max_new_tokens=NEW), expected)


def test_a_finished_row_is_filled_with_its_end_token(params, prompt):
    free = generate(params, CONFIG, prompt, max_new_tokens=NEW)
    ends = int(free[0, 2]), int(free[1, 4])
    got = generate(params, CONFIG, prompt, max_new_tokens=NEW, eos_ids=ends)
    for row, expected in zip(got, free, strict=True):
        found = np.flatnonzero(np.isin(expected, ends))
        stop = found[0] if len(found) else NEW - 1
        np.testing.assert_array_equal(row[: stop + 1], expected[: stop + 1])
        assert np.all(row[stop:] == expected[stop])
    assert np.isin(got[:2, -1], ends).all()


def test_decoding_ends_when_every_row_is_done(params, prompt):
    seen = []

    def watch(tokens, done):
        seen.append((tokens.shape[1], done.tolist()))
        return np.array([True, True, True, len(seen) == 2])

    got = generate(params, CONFIG, prompt, max_new_tokens=10 * CHUNK, watch=watch)
    assert seen == [(CHUNK, [False] * 4), (2 * CHUNK, [True, True, True, False])]
    assert np.all(got[:, 2 * CHUNK :] == got[:, 2 * CHUNK - 1 : 2 * CHUNK])
    assert np.all(got[0, CHUNK:] == got[0, CHUNK - 1])


def test_few_programs_are_compiled(params):
    config = dataclasses.replace(CONFIG, num_heads=2)  # not seen by another test
    params = init_params(config, jax.random.key(0))
    for length, new in ((2, 5), (9, 6), (14, 7), (16, 8), (3, CHUNK)):
        for rows in (17, 18, 17):
            generate(params, config, np.ones((rows, length), np.int32), max_new_tokens=new)
    for filters in ({"top_k": 3, "temperature": 0.5}, {"top_k": 4, "top_p": 0.9, "temperature": 2.0, "seed": 5}):
        generate(params, config, np.ones((17, 9), np.int32), max_new_tokens=6, **filters)
    greedy, filtered = (decoding._compiled(config, kind, None) for kind in ("greedy", "filtered"))
    # 17 and 18 rows are 18, prompts up to 16 are 16, caches are 24 and 32; greedy ones, and filtered ones for 24.
    assert [program._cache_size() for program in greedy] == [2, 2, 2]
    assert [program._cache_size() for program in filtered] == [1, 1, 1]


def test_sizes_are_few_and_little_larger_than_asked_for():
    assert [padded_size(n) for n in (1, 16, 17, 24, 25, 32, 33, 48, 100, 512, 513)] == [
        16, 16, 20, 24, 28, 32, 40, 48, 112, 512, 640,
    ]  # fmt: skip
    assert [padded_size(n, least=1, steps=8) for n in (1, 2, 3, 9, 17, 100)] == [1, 2, 3, 9, 18, 104]


# --- drawing ---


def frequencies(draws):
    return np.bincount(draws, minlength=CONFIG.vocab_size) / len(draws)


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}])
def test_draws_follow_the_filtered_distribution(params, settings):
    temperature, prompt = 0.4, [5, 2, 8]
    logits = forward_without_cache(params, CONFIG, [prompt])[0] / temperature
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probability)
    kept = order[: settings.get("top_k", CONFIG.vocab_size)]
    mass = np.cumsum(probability[kept]) / probability[kept].sum()
    kept = kept[: int(np.searchsorted(mass, settings.get("top_p", 1.0))) + 1]
    expected = np.where(np.isin(np.arange(CONFIG.vocab_size), kept), probability, 0)
    expected /= expected.sum()
    draws = generate(params, CONFIG, np.tile(prompt, (4096, 1)), max_new_tokens=1, temperature=temperature, **settings)[
        :, 0
    ]
    assert np.abs(frequencies(draws) - expected).max() < 0.03
    assert set(draws) <= set(kept)


def test_the_likeliest_token_is_kept_by_any_filter():
    logits = jnp.asarray([[0.0, 3.0, 1.0]])
    np.testing.assert_array_equal(filter_logits(logits, 1, 1.0), [[-np.inf, 3, -np.inf]])
    np.testing.assert_array_equal(filter_logits(logits, 3, 1e-6), [[-np.inf, 3, -np.inf]])
    np.testing.assert_array_equal(filter_logits(logits, 2, 1.0), [[-np.inf, 3, 1]])
    np.testing.assert_array_equal(filter_logits(logits, 3, 1.0), logits)


def test_a_rows_draws_depend_on_its_number_and_the_seed_only(params, prompt):
    def draw(prompt, **changes):
        return generate(params, CONFIG, prompt, max_new_tokens=NEW, temperature=1.5, **changes)

    whole = draw(prompt, seed=7)
    np.testing.assert_array_equal(draw(prompt, seed=7), whole)
    np.testing.assert_array_equal(draw(prompt[2:3], seed=7, rows=[2]), whole[2:3])
    np.testing.assert_array_equal(draw(prompt[[3, 1, 0, 2]], seed=7, rows=[3, 1, 0, 2]), whole[[3, 1, 0, 2]])
    padded = np.concatenate([prompt, np.full((4, 30), 9)], axis=1)
    np.testing.assert_array_equal(draw(padded, seed=7, lengths=[7] * 4), whole)
    assert not np.array_equal(draw(prompt, seed=8), whole)
    same = draw(np.tile(prompt[:1], (4, 1)), seed=7)
    assert len({tuple(row) for row in same}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"lengths": np.ones(3, int)}, "lengths has shape"),
        ({"lengths": np.array([1, 2, 3, 8])}, "lengths are 1 to 8; expected 1 to 7"),
        ({"lengths": np.array([0, 2, 3, 7])}, "lengths are 0 to 7"),
        ({"rows": [1]}, "rows has shape"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"prompt": np.ones((4, 0), int)}, "P >= 1"),
    ],
)
def test_wrong_arguments_are_named(params, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(params, CONFIG, **{"prompt": prompt, "max_new_tokens": 1, **changes})


# --- text ---

ALPHABET = ["<bos>", "<eos>", *"abcdefghijklmnopqrs", "é", "."]


@pytest.fixture
def model(params):
    """Every token is one character; é (two bytes, two tokens in a real vocabulary) is one too."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return Model(CONFIG, params, tokenizer, SpecialTokens(bos=0, eos=(1,), pad=0))


PROMPTS = ["abc", "", "hello", "a", "sssssssss"]


def written(model, prompt, count=NEW):
    """The greedy continuation as tokens, which the end token doesn't stop."""
    ids = [0, *(ALPHABET.index(c) for c in prompt)]
    return generate(model.params, model.config, np.array([ids]), max_new_tokens=count)[0]


def text_of(tokens):
    return "".join(ALPHABET[t] for t in tokens if t > 1)


def test_texts_are_continued_in_their_order_and_do_not_depend_on_batches(model):
    model = model.replace(special=SpecialTokens(bos=0, eos=()))
    several = generate_text(model, PROMPTS, max_new_tokens=NEW, batch_size=2)
    for prompt, got in zip(PROMPTS, several, strict=True):
        tokens = written(model, prompt)
        np.testing.assert_array_equal(got.tokens, tokens)
        assert (got.text, got.finished) == (text_of(tokens), "length")
    drawn = [
        generate_text(model, prompts, max_new_tokens=NEW, temperature=2.0, seed=3, batch_size=size)
        for prompts, size in ((PROMPTS, 2), (PROMPTS, 4), (PROMPTS[:3], 1))
    ]
    assert [g.text for g in drawn[0]] == [g.text for g in drawn[1]]
    assert [g.text for g in drawn[0][:3]] == [g.text for g in drawn[2]]


def test_end_tokens_are_the_models(model):
    tokens = written(model, "abc")
    model = model.replace(special=SpecialTokens(bos=0, eos=(22, int(tokens[5]))))
    (got,) = generate_text(model, ["abc"], max_new_tokens=NEW)
    first = int(np.flatnonzero(np.isin(tokens, model.special.eos))[0])
    assert got.finished == "eos"
    np.testing.assert_array_equal(got.tokens, tokens[:first])
    assert got.text == text_of(tokens[:first])


def test_a_stop_string_across_tokens_ends_a_text_and_is_cut(model):
    model = model.replace(special=SpecialTokens(bos=0, eos=()))
    whole = text_of(written(model, "abc", 3 * CHUNK))
    stop = whole[4:7]
    assert whole.index(stop) == 4 and len(stop) == 3
    results = generate_text(model, ["abc", "hello"], max_new_tokens=3 * CHUNK, stop=["zz", stop])
    assert (results[0].text, results[0].finished) == (whole[:4], "stop")
    assert text_of(results[0].tokens) == whole[:7]
    other = text_of(written(model, "hello", 3 * CHUNK))
    assert results[1].text == (other if stop not in other else other[: other.index(stop)])
    between_chunks = whole[CHUNK - 1 : CHUNK + 2]
    (got,) = generate_text(model, ["abc"], max_new_tokens=3 * CHUNK, stop=[between_chunks])
    assert got.text == whole[: whole.index(between_chunks)]


def test_special_tokens_in_a_prompt_are_read_as_such(model):
    model = model.replace(special=SpecialTokens(bos=0, eos=()))
    one, other = generate_text(model, ["<bos>abc", "abc"], max_new_tokens=4)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    model.tokenizer.encode_special_tokens = True  # as training data is read
    (again,) = generate_text(model, ["<bos>abc"], max_new_tokens=4)
    np.testing.assert_array_equal(again.tokens, one.tokens)


def test_wrong_texts_are_named(model):
    def attempt(message, model=model, prompts=("a",), **changes):
        with pytest.raises(ValueError, match=message):
            generate_text(model, prompts, **{"max_new_tokens": 2, **changes})

    attempt("no tokenizer", model.replace(tokenizer=None))
    attempt("prompt 1 is empty", model.replace(special=SpecialTokens(bos=None)), prompts=["a", ""])
    attempt("one text", prompts="abc")
    attempt("stop is", stop="abc")
    attempt("stop is", stop=[""])
    attempt("batch_size is 0", batch_size=0)
    attempt("max_new_tokens is 0", max_new_tokens=0)
