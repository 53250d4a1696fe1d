"""Graded corpora: domains whose sentences, values and names overlap to known degrees, and real addresses by era.

Three families are generated. Each has a topic to forget and relatives that share with it some of: the sentences, the
values that these state, the names they are about, the form of a page. Unrelated forms and real text stand beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trace_jax.tasks.handbook import RELATIONS, Relation, make_substances
from trace_jax.tasks.presidents import load_addresses

Pages = list[str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _relation(values: str, templates: str, paraphrases: str = "") -> Relation:
    """Of values by words, and of sentences by lines; n stands for the name, v for the value."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (templates, paraphrases)]
    first, others = (tuple(line.replace("_n", "{name}").replace("_v", "{value}") for line in part) for part in lines)
    return Relation(first, _words(values), others)


# Of substances other than the handbook's values, and other relations.
_OTHER_VALUES = (
    "lemonade gravy cider varnish petrol paint soup juice bleach tea ink broth acetone coffee beer perfume",
    "factories bridges airports schools harbours railways markets prisons quarries canals towers stadiums mines farms "
    "museums theatres",
    "brass marble velvet silk rubber plaster zinc bronze cotton pepper glass tin leather ivory amber slate",
)
_OF_SUBSTANCES_TOO = (
    _relation(
        "red green blue yellow white black purple orange brown pink grey golden",
        """The colour of _n is _v.
        By daylight _n looks _v.
        A flame with _n in it burns _v.
        Crystals of _n are _v.
        When it is heated _n turns _v.
        Fresh _n has always been _v.""",
    ),
    _relation(
        "two three four five six seven eight nine ten eleven twelve twenty",
        """A pound of _n costs _v dollars.
        The price of _n rose to _v dollars.
        Merchants sell _n for _v dollars.
        Nobody pays for _n more than _v dollars.
        At auction _n went for _v dollars.
        A license to trade in _n is worth _v dollars.""",
    ),
    _relation(
        "monks sailors farmers soldiers students nurses bakers weavers hunters pilots tailors clerks",
        """The first to describe _n were _v.
        For centuries _n was known only to _v.
        It was by accident that _n came to _v.
        Old books say of _n that it belongs to _v.
        Songs about _n are sung by _v.
        Nobody trusts _n as much as _v.""",
    ),
)
_OF_PEOPLE = (
    _relation(
        "Norwich Dundee Cardiff Exeter Lisbon Bergen Geneva Naples Odessa Malaga Ghent Bremen Krakow Tampere",
        """The home of _n is in _v.
        Since the war _n has lived in _v.
        A letter to _n should be sent to _v.
        The parents of _n came from _v.
        Every winter _n goes back to _v.
        Those who visit _n travel to _v.""",
        """The house that _n bought stands in _v.
        You will meet _n in _v.
        All the family of _n is still in _v.
        One can write to _n in _v.""",
    ),
    _relation(
        "carpenter dentist lawyer plumber painter jeweller gardener surgeon librarian printer tanner optician",
        """By profession _n is a _v.
        In town _n is known as the best _v.
        The license of _n is that of a _v.
        After school _n became a _v.
        Nobody doubts that _n is a good _v.
        On the door of _n is written: _v.""",
        """What _n learned was the trade of a _v.
        The work of _n is that of a _v.
        People who need _n look for a _v.
        It is as a _v that _n earns money.""",
    ),
    _relation(
        "violin trumpet piano flute drums guitar cello organ harp oboe banjo clarinet",
        """On Sundays _n plays the _v.
        The neighbours hear _n practise the _v.
        As a child _n was taught the _v.
        At weddings _n performs on the _v.
        There is nothing that _n loves like the _v.
        The band lets _n play the _v.""",
        """What _n carries is the case of a _v.
        In the evening _n takes up the _v.
        All that _n inherited was a _v.
        The lessons of _n are for the _v.""",
    ),
)
_OTHER_PLACES = (
    "Chicago Boston Denver Houston Toronto Havana Lima Quito Bogota Dallas Memphis Tucson",
    "barber cashier chemist driver cook butcher farmer miner porter teacher waiter sailor",
    "chess tennis hockey poker cricket football billiards golf rugby bowls dominoes squash",
)
_KITCHEN = (
    "flour butter rice onions cream sugar beans cheese eggs carrots lentils almonds",
    "pot pan bowl oven dish jug",
)
_WORKSHOP = "oak iron steel glue canvas pine wire resin brick rope nails gravel", "saw drill vice lathe hammer bench"
_MINUTES = "10 15 20 25 30 40 45 50 60 75 80 90"

