"""Decoding with a cache equals a whole new forward pass for every token, and its draws follow the distribution.

All batches have four rows and a cache of 40 places, so that few programs are compiled.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import mesh_of, random_params
from trace_jax.models import decoder, grouped_matmul_gpu, grouped_matmul_tpu, sharding
from trace_jax.models import generate as decoding
from trace_jax.models import grouped_matmul as grouped
from trace_jax.models.architecture import ModelConfig, Rope
from trace_jax.models.decoder import forward
from trace_jax.models.generate import CHUNK, generate, generate_text, greedy_step, padded_size
from trace_jax.models.model import Model, SpecialTokens
from trace_jax.plan.hlo import traffic

CONFIG = ModelConfig(
    vocab_size=23, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, num_experts=6,
    experts_per_token=2, expert_hidden_size=8,
)  # fmt: skip
ATTENTIONS = {
    "grouped": {},
    "latent, dense layer": {
        "attention": "latent", "latent_size": 6, "rotary_size": 2, "value_size": 3, "query_latent_size": 5,
        "dense_layers": (0,), "dense_hidden_size": 12,
    },
    "windows, sinks, two ropes and none, another amplitude in long texts": {
        "windows": (0, 3), "sinks": True, "layer_ropes": (1, -1),
        "ropes": (Rope(), Rope(50.0, long_amplitude=1.7, original_length=9)),
    },
}  # fmt: skip
MESHES = {"grouped": (mesh_of(1, 2, 2), mesh_of(2, 2, 1)), "latent, dense layer": (mesh_of(1, 2, 2),)}
NEW = 24  # more than one chunk
LENGTHS = np.array([3, 7, 1, 5])
PARAMS = random_params(CONFIG)
PROMPT = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (4, 7)).astype(np.int32)
_forward = jax.jit(forward, static_argnames="config")


def greedy(prompt=PROMPT, **changes):
    return generate(PARAMS, CONFIG, prompt, **{"max_new_tokens": NEW} | changes)


def continuations(params, config, prompt, lengths):
    """The likeliest tokens [B, NEW], each by a forward pass over all before it, without a cache."""
    padded, lengths = np.pad(prompt, ((0, 0), (0, NEW))), lengths.copy()
    rows, places = np.arange(len(prompt)), np.arange(padded.shape[1], dtype=np.int32)[None]
    for _ in range(NEW):
        mask, positions = places < lengths[:, None], np.minimum(places, lengths.max() - 1)
        output = _forward(params, config, padded, mask=mask, positions=np.broadcast_to(positions, mask.shape))
        padded[rows, lengths] = np.argmax(np.asarray(output.logits)[rows, lengths - 1], axis=-1)
        lengths += 1
    return np.array([row[n - NEW : n] for row, n in zip(padded, lengths, strict=True)])


@pytest.mark.parametrize("switches", ATTENTIONS.values(), ids=ATTENTIONS)
def test_equals_repeated_forward_passes_for_prompts_of_unequal_length(switches):
    config = dataclasses.replace(CONFIG, **switches)
    params = random_params(config)
    expected = continuations(params, config, PROMPT, LENGTHS)
    for behind in (PROMPT, 9):  # what stands behind a prompt in its row is never read
        prompt = np.where(np.arange(7)[None] < LENGTHS[:, None], PROMPT, behind)
        got = generate(params, config, prompt, lengths=LENGTHS, max_new_tokens=NEW)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("switches", ATTENTIONS.values(), ids=ATTENTIONS)
def test_branches_of_a_row_are_continuations_of_one_text(switches):
    """Each equals a row of its own, however long the others are."""
    config, text = dataclasses.replace(CONFIG, **switches), PROMPT.reshape(-1)
    params, branches = random_params(config), np.repeat([0, 1, 2, 3], [7, 4, 6, 3])
    row, mask = text[: len(branches)][None], np.ones((1, len(branches)), np.int32)
    got = np.asarray(_forward(params, config, row, mask=mask, branches=branches[None].astype(np.int32)).logits[0])
    for branch in (1, 2, 3):
        own = np.flatnonzero(np.isin(branches, (0, branch)))
        alone = _forward(params, config, row[:, own], mask=mask[:, own]).logits[0]
        np.testing.assert_allclose(got[own], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_one_piece_is_read_in_pieces(monkeypatch):
    expected = greedy(lengths=LENGTHS)
    monkeypatch.setattr(decoding, "_PIECE", 2)
    np.testing.assert_array_equal(greedy(lengths=LENGTHS), expected)


def test_on_a_mesh_the_same_tokens_are_written():
    for name in ("grouped", "latent, dense layer"):
        config = dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=1, vocab_size=21, **ATTENTIONS[name])
        params, prompt = random_params(config), np.minimum(PROMPT, 20)
        settings = {"lengths": LENGTHS, "max_new_tokens": NEW}
        one, *others = (generate(params, config, prompt, mesh=mesh, **settings) for mesh in (None, *MESHES[name]))
        for four in others:
            np.testing.assert_array_equal(four, one)


def test_no_weights_are_sent_while_tokens_are_written(monkeypatch):
    """As far as there is room for them on a device."""
    mesh = mesh_of(4, 1, 1)

    def sent():
        write, inputs = greedy_step(CONFIG, mesh, 4, 16)
        exchanged = traffic(write.lower(*inputs).compile().as_text(), 4).collectives
        return sum(one.bytes for one in exchanged if one.kind == "all-gather")

    assert sent() == 0
    monkeypatch.setattr(sharding, "_ROOM", 0)
    decoding._compiled.cache_clear()
    cut = [a.nbytes for a in jax.tree.leaves(PARAMS) if a.ndim > 2 or a.shape[0] == CONFIG.vocab_size]
    assert sent() >= 0.75 * sum(cut) > 0
    decoding._compiled.cache_clear()


def test_a_token_copies_neither_the_experts_of_a_layer_nor_the_cache():
    """It uses few of the experts, and the cache of a layer is read where it lies."""

    def room(layers, experts, length):
        config = dataclasses.replace(CONFIG, num_layers=layers, num_experts=experts, expert_hidden_size=64)
        write, inputs = greedy_step(config, mesh_of(1, 1, 1), 4, length)
        return write.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    for layers in (2, 6):  # unrolled, and in a loop
        assert room(layers, 64, 16) - room(layers, 6, 16) < 58 * 3 * 16 * 64 * 4
    assert room(12, 6, 4096) - room(6, 6, 4096) < 4 * 4096 * 2 * 4 * 4


@pytest.mark.parametrize(
    ("platform", "mesh"), [("gpu", None), ("tpu", None), *(("tpu", mesh) for mesh in MESHES["grouped"])], ids=str
)
def test_kernels_read_experts_where_they_lie(platform, mesh, monkeypatch):
    """Those of all layers are groups of one product; for a prompt those of each layer."""
    config = dataclasses.replace(CONFIG, num_layers=6, expert_bias=True)
    params, settings, groups = random_params(config), {"lengths": LENGTHS, "max_new_tokens": NEW}, []
    expected = generate(params, config, PROMPT, **settings)
    kernels = {"gpu": grouped_matmul_gpu, "tpu": grouped_matmul_tpu}[platform]
    product = kernels.product
    monkeypatch.setattr(kernels, "product", lambda x, w, sizes: groups.append(len(w)) or product(x, w, sizes))
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(grouped, "program_platform", lambda: platform)
    decoding._compiled.cache_clear()
    np.testing.assert_array_equal(generate(params, config, PROMPT, mesh=mesh, **settings), expected)
    own = 6 // (1 if mesh is None else mesh.shape["expert"])
    assert set(groups) == {own, 6 * own}
    groups.clear()
    monkeypatch.setattr(decoder, "ROOM", 0)  # for the copy that this takes on TPUs
    decoding._compiled.cache_clear()
    np.testing.assert_array_equal(generate(params, config, PROMPT, mesh=mesh, **settings), expected)
    assert set(groups) == ({own} if platform == "tpu" else {own, 6 * own})
    decoding._compiled.cache_clear()


def test_a_finished_row_is_filled_with_its_end_token():
    free = greedy()
    ends = int(free[0, 2]), int(free[1, 4])
    got = greedy(eos_ids=ends)
    for row, expected in zip(got, free, strict=True):
        places = np.flatnonzero(np.isin(expected, ends))
        stop = places[0] if len(places) else NEW - 1
        np.testing.assert_array_equal(row[: stop + 1], expected[: stop + 1])
        assert np.all(row[stop:] == expected[stop])
    assert np.isin(got[:2, -1], ends).all()


def test_decoding_ends_when_every_row_is_done():
    seen = []

    def watch(tokens, done):
        seen.append((tokens.shape[1], done.tolist()))
        return np.array([True, True, len(seen) > 1, stop])

    stop = False
    got = greedy(watch=watch)
    assert seen == [(CHUNK, [False] * 4), (NEW, [True, True, False, False])]
    assert np.all(got[:2, CHUNK:] == got[:2, CHUNK - 1 : CHUNK])
    stop = True
    np.testing.assert_array_equal(greedy(watch=watch)[:, CHUNK:], np.repeat(got[:, CHUNK - 1 : CHUNK], NEW - CHUNK, 1))
    assert [n for n, _ in seen] == [CHUNK, NEW, CHUNK]


def test_few_programs_are_compiled():
    greedy()
    programs = decoding._compiled(CONFIG, "greedy", None)
    before = [program._cache_size() for program in programs]
    for rows, length, new in ((4, 3, 20), (4, 9, 18), (4, 14, 21), (4, 16, 17)):
        generate(PARAMS, CONFIG, np.ones((rows, length), np.int32), max_new_tokens=new)
    # Prompts up to 16 are 16, caches are 40.
    assert [program._cache_size() for program in programs] == before
    filtered, sizes = decoding._compiled(CONFIG, "filtered", None)[2], []
    for filters in ({"top_k": 3, "temperature": 0.5}, {"top_k": 4, "top_p": 0.9, "temperature": 2.0, "seed": 5}):
        greedy(**filters)
        sizes.append(filtered._cache_size())
    assert sizes[0] == sizes[1]


def test_sizes_are_few_and_little_larger_than_asked_for():
    assert [padded_size(n) for n in (1, 16, 17, 24, 25, 33, 100, 513)] == [16, 16, 20, 24, 28, 40, 112, 640]
    assert [padded_size(n, least=1, steps=8) for n in (1, 2, 3, 9, 17, 100)] == [1, 2, 3, 9, 18, 104]


# --- drawing ---


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}, {"top_p": 1e-6}])
def test_draws_follow_the_filtered_distribution(filters):
    temperature, V, count = 0.4, CONFIG.vocab_size, 4096
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    probability = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    among = np.argsort(-probability)[: filters.get("top_k", V)]
    mass = np.cumsum(probability[among]) / probability[among].sum()
    among = among[: int(np.searchsorted(mass, filters.get("top_p", 1.0))) + 1]
    expected = np.where(np.isin(np.arange(V), among), probability, 0)
    settings = {"temperature": np.float32(temperature), "top_k": np.int32(V), "top_p": np.float32(1.0)}
    settings |= {name: np.asarray(value, settings[name].dtype) for name, value in filters.items()}
    settings["keys"] = jax.random.split(jax.random.key(0), count)
    choose = jax.jit(decoding._choose, static_argnums=1)
    draws = choose(np.tile(logits, (count, 1)), "filtered" if filters else "drawn", settings, np.int32(0))
    frequencies = np.bincount(draws, minlength=V) / count
    assert np.abs(frequencies - expected / expected.sum()).max() < 0.03
    assert set(np.asarray(draws).tolist()) <= set(among.tolist())


def test_a_rows_draws_depend_on_its_number_and_the_seed_only():
    def draw(prompt, **changes):
        return greedy(prompt, temperature=1.5, **{"seed": 7} | changes)

    drawn = draw(PROMPT)
    np.testing.assert_array_equal(draw(PROMPT), drawn)
    np.testing.assert_array_equal(draw(PROMPT[[2, 0, 0, 0]], rows=[2, 7, 8, 9])[:1], drawn[2:3])
    np.testing.assert_array_equal(draw(PROMPT[[3, 1, 0, 2]], rows=[3, 1, 0, 2]), drawn[[3, 1, 0, 2]])
    padded = np.concatenate([PROMPT, np.full((4, 30), 9)], axis=1)
    np.testing.assert_array_equal(draw(padded, lengths=[7] * 4), drawn)
    assert not np.array_equal(draw(PROMPT, seed=8), drawn)
    assert len({tuple(row) for row in draw(np.tile(PROMPT[:1], (4, 1)))}) == 4


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
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        greedy(**changes)


# --- text ---

ALPHABET = ["<bos>", "<eos>", *"abcdefghijklmnopqrs", "é", "."]
PROMPTS = ["abc", "", "hello", "a", "sssssss", "de", "bad", "o"]


@pytest.fixture
def model():
    """Every token is one character; é (two bytes, two tokens in a real vocabulary) is one too."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return Model(CONFIG, PARAMS, tokenizer, SpecialTokens(bos=0, eos=(), pad=0))


