"""The noun phrases, verb phrases and places of the offline task's sentences, with their unacceptable forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fwlora_lab.data.offline.words import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    BARE,
    FEMALE,
    FEMALE_NAMES,
    MALE,
    MALE_NAMES,
    PEOPLE,
    PLACES,
    THING_ADJECTIVES,
    Noun,
    Rng,
    Verb,
)


class Phrase(NamedTuple):
    """A noun phrase, the forms of it that are errors by themselves, and the verb forms that agree with it."""

    words: str
    plural: bool
    broken: dict[str, str]
    gender: str = ""  # "m" or "f" if the words decide it

    def verb(self, verb: Verb) -> str:
        return verb.base if self.plural else verb.third

    def wrong_verb(self, verb: Verb) -> str:
        return verb.third if self.plural else verb.base

    def be(self, past: bool = False) -> str:
        return ("were" if past else "are") if self.plural else ("was" if past else "is")

    def wrong_be(self, past: bool = False) -> str:
        return ("was" if past else "is") if self.plural else ("were" if past else "are")

    def have(self) -> str:
        return "have" if self.plural else "has"

    def wrong_have(self) -> str:
        return "has" if self.plural else "have"

    def do(self) -> str:
        return "do" if self.plural else "does"

    def wrong_do(self) -> str:
        return "does" if self.plural else "do"


ONLY_ONE = ["every", "each", "a", "this"]
ONLY_MANY = ["these", "those", "many", "several", "two", "three", "four"]
EITHER = ["the", "the", "the", "my", "her", "his", "our", "their"]


def with_article(words: str, right: bool = True) -> str:
    vowel = words[0] in "aeiou"
    return f"{'an' if vowel == right else 'a'} {words}"


def _determined(determiner: str, rest: str) -> str:
    return with_article(rest) if determiner == "a" else f"{determiner} {rest}"


def noun_phrase(rng: Rng, nouns: Sequence[Noun], adjectives: Sequence[str], plural: bool | None = None) -> Phrase:
    plural = rng.chance(0.4) if plural is None else plural
    noun = rng.pick(nouns)
    word, other = (noun.many, noun.one) if plural else (noun.one, noun.many)
    adjective = rng.pick(adjectives) if rng.chance(0.2) else ""
    own = ONLY_MANY if plural else ONLY_ONE
    determiner = rng.pick(EITHER if rng.chance(0.6) else own)
    core = f"{adjective} {word}".strip()
    broken = {
        "determiner number": _determined(rng.pick(ONLY_ONE if plural else ONLY_MANY), core),
        "noun before determiner": f"{word} {determiner}" + (f" {adjective}" if adjective else ""),
    }
    if not plural and noun not in BARE:
        broken["missing determiner"] = core
    if determiner == "a":
        broken["article form"] = with_article(core, right=False)
    if determiner in own:
        broken["noun number"] = _determined(determiner, f"{adjective} {other}".strip())
    return Phrase(_determined(determiner, core), plural, broken)


def person(rng: Rng) -> Phrase:
    """A name, a pronoun, or a noun phrase about people, sometimes followed by a phrase of the other number."""
    if rng.chance(0.15):
        if rng.chance(0.5):
            return Phrase(rng.pick(FEMALE_NAMES), False, {}, "f")
        return Phrase(rng.pick(MALE_NAMES), False, {}, "m")
    if rng.chance(0.12):
        right, wrong = rng.pick([("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")])
        plural = right in ("they", "we")
        return Phrase(right, plural, {"pronoun case": wrong})
    phrase = noun_phrase(rng, PEOPLE + MALE + FEMALE, ADJECTIVES)
    if rng.chance(0.05):
        near = noun_phrase(rng, PEOPLE, ADJECTIVES, plural=not phrase.plural).words
        preposition = rng.pick(["near", "behind", "with"])
        broken = {k: f"{v} {preposition} {near}" for k, v in phrase.broken.items()}
        return Phrase(f"{phrase.words} {preposition} {near}", phrase.plural, broken)
    return phrase


def action(rng: Rng) -> tuple[Verb, Phrase]:
    verbs, nouns = rng.pick(ACTIONS)
    return rng.pick(verbs), thing(rng, nouns)


def thing(rng: Rng, nouns: Sequence[Noun]) -> Phrase:
    animate = nouns is PEOPLE or nouns is ANIMALS
    return noun_phrase(rng, nouns, ADJECTIVES if animate else THING_ADJECTIVES)


def place(rng: Rng) -> tuple[str, str]:
    """A place, with its preposition where it belongs and where it does not: (`in the garden`, `the garden in`)."""
    preposition = rng.pick(["in", "near", "behind"])
    noun = f"the {rng.pick(PLACES).one}"
    return f"{preposition} {noun}", f"{noun} {preposition}"