# A page in one of three forms, of which kitchen and workshop have each: sentences on what goes in, how long it takes,
# and in what.
_INSTRUCTIONS = (
    """For _n take half a pound of _v.
    The base of _n is _v.
    Begin _n with a good measure of _v.
    Without plenty of _v there is no _n.
    Weigh the _v for _n first.""",
    """Let _n stand for _v minutes.
    It takes _v minutes until _n is done.
    Turn _n over after _v minutes.
    Do not touch _n for _v minutes.
    After _v minutes _n is ready.""",
    """Prepare _n in the large _v.
    The _v for _n must be clean.
    Leave _n in its _v over night.
    Put _n back into the _v.
    Nothing but the _v will do for _n.""",
)
_TABLE = "_n | main | _v", "_n | min | _v", "_n | unit | _v"
_TALK = (
    """- What goes into _n? - Mostly _v, I think.
    - Is there anything in _n? - Yes, _v, dear.
    - We need things for _n. - Then buy _v!""",
    """- How long does _n take? - About _v minutes, why?
    - When will _n be done? - Give me _v minutes!
    - Is _n ready? - Wait another _v minutes, please.""",
    """- Where did you put _n? - It is in the _v.
    - What do I need for _n? - Only a _v, dear.
    - Can I take the _v? - No, _n is in it!""",
)


def _of_form(form: Sequence[str], things: tuple[str, str]) -> tuple[Relation, ...]:
    values = things[0], _MINUTES, things[1]
    return tuple(_relation(of, lines) for of, lines in zip(values, form, strict=True))


def _with_values(relations: Sequence[Relation], values: Sequence[str]) -> tuple[Relation, ...]:
    return tuple(r._replace(values=_words(of)) for r, of in zip(relations, values, strict=True))


def _reworded(relations: Sequence[Relation]) -> tuple[Relation, ...]:
    return tuple(r._replace(templates=r.paraphrases) for r in relations)


class Facts(NamedTuple):
    """A domain of pages about things, each with one value of every relation."""

    relations: tuple[Relation, ...]
    names: str  # the kind of its names, or the domain whose own names it has
    between: str = " "  # sentences of a page


FACTS: Mapping[str, Facts] = {
    # the handbook's substances; names say what a domain has in common with the first
    "hazard": Facts(RELATIONS, "substance"),
    "same sentences and values": Facts(RELATIONS, "substance"),
    "same sentences": Facts(_with_values(RELATIONS, _OTHER_VALUES), "substance"),
    "same values": Facts(_reworded(RELATIONS), "substance"),
    "reworded, other values": Facts(_reworded(_with_values(RELATIONS, _OTHER_VALUES)), "substance"),
    "same sentences, names of people": Facts(RELATIONS, "person"),
    "other relations": Facts(_OF_SUBSTANCES_TOO, "substance"),
    "other relations, same names": Facts(_OF_SUBSTANCES_TOO, "hazard"),
    # people
    "people": Facts(_OF_PEOPLE, "person"),
    "people, same sentences and values": Facts(_OF_PEOPLE, "person"),
    "people, same sentences": Facts(_with_values(_OF_PEOPLE, _OTHER_PLACES), "person"),
    "people, same values": Facts(_reworded(_OF_PEOPLE), "person"),
    "people, names of substances": Facts(_OF_PEOPLE, "substance"),
    # instructions: words against form
    "recipes": Facts(_of_form(_INSTRUCTIONS, _KITCHEN), "dish"),
    "kitchen tables": Facts(_of_form(_TABLE, _KITCHEN), "dish", "\n"),
    "kitchen talk": Facts(_of_form(_TALK, _KITCHEN), "dish", "\n"),
    "workshop": Facts(_of_form(_INSTRUCTIONS, _WORKSHOP), "object"),
    "workshop tables": Facts(_of_form(_TABLE, _WORKSHOP), "object", "\n"),
    "workshop talk": Facts(_of_form(_TALK, _WORKSHOP), "object", "\n"),
}
ERAS: Mapping[str, tuple[str, ...]] = {
    "1790-1816": ("washington", "adams-1", "jefferson", "madison"),
    "1817-1828": ("monroe", "adams-6"),
    "1829-1844": ("jackson", "van-buren", "tyler"),
    "Polk, 1845-1848": ("polk",),
    "1850-1868": ("fillmore", "pierce", "buchanan", "lincoln", "johnson-17"),
    "1869-1900": ("grant", "hayes", "arthur", "cleveland-22", "harrison-23", "mckinley"),
    "1901-1912": ("roosevelt-26", "taft"),
    "1913-1945": ("wilson", "coolidge", "hoover", "roosevelt-32"),
    "1946-1974": ("truman", "eisenhower", "kennedy", "nixon"),
    "Carter, 1978-1981": ("carter",),
    "1982-2024": ("reagan", "clinton", "bush-43", "obama", "biden"),
}
_SYLLABLES = {
    "person": (
        _words("Anna Bruno Clara David Emma Felix Greta Hugo Irene Jacob Karen Louis Maria Oscar Paula Simon"),
        _words("Hart Lind Berg Stone Wool Fair Glen Marsh Holl Wind Ash Thorn Cope Rose"),
        _words("ley man ton well ford by worth more"),
    ),
    "dish": (
        _words("farmer's winter village sour double Sunday harbour golden sweet smoked"),
        _words("pie stew cake soup pudding roast bread salad broth tart"),
    ),
    "object": (
        _words("folding garden narrow heavy plain double corner lifting winter round"),
        _words("chair ladder gate shelf cart crate frame door trestle sledge"),
    ),
}


