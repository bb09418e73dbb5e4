"""The grammar of the offline task: templates of acceptable English sentences and of their unacceptable forms.

Every template returns one acceptable sentence and the ways to break it (agreement, word order, a missing verb, a wrong
preposition and so on), so the labels are right by construction. The only random source is
`random.Random(seed).random()`, whose values are the same in every version of Python and on every platform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fwlora_lab.data.offline.phrases import Phrase, action, noun_phrase, person, place, thing, with_article
from fwlora_lab.data.offline.words import (
    ADJECTIVE_PREPOSITION,
    ADJECTIVES,
    COMPARATIVES,
    FEMALE,
    FEMALE_NAMES,
    FOODS,
    FREQUENCY,
    FURNITURE,
    FUTURE_TIMES,
    INTRANSITIVE,
    MACHINES,
    MALE,
    MALE_NAMES,
    MASS,
    OBJECT_OPTIONAL,
    OBJECTS,
    PAST_TIMES,
    PEOPLE,
    PREPOSITIONAL,
    STATES,
    TEXTS,
    THING_ADJECTIVES,
    WRONG_AFTER_ADJECTIVE,
    Rng,
)


@dataclass(frozen=True)
class Sentence:
    """One acceptable sentence, without its capital letter and final mark, and its unacceptable forms by kind of error.

    Attributes:
        broken: the forms with an error of the template.
        broken_phrases: the forms with an error inside one of the noun phrases.
    """

    words: str
    broken: dict[str, str]
    mark: str = "."
    broken_phrases: dict[str, str] = field(default_factory=dict)


def _sentence(pattern: str, phrases: dict[str, Phrase], broken: dict[str, str], mark: str = ".") -> Sentence:
    """Put the phrases into {S}, {O}, ... of the patterns, and add the forms in which one phrase has an error."""
    right = {name: phrase.words for name, phrase in phrases.items()}
    forms = {kind: form.format(**right) for kind, form in broken.items()}
    inner = {
        f"{kind} {name}": pattern.format(**{**right, name: words})
        for name, phrase in phrases.items()
        for kind, words in phrase.broken.items()
    }
    return Sentence(pattern.format(**right), forms, mark, inner)


def transitive_present(rng: Rng) -> Sentence:
    s, (v, o), (at, at_wrong) = person(rng), action(rng), place(rng)
    how = rng.pick(FREQUENCY)
    broken = {
        "agreement": f"{{S}} {how} {s.wrong_verb(v)} {{O}} {at}",
        "missing verb": f"{{S}} {how} {{O}} {at}",
        "verb last": f"{{S}} {how} {{O}} {at} {s.verb(v)}",
        "verb form": f"{{S}} {how} {v.ing} {{O}} {at}",
        "preposition order": f"{{S}} {how} {s.verb(v)} {{O}} {at_wrong}",
    }
    if v.base not in OBJECT_OPTIONAL:
        broken["missing object"] = f"{{S}} {how} {s.verb(v)} {at}"
    return _sentence(f"{{S}} {how} {s.verb(v)} {{O}} {at}", {"S": s, "O": o}, broken)


def transitive_past(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    when, later = rng.pick(PAST_TIMES), rng.pick(FUTURE_TIMES)
    broken = {
        "missing verb": f"{{S}} {{O}} {when}",
        "verb first": f"{v.past} {{S}} {{O}} {when}",
        "verb last": f"{{S}} {{O}} {when} {v.past}",
        "tense and time": f"{{S}} {v.past} {{O}} {later}",
        "needless to": f"{{S}} to {v.past} {{O}} {when}",
    }
    if v.base not in OBJECT_OPTIONAL:
        broken["missing object"] = f"{{S}} {v.past} {when}"
    return _sentence(f"{{S}} {v.past} {{O}} {when}", {"S": s, "O": o}, broken)


def future(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    when, before = rng.pick(FUTURE_TIMES), rng.pick(PAST_TIMES)
    modal = rng.pick(["will", "will", "must", "should", "can"])
    second = "can" if modal != "can" else "will"
    broken = {
        "verb form": f"{{S}} {modal} {rng.pick([v.third, v.ing, 'to ' + v.base])} {{O}} {when}",
        "modal order": f"{{S}} {v.base} {modal} {{O}} {when}",
        "double modal": f"{{S}} {modal} {second} {v.base} {{O}} {when}",
        "verb last": f"{{S}} {modal} {{O}} {when} {v.base}",
    }
    if modal == "will":
        broken["tense and time"] = f"{{S}} will {v.base} {{O}} {before}"
    return _sentence(f"{{S}} {modal} {v.base} {{O}} {when}", {"S": s, "O": o}, broken)


def intransitive(rng: Rng) -> Sentence:
    s, v, (at, at_wrong) = person(rng), rng.pick(INTRANSITIVE), place(rng)
    o = thing(rng, rng.pick([TEXTS, FOODS, MACHINES]))
    if rng.chance(0.5):
        broken = {
            "agreement": f"{{S}} {s.wrong_verb(v)} {at}",
            "verb form": f"{{S}} {v.ing} {at}",
            "verb first": f"{s.verb(v)} {{S}} {at}",
            "needless object": f"{{S}} {s.verb(v)} {o.words} {at}",
            "preposition order": f"{{S}} {s.verb(v)} {at_wrong}",
        }
        return _sentence(f"{{S}} {s.verb(v)} {at}", {"S": s}, broken)
    when = rng.pick(PAST_TIMES)
    broken = {
        "needless object": f"{{S}} {v.past} {o.words} {when}",
        "tense and time": f"{{S}} {v.past} {rng.pick(FUTURE_TIMES)}",
        "passive": f"{{S}} {s.be(True)} {v.participle} by {o.words} {when}",
        "double auxiliary": f"{{S}} did {v.past} {when}",
    }
    return _sentence(f"{{S}} {v.past} {when}", {"S": s}, broken)


def copula(rng: Rng) -> Sentence:
    s, past = person(rng), rng.chance(0.5)
    adjective, right = rng.pick(ADJECTIVE_PREPOSITION)
    if rng.chance(0.5):
        o = thing(rng, PEOPLE)
        wrong = rng.pick(WRONG_AFTER_ADJECTIVE[right])
        broken = {
            "agreement": f"{{S}} {s.wrong_be(past)} {adjective} {right} {{O}}",
            "missing verb": f"{{S}} {adjective} {right} {{O}}",
            "wrong preposition": f"{{S}} {s.be(past)} {adjective} {wrong} {{O}}",
            "missing preposition": f"{{S}} {s.be(past)} {adjective} {{O}}",
            "preposition order": f"{{S}} {s.be(past)} {adjective} {{O}} {right}",
            "adjective first": f"{{S}} {adjective} {s.be(past)} {right} {{O}}",
        }
        return _sentence(f"{{S}} {s.be(past)} {adjective} {right} {{O}}", {"S": s, "O": o}, broken)
    state, (at, at_wrong) = rng.pick(STATES), place(rng)
    broken = {
        "agreement": f"{{S}} {s.wrong_be(past)} very {state} {at}",
        "missing verb": f"{{S}} very {state} {at}",
        "degree order": f"{{S}} {s.be(past)} {state} very {at}",
        "preposition order": f"{{S}} {s.be(past)} very {state} {at_wrong}",
        "double verb": f"{{S}} {s.be(past)} has very {state} {at}",
    }
    return _sentence(f"{{S}} {s.be(past)} very {state} {at}", {"S": s}, broken)


def perfect(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    how = rng.pick(["already", "never", "just"])
    broken = {
        "agreement": f"{{S}} {s.wrong_have()} {how} {v.participle} {{O}}",
        "verb form": f"{{S}} {s.have()} {how} {rng.pick([v.base, v.ing])} {{O}}",
        "auxiliary order": f"{{S}} {how} {v.participle} {s.have()} {{O}}",
        "missing verb": f"{{S}} {s.be()} {how} {{O}} {v.base}",
        "two auxiliaries": f"{{S}} {s.have()} {s.be()} {how} {v.participle} {{O}}",
    }
    return _sentence(f"{{S}} {s.have()} {how} {v.participle} {{O}}", {"S": s, "O": o}, broken)


def progressive(rng: Rng) -> Sentence:
    s, (v, o), past = person(rng), action(rng), rng.chance(0.5)
    at, at_wrong = place(rng)
    broken = {
        "agreement": f"{{S}} {s.wrong_be(past)} {v.ing} {{O}} {at}",
        "verb form": f"{{S}} {s.be(past)} {v.base} {{O}} {at}",
        "missing auxiliary": f"{{S}} {v.ing} {{O}} {at}",
        "verb last": f"{{S}} {s.be(past)} {{O}} {at} {v.ing}",
        "preposition order": f"{{S}} {s.be(past)} {v.ing} {{O}} {at_wrong}",
    }
    return _sentence(f"{{S}} {s.be(past)} {v.ing} {{O}} {at}", {"S": s, "O": o}, broken)


def infinitive(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    main = rng.pick("decided hoped wanted promised agreed refused managed offered".split())
    broken = {
        "missing to": f"{{S}} {main} {v.base} {{O}}",
        "gerund for infinitive": f"{{S}} {main} {v.ing} {{O}}",
        "verb form": f"{{S}} {main} to {rng.pick([v.past, v.third])} {{O}}",
        "order of to": f"{{S}} {main} {v.base} to {{O}}",
        "verb last": f"{{S}} {main} to {{O}} {v.base}",
    }
    return _sentence(f"{{S}} {main} to {v.base} {{O}}", {"S": s, "O": o}, broken)


def gerund(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    main = rng.pick("enjoyed avoided denied considered suggested finished postponed".split())
    broken = {
        "infinitive for gerund": f"{{S}} {main} to {v.base} {{O}}",
        "verb form": f"{{S}} {main} {rng.pick([v.base, v.third])} {{O}}",
        "gerund first": f"{{S}} {v.ing} {main} {{O}}",
        "needless auxiliary": f"{{S}} {s.be(True)} {main} {v.ing} {{O}}",
    }
    return _sentence(f"{{S}} {main} {v.ing} {{O}}", {"S": s, "O": o}, broken)


def question(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    when = rng.pick(PAST_TIMES)
    if rng.chance(0.5):
        broken = {
            "double tense": f"did {{S}} {v.past if v.past != v.base else v.ing} {{O}} {when}",
            "no inversion": f"{{S}} did {{O}} {v.base} {when}",
            "missing verb": f"did {{S}} {{O}} {when}",
            "verb first": f"{v.base} did {{S}} {{O}} {when}",
        }
        return _sentence(f"did {{S}} {v.base} {{O}} {when}", {"S": s, "O": o}, broken, "?")
    wh = "who" if o.words.split()[-1] in {w for n in PEOPLE for w in n} else "what"
    broken = {
        "filled gap": f"{wh} did {{S}} {v.base} {o.words} {when}",
        "no inversion": f"{wh} {{S}} did {v.base} {when}",
        "double tense": f"{wh} did {{S}} {v.past} {when}",
        "no auxiliary": f"{wh} {{S}} {v.base} {when}",
    }
    return _sentence(f"{wh} did {{S}} {v.base} {when}", {"S": s}, broken, "?")


def negation(rng: Rng) -> Sentence:
    s, (v, o) = person(rng), action(rng)
    broken = {
        "agreement": f"{{S}} {s.wrong_do()} not {v.base} {{O}}",
        "verb form": f"{{S}} {s.do()} not {rng.pick([v.third, v.past, v.ing])} {{O}}",
        "no auxiliary": f"{{S}} not {s.verb(v)} {{O}}",
        "order of not": f"{{S}} {s.do()} {v.base} not {{O}}",
        "missing verb": f"{{S}} {s.do()} not {{O}}",
    }
    return _sentence(f"{{S}} {s.do()} not {v.base} {{O}}", {"S": s, "O": o}, broken)


def relative(rng: Rng) -> Sentence:
    s = noun_phrase(rng, PEOPLE + MALE + FEMALE, ADJECTIVES)
    (v, o), state, past = action(rng), rng.pick(STATES), rng.chance(0.4)
    tail = f"{s.be(past)} {state}"
    broken = {
        "agreement": f"{{S}} who {v.past} {{O}} {s.wrong_be(past)} {state}",
        "wrong relative": f"{{S}} which {v.past} {{O}} {tail}",
        "missing relative": f"{{S}} {v.past} {{O}} {tail}",
        "needless pronoun": f"{{S}} who {'they' if s.plural else 'he'} {v.past} {{O}} {tail}",
        "missing verb": f"{{S}} who {{O}} {tail}",
    }
    if state != "tired":  # "to tire" is a verb as well
        broken["missing main verb"] = f"{{S}} who {v.past} {{O}} {state}"
    return _sentence(f"{{S}} who {v.past} {{O}} {tail}", {"S": s, "O": o}, broken)


def reflexive(rng: Rng) -> Sentence:
    past = rng.pick("hurt blamed introduced saw admired described washed".split())
    female, plural = rng.chance(0.5), rng.chance(0.3)
    if rng.chance(0.4) and not plural:
        name = rng.pick(FEMALE_NAMES if female else MALE_NAMES)
        s = Phrase(name, False, {}, "f" if female else "m")
    else:
        s = noun_phrase(rng, FEMALE if female else MALE, ADJECTIVES, plural)
    right = "themselves" if s.plural else ("herself" if female else "himself")
    wrong = "himself" if female else "herself"
    when = rng.pick(PAST_TIMES)
    broken = {
        "reflexive gender": f"{{S}} {past} {wrong} {when}",
        "reflexive first": f"{right} {past} {{S}} {when}",
        "reflexive order": f"{{S}} {right} {when} {past}",
        "missing verb": f"{{S}} {right} {when}",
    }
    if s.words.split()[0] not in ("every", "each"):  # these go with "themselves" as well
        broken["reflexive number"] = f"{{S}} {past} {'herself' if s.plural else 'themselves'} {when}"
    return _sentence(f"{{S}} {past} {right} {when}", {"S": s}, broken)


def prepositional(rng: Rng) -> Sentence:
    v, right, wrongs, objects = rng.pick(PREPOSITIONAL)
    s, o = person(rng), thing(rng, objects)
    how = rng.pick(FREQUENCY)
    broken = {
        "agreement": f"{{S}} {how} {s.wrong_verb(v)} {right} {{O}}",
        "wrong preposition": f"{{S}} {how} {s.verb(v)} {rng.pick(wrongs)} {{O}}",
        "preposition order": f"{{S}} {how} {s.verb(v)} {{O}} {right}",
        "missing verb": f"{{S}} {how} {right} {{O}}",
        "verb last": f"{{S}} {how} {right} {{O}} {s.verb(v)}",
        "missing preposition": f"{{S}} {how} {s.verb(v)} {{O}}",
    }
    return _sentence(f"{{S}} {how} {s.verb(v)} {right} {{O}}", {"S": s, "O": o}, broken)


def comparison(rng: Rng) -> Sentence:
    s, o, past = person(rng), thing(rng, PEOPLE), rng.chance(0.4)
    plain, more = rng.pick(COMPARATIVES)
    be = s.be(past)
    broken = {
        "agreement": f"{{S}} {s.wrong_be(past)} {more} than {{O}}",
        "double comparative": f"{{S}} {be} more {more} than {{O}}",
        "no comparative": f"{{S}} {be} {plain} than {{O}}",
        "wrong than": f"{{S}} {be} {more} {rng.pick(['as', 'from'])} {{O}}",
        "order of than": f"{{S}} {be} than {{O}} {more}",
        "missing verb": f"{{S}} {more} than {{O}}",
    }
    return _sentence(f"{{S}} {be} {more} than {{O}}", {"S": s, "O": o}, broken)


def quantity(rng: Rng) -> Sentence:
    s = person(rng)
    past = rng.pick("bought found needed lost wanted carried".split())
    mass, noun = rng.pick(MASS), rng.pick(OBJECTS + FOODS + TEXTS)
    when = rng.pick(PAST_TIMES)
    if rng.chance(0.5):
        degree, amount = rng.pick([("too", "much"), ("very", "little"), ("so", "much")])
        words, wrong = mass, rng.pick(["too many", "so many", "several"])
        broken = {"plural of a mass noun": f"{{S}} {past} two {mass} {when}"}
    else:
        degree, amount = rng.pick([("too", "many"), ("very", "few"), ("so", "many")])
        words, wrong = noun.many, rng.pick(["too much", "so much"])
        broken = {"noun number": f"{{S}} {past} {degree} {amount} {noun.one} {when}"}
    broken |= {
        "wrong quantifier": f"{{S}} {past} {wrong} {words} {when}",
        "quantifier order": f"{{S}} {past} {degree} {words} {amount} {when}",
        "missing verb": f"{{S}} {degree} {amount} {words} {when}",
        "verb last": f"{{S}} {degree} {amount} {words} {when} {past}",
    }
    return _sentence(f"{{S}} {past} {degree} {amount} {words} {when}", {"S": s}, broken)


def existence(rng: Rng) -> Sentence:
    plural, past = rng.chance(0.5), rng.chance(0.4)
    noun = rng.pick(OBJECTS + FOODS + TEXTS)
    adjective = rng.pick(THING_ADJECTIVES)
    spot = f"on the {rng.pick(FURNITURE).one}"
    number = rng.pick(["two", "three", "several", "many"])
    if plural:
        words = f"{number} {adjective} {noun.many}"
        first, other = f"{noun.many} {number} {adjective}", f"{number} {adjective} {noun.one}"
    else:
        words = with_article(f"{adjective} {noun.one}")
        first, other = f"{noun.one} a {adjective}", f"one {adjective} {noun.many}"
    be = Phrase(words, plural, {})
    broken = {
        "agreement": f"there {be.wrong_be(past)} {words} {spot}",
        "noun number": f"there {be.be(past)} {other} {spot}",
        "missing verb": f"there {words} {spot}",
        "order of there": f"{words} {spot} there {be.be(past)}",
        "noun first": f"there {be.be(past)} {first} {spot}",
    }
    return Sentence(f"there {be.be(past)} {words} {spot}", broken)


def giving(rng: Rng) -> Sentence:
    s, r = person(rng), thing(rng, PEOPLE)
    if rng.chance(0.4):
        phrases = {"S": s, "O": thing(rng, TEXTS), "R": r}
        past = rng.pick("explained described mentioned donated".split())
        broken = {
            "double object": f"{{S}} {past} {{R}} {{O}}",
            "preposition order": f"{{S}} {past} {{O}} {{R}} to",
            "missing preposition": f"{{S}} {past} {{O}} {{R}}",
            "missing verb": "{S} {O} to {R}",
        }
        return _sentence(f"{{S}} {past} {{O}} to {{R}}", phrases, broken)
    phrases = {"S": s, "O": thing(rng, rng.pick([TEXTS, FOODS, OBJECTS])), "R": r}
    past, ing = rng.pick([("gave", "giving"), ("sent", "sending"), ("showed", "showing"), ("handed", "handing")])
    broken = {
        "verb form": f"{{S}} {ing} {{R}} {{O}}",
        "needless preposition": f"{{S}} {past} {{R}} of {{O}}",
        "verb last": f"{{S}} {{R}} {{O}} {past}",
        "missing verb": "{S} {R} {O}",
    }
    return _sentence(f"{{S}} {past} {{R}} {{O}}", phrases, broken)


def report(rng: Rng) -> Sentence:
    s, inner, (v, o) = person(rng), person(rng), action(rng)
    # "said that doctor ..." is acceptable: "that" is the determiner.
    inner.broken.pop("missing determiner", None)
    main = rng.pick("said thought believed knew heard claimed".split())
    broken = {
        "missing inner verb": f"{{S}} {main} that {{I}} {{O}}",
        "missing main verb": f"{{S}} that {{I}} {v.past} {{O}}",
        "inner verb form": f"{{S}} {main} that {{I}} {v.ing} {{O}}",
        "inner verb last": f"{{S}} {main} that {{I}} {{O}} {v.past}",
        "wrong conjunction": f"{{S}} {main} because that {{I}} {v.past} {{O}}",
    }
    return _sentence(f"{{S}} {main} that {{I}} {v.past} {{O}}", {"S": s, "I": inner, "O": o}, broken)


def passive(rng: Rng) -> Sentence:
    (v, o), agent = action(rng), noun_phrase(rng, PEOPLE, ADJECTIVES)
    be = o.be(True)
    broken = {
        "agreement": f"{{O}} {o.wrong_be(True)} {v.participle} by {{A}}",
        "verb form": f"{{O}} {be} {rng.pick([v.base, v.third])} by {{A}}",
        "wrong preposition": f"{{O}} {be} {v.participle} of {{A}}",
        "missing preposition": f"{{O}} {be} {v.participle} {{A}}",
        "double auxiliary": f"{{O}} {be} has {v.participle} by {{A}}",
        "preposition order": f"{{O}} {be} {v.participle} {{A}} by",
    }
    return _sentence(f"{{O}} {be} {v.participle} by {{A}}", {"O": o, "A": agent}, broken)


def coordination(rng: Rng) -> Sentence:
    a, b = (noun_phrase(rng, PEOPLE, ADJECTIVES, plural=False) for _ in range(2))
    for phrase in (a, b):  # "both doctor and nurse" is acceptable
        phrase.broken.pop("missing determiner", None)
    v, o = action(rng)
    first, second = rng.pick([("both", "and"), ("either", "or"), ("neither", "nor")])
    wrong = {"and": "or", "or": "and", "nor": "and"}[second]
    broken = {
        "wrong conjunction": f"{first} {{A}} {wrong} {{B}} {v.past} {{O}}",
        "missing conjunction": f"{first} {{A}} {{B}} {v.past} {{O}}",
        "conjunction order": f"{{A}} {first} {second} {{B}} {v.past} {{O}}",
        "missing verb": f"{first} {{A}} {second} {{B}} {{O}}",
        "verb last": f"{first} {{A}} {second} {{B}} {{O}} {v.past}",
    }
    pattern = f"{first} {{A}} {second} {{B}} {v.past} {{O}}"
    return _sentence(pattern, {"A": a, "B": b, "O": o}, broken)


TEMPLATES: tuple[Callable[[Rng], Sentence], ...] = (
    transitive_present, transitive_past, future, intransitive, copula, perfect, progressive,
    infinitive, gerund, question, negation, relative, reflexive, prepositional, comparison,
    quantity, existence, giving, report, passive, coordination,
)  # fmt: skip
# Words that are an error if they are repeated; "very very old" and "gave her her book" are not errors.
NEVER_TWICE = set("the a an my his our their is are was were has does did to of in by than will who near".split())


def _doubled(rng: Rng, words: str) -> str | None:
    """The sentence with one of its function words repeated; None if it has none of them."""
    parts = words.split()
    spots = [i for i, word in enumerate(parts) if word in NEVER_TWICE]
    if not spots:
        return None
    spot = rng.pick(spots)
    return " ".join(parts[: spot + 1] + parts[spot:])


def _finish(words: str, mark: str) -> str:
    return words[0].upper() + words[1:] + mark


def sentences(seed: int, count: int) -> list[tuple[str, int]]:
    """`count` different sentences with their labels: 1 acceptable, 0 broken, half of each.

    A sentence is used either in its acceptable form or in a broken one, never in both, so that no such pair can be
    divided between the splits. The result depends on the arguments alone, and a smaller `count` gives the beginning of
    the same list.
    """
    rng = Rng(seed)
    used: set[str] = set()
    found: list[tuple[str, int]] = []
    while len(found) < count:
        label = len(found) % 2
        sentence = rng.pick(TEMPLATES)(rng)
        words = sentence.words
        if not label:
            doubled = _doubled(rng, words) if rng.chance(0.06) else None
            inner = sentence.broken_phrases if rng.chance(0.2) else {}
            forms = inner or sentence.broken
            words = doubled or forms[rng.pick(list(forms))]
        acceptable, text = _finish(sentence.words, sentence.mark), _finish(words, sentence.mark)
        if acceptable in used or text in used:
            continue
        used.update((acceptable, text))
        found.append((text, label))
    return found
