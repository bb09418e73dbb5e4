"""The vocabulary of the offline task, and its random source."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Rng:
    """The only random source of the sentences."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed).random

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self._random() < probability


class Noun(NamedTuple):
    one: str
    many: str


class Verb(NamedTuple):
    base: str
    third: str
    past: str
    participle: str
    ing: str


def _nouns(words: str) -> list[Noun]:
    """`cat child/children`: the plural is formed by rule unless it is given."""
    nouns = []
    for word in words.split():
        one, _, many = word.partition("/")
        if not many:
            if one.endswith(("s", "x", "ch", "sh")):
                many = one + "es"
            elif one.endswith("y") and one[-2] not in "aeiou":
                many = one[:-1] + "ies"
            else:
                many = one + "s"
        nouns.append(Noun(one, many))
    return nouns


def _verbs(words: str) -> list[Verb]:
    """`open carry/carries/carried/carried/carrying`: forms are regular unless they are given."""
    verbs = []
    for word in words.split():
        forms = word.split("/")
        if len(forms) == 1:
            stem = word[:-1] if word.endswith("e") else word
            third = word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
            forms = [word, third, stem + "ed", stem + "ed", stem + "ing"]
        verbs.append(Verb(*forms))
    return verbs


PEOPLE = _nouns(
    "doctor teacher farmer student child/children nurse driver singer writer painter soldier "
    "neighbor friend lawyer baker guest visitor sailor pilot manager worker judge actor dancer "
    "gardener builder hunter engineer artist officer reporter tourist cousin customer player "
    "prisoner dentist tailor servant stranger scientist musician"
)
MALE = _nouns("man/men boy father brother king uncle waiter husband son grandfather")
FEMALE = _nouns("woman/women girl mother sister queen aunt waitress wife/wives daughter princess")
MALE_NAMES = "John Peter Tom Paul George Henry Robert James David Martin Oliver Simon".split()
FEMALE_NAMES = "Mary Anna Susan Emma Laura Helen Alice Julia Sarah Clara Nora Rose".split()
ANIMALS = _nouns("dog cat horse bird cow sheep/sheep rabbit fox goat mouse/mice duck lion")
ANIMALS = [noun for noun in ANIMALS if noun.one != noun.many]
PLACES = _nouns(
    "garden kitchen park house school church office station hotel library museum forest village "
    "market hospital castle bridge tower farm theater"
)
FURNITURE = _nouns("table chair bed shelf/shelves desk bench sofa floor")
TEXTS = _nouns("letter book story poem report song article message essay diary")
FOODS = _nouns("cake apple sandwich egg orange pie carrot potato/potatoes cookie pizza onion pear")
CLOSABLES = _nouns("door window box bag drawer gate bottle envelope suitcase cupboard")
MACHINES = _nouns("car bicycle lamp clock radio machine computer engine camera boat truck piano")
OBJECTS = _nouns("ring key coin hat coat umbrella picture basket knife/knives mirror map ball glove")
# These may stand without a determiner: foods as masses, relatives as if they had that name.
BARE = {
    *FOODS,
    *(noun for noun in MALE + FEMALE if noun.one not in ("man", "woman", "boy", "girl")),
}
# Groups of verbs with the objects that they go with, so that the sentences also make some sense.
ACTIONS: list[tuple[list[Verb], list[Noun]]] = [
    (
        _verbs(
            "write/writes/wrote/written/writing describe translate publish finish discuss "
            "forget/forgets/forgot/forgotten/forgetting copy/copies/copied/copied/copying mention"
        ),
        TEXTS,
    ),
    (
        _verbs(
            "eat/eats/ate/eaten/eating cook taste bake bring/brings/brought/brought/bringing "
            "steal/steals/stole/stolen/stealing buy/buys/bought/bought/buying prepare"
        ),
        FOODS,
    ),
    (
        _verbs(
            "open close lock paint fill inspect lift carry/carries/carried/carried/carrying "
            "choose/chooses/chose/chosen/choosing"
        ),
        CLOSABLES,
    ),
    (
        _verbs(
            "repair break/breaks/broke/broken/breaking sell/sells/sold/sold/selling clean destroy "
            "test examine move invent drive/drives/drove/driven/driving"
        ),
        MACHINES,
    ),
    (
        _verbs(
            "find/finds/found/found/finding hide/hides/hid/hidden/hiding collect touch borrow "
            "drop/drops/dropped/dropped/dropping keep/keeps/kept/kept/keeping "
            "throw/throws/threw/thrown/throwing take/takes/took/taken/taking"
        ),
        OBJECTS,
    ),
    (
        _verbs(
            "see/sees/saw/seen/seeing help visit follow meet/meets/met/met/meeting invite remember "
            "admire catch/catches/caught/caught/catching thank blame"
        ),
        PEOPLE,
    ),
    (
        _verbs("feed/feeds/fed/fed/feeding wash chase watch brush/brushes/brushed/brushed/brushing"),
        ANIMALS,
    ),
]
# Their object may be left out ("He eats."), so a missing object does not break them.
OBJECT_OPTIONAL = set(
    "write forget finish copy eat cook bake open close paint break sell clean test move drive see "
    "help visit follow meet remember watch wash buy steal publish choose translate lift drop throw "
    "taste prepare invent keep hide feed borrow collect inspect examine brush touch".split()
)
INTRANSITIVE = _verbs(
    "sleep/sleeps/slept/slept/sleeping arrive laugh cough smile disappear wait sneeze yawn shiver "
    "fall/falls/fell/fallen/falling cry/cries/cried/cried/crying faint stumble tremble "
    "vanish hesitate"
)
# (verb, preposition, two wrong ones, objects)
PREPOSITIONAL = [
    (Verb("depend", "depends", "", "", ""), "on", ("of", "with"), PEOPLE),
    (Verb("rely", "relies", "", "", ""), "on", ("of", "with"), PEOPLE),
    (Verb("insist", "insists", "", "", ""), "on", ("of", "with"), TEXTS),
    (Verb("listen", "listens", "", "", ""), "to", ("of", "on"), PEOPLE),
    (Verb("belong", "belongs", "", "", ""), "to", ("of", "on"), PEOPLE),
    (Verb("apologize", "apologizes", "", "", ""), "to", ("of", "on"), PEOPLE),
    (Verb("object", "objects", "", "", ""), "to", ("of", "on"), TEXTS),
    (Verb("agree", "agrees", "", "", ""), "with", ("of", "at"), PEOPLE),
    (Verb("disagree", "disagrees", "", "", ""), "with", ("of", "at"), PEOPLE),
    (Verb("look", "looks", "", "", ""), "at", ("of", "on"), TEXTS),
]
ADJECTIVE_PREPOSITION = [
    ("afraid", "of"), ("proud", "of"), ("interested", "in"), ("similar", "to"), ("fond", "of"),
    ("famous", "for"), ("responsible", "for"), ("married", "to"), ("jealous", "of"),
    ("polite", "to"), ("angry", "with"),
]  # fmt: skip
WRONG_AFTER_ADJECTIVE = {"of": ("to", "in"), "in": ("of", "to"), "to": ("of", "in"),
                         "for": ("of", "in"), "with": ("of", "to")}  # fmt: skip
ADJECTIVES = (
    "old young tall small poor rich strong kind quiet clever lazy brave famous friendly nervous "
    "tired hungry happy lonely polite careful modest"
).split()
THING_ADJECTIVES = (
    "old new small large heavy cheap expensive beautiful dirty strange modern broken wooden red green black white empty"
).split()
STATES = "tired hungry happy angry sick busy late ready afraid bored thirsty nervous".split()
COMPARATIVES = [
    ("tall", "taller"), ("old", "older"), ("young", "younger"), ("strong", "stronger"),
    ("rich", "richer"), ("happy", "happier"), ("fast", "faster"), ("kind", "kinder"),
    ("small", "smaller"), ("brave", "braver"), ("clever", "cleverer"), ("poor", "poorer"),
]  # fmt: skip
PAST_TIMES = ["yesterday", "last week", "last night", "two days ago", "last summer", "a year ago"]
FUTURE_TIMES = ["tomorrow", "next week", "next month", "next summer", "tomorrow morning"]
FREQUENCY = "often always never usually sometimes rarely".split()
MASS = "water money rice bread furniture information sugar milk advice luggage".split()