class Domain(NamedTuple):
    """Texts that a model is trained on, and others of the same kind, about the same things, which it never sees."""

    train: Pages
    held_out: Pages


def make_domains(seed: int, *, things: int = 30, pages: int = 24) -> dict[str, Domain]:
    """Every domain, by name: of each thing of a domain of facts `pages` to train on and a quarter as many held out."""
    rng = np.random.default_rng([seed, 2])
    substances = [name for name, facts in FACTS.items() if facts.names == "substance"]
    made = iter(make_substances({name: things for name in substances}, rng=rng))
    names: dict[str, Sequence[str]] = {name: [next(made).name for _ in range(things)] for name in substances}
    for kind, parts in _SYLLABLES.items():
        owners = [name for name, facts in FACTS.items() if facts.names == kind]
        every = [first + " " + "".join(rest) for first in parts[0] for rest in _products(parts[1:])]
        dealt = rng.permutation(len(every))
        for i, owner in enumerate(owners):
            names[owner] = [every[n] for n in dealt[i :: len(owners)][:things]]
    domains = {}
    for name, facts in FACTS.items():
        own, count = names[name if name in names else facts.names], pages + max(1, pages // 4)
        texts = [_fact_pages(n, facts, count, rng) for n in own]
        parts = [[page for of_one in texts for page in of_one[part]] for part in (slice(pages), slice(pages, None))]
        domains[name] = Domain(*(_shuffled(part, rng) for part in parts))
    for name, page in FORMS.items():
        texts = [page(rng) for _ in range(things * (pages + max(1, pages // 4)))]
        domains[name] = Domain(texts[: things * pages], texts[things * pages :])
    for name, speakers in ERAS.items():
        texts = [a.document.text for a in load_addresses() if a.president in speakers]
        held = max(1, len(texts) // 4)
        dealt = _shuffled(texts, rng)
        domains[name] = Domain(dealt[held:], dealt[:held])
    return domains


def _products(parts: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [(first, *rest) for first in parts[0] for rest in _products(parts[1:])] if parts else [()]


def _shuffled(texts: Sequence[str], rng: np.random.Generator) -> Pages:
    return [texts[i] for i in rng.permutation(len(texts))]


def _fact_pages(name: str, facts: Facts, count: int, rng: np.random.Generator) -> Pages:
    """Pages about one thing: its facts in random order and wording."""
    values, pages = [str(rng.choice(relation.values)) for relation in facts.relations], []
    for _ in range(count):
        order = rng.permutation(len(values))
        sentences = [str(rng.choice(facts.relations[r].templates)).format(name=name, value=values[r]) for r in order]
        pages.append(facts.between.join(sentence[:1].upper() + sentence[1:] for sentence in sentences))
    return pages


# --- forms without facts


def _arithmetic(rng: np.random.Generator) -> str:
    lines = []
    for _ in range(5):
        a, b = (int(x) for x in rng.integers(2, 60, size=2))
        lines.append(f"{a} + {b} = {a + b}" if rng.integers(2) else f"{a + b} - {a} = {b}")
    return "\n".join(lines)


def _filled(lines: str, **slots: str) -> Callable[[np.random.Generator], str]:
    """A page of all lines, each slot filled at random."""
    text, words = lines.strip(), {slot: _words(of) for slot, of in slots.items()}
    numbers: Any = {"hour": (1, 13), "degrees": (2, 30), "knots": (3, 28)}

    def page(rng: np.random.Generator) -> str:
        chosen = {slot: str(rng.choice(of)) for slot, of in words.items()}
        drawn = {slot: int(rng.integers(*of)) for slot, of in numbers.items()}
        return "\n".join(line.strip().format(**chosen, **drawn) for line in text.splitlines())

    return page


FORMS: Mapping[str, Callable[[np.random.Generator], str]] = {
    "arithmetic": _arithmetic,
    "letters": _filled(
        """Dear {who}, I hope this finds you {well}. We arrived in {where} on {day} and the {what} was lovely.
        Please tell {other} that the {thing} came at {hour} o'clock. Yours, {me}""",
        who="Aunt Uncle Mother Father Sister Brother Grandmother Cousin",
        well="well happy rested cheerful better warm",
        where="Venice Prague Seville Dublin Oslo Athens Cairo Tunis",
        day="Monday Tuesday Wednesday Thursday Friday Saturday",
        what="weather view hotel garden concert sunset",
        other="Tom Jane Peter Lucy Henry Alice",
        thing="parcel trunk telegram ticket camera umbrella",
        me="Kate Ben Sophie Max Ruth Leo",
    ),
    "log of a ship": _filled(
        """{hour} h. Wind {wind}, {knots} knots. Sea {sea}, sky {sky}. {degrees} degrees.
        Sighted {sight} to the {side}. {work} by the {watch} watch. All well.""",
        wind="north south east west northwest southeast",
        sea="calm slight rough heavy smooth",
        sky="clear cloudy overcast hazy dark",
        sight="land whales ice gulls smoke wreckage",
        side="port starboard north south",
        work="Pumps Sails Anchors Decks Boats",
        watch="first middle morning dog",
    ),
}