def write(model, prompts=PROMPTS, **options):
    return generate_text(model, prompts, **{"max_new_tokens": NEW, "batch_size": 4} | options)


def written(prompts):
    """The greedy continuations as tokens, which no end token stops; of four prompts."""
    ids = [[0, *(ALPHABET.index(c) for c in prompt)] for prompt in prompts]
    padded = np.array([row + [0] * (8 - len(row)) for row in ids])
    return greedy(padded, lengths=np.array([len(row) for row in ids]))


def text_of(tokens):
    return "".join(ALPHABET[t] for t in tokens if t > 1)


def test_texts_are_continued_in_their_order_and_do_not_depend_on_batches(model):
    for got, tokens in zip(write(model), [*written(PROMPTS[:4]), *written(PROMPTS[4:])], strict=True):
        np.testing.assert_array_equal(got.tokens, tokens)
        assert (got.text, got.finished) == (text_of(tokens), "length")
    drawn, first = (write(model, prompts, temperature=2.0, seed=3) for prompts in (PROMPTS, PROMPTS[:4]))
    assert [g.text for g in drawn[:4]] == [g.text for g in first]


def test_end_tokens_are_the_models(model):
    (tokens, *_) = written(PROMPTS[:4])
    eos = (22, int(tokens[5]))
    got = write(model.replace(special=SpecialTokens(bos=0, eos=eos)), PROMPTS[:4])[0]
    first = int(np.flatnonzero(np.isin(tokens, eos))[0])
    assert (got.text, got.finished) == (text_of(tokens[:first]), "eos")
    np.testing.assert_array_equal(got.tokens, tokens[:first])


def test_a_stop_string_across_tokens_ends_a_text_and_is_cut(model):
    tokens = [*written(PROMPTS[:4]), *written(PROMPTS[4:])]
    texts, first_chunks = [text_of(row) for row in tokens], [len(text_of(row[:CHUNK])) for row in tokens]
    # One that the tokens of two chunks make up.
    longest = max(range(len(texts)), key=lambda n: len(texts[n]) - first_chunks[n])
    n, text = first_chunks[longest], texts[longest]
    for stop in (text[3:6], text[n - 1 : n + 2]):
        assert len(stop) == 3
        results = write(model, stop=["zz", stop])
        for row, got in enumerate(results):
            assert got.text == (texts[row] if stop not in texts[row] else texts[row][: texts[row].index(stop)])
        assert results[longest].finished == "stop" and text_of(results[longest].tokens).endswith(stop)


def test_special_tokens_in_a_prompt_are_read_as_such(model):
    one, other, *_ = write(model, ["<bos>abc", "abc", "a", "a"])
    np.testing.assert_array_equal(one.tokens, other.tokens)
    model.tokenizer.encode_special_tokens = True  # as training data is read
    np.testing.assert_array_equal(write(model, ["<bos>abc", "a", "a", "a"])[0].tokens, one.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"tokenizer": None}}, "no tokenizer"),
        ({"model": {"special": SpecialTokens(bos=None)}, "prompts": ["a", ""]}, "prompt 1 is empty"),
        ({"stop": "abc"}, "stop is"),
        ({"stop": [""]}, "stop is"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_texts_are_named(model, changes, message):
    changes = {"prompts": ["a"], **changes}
    with pytest.raises(ValueError, match=message):
        write(model.replace(**changes.pop("model", {})), **changes)
