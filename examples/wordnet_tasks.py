"""Six text-classification tasks read from WordNet 3.0: texts, labels, and a split that leaks nothing.

Every task is made of synsets (WordNet's entries). A synset goes to test, validation or training by a hash of its
definition, before any example is built from it; an example that joins two synsets is kept only if both lie in the same
part. So no definition and no example sentence of the test part was ever trained on, in whatever role.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# WordNet's lexicographer files, in the order of their numbers: the broad topic of a synset (wninput(5WN)).
# fmt: off
TOPICS = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)
# fmt: on
POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


class Example(NamedTuple):
    """One labelled text; ``pair`` is the second text of a pair task, else None."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class Synset:
    """One WordNet entry: its words, its definition, the sentences that show it, its links to other entries."""

    key: tuple[str, str]  # (part of speech n/v/a/r, offset)
    topic: str
    words: tuple[str, ...]
    links: tuple[tuple[str, tuple[str, str]], ...]  # (pointer symbol, key of the other synset)
    definition: str
    sentences: tuple[str, ...]

    @property
    def part(self) -> str:
        """``test`` 15 %, ``validation`` 10 %, else ``train``: by hash, the same on every machine."""
        bucket = int(hashlib.md5(self.definition.encode()).hexdigest(), 16) % 20
        return "test" if bucket < 3 else "validation" if bucket < 5 else "train"


Splits = dict[str, list[Example]]


def read_synsets(folder: Path) -> dict[tuple[str, str], Synset]:
    """All synsets of ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv`` in ``folder`` (format: wndb(5WN))."""
    synsets = {}
    for pos, letter in POS.items():
        for line in (folder / f"data.{pos}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence text at the top
                continue
            fields, gloss = line.split(" | ", 1)
            field = fields.split()
            num_words = int(field[3], 16)
            words = tuple(re.sub(r"\(.*\)$", "", w) for w in field[4 : 4 + 2 * num_words : 2])
            at = 4 + 2 * num_words
            pointers = field[at + 1 : at + 1 + 4 * int(field[at])]
            links = tuple((pointers[i], (pointers[i + 2], pointers[i + 1])) for i in range(0, len(pointers), 4))
            definition = re.split(r';? *"', gloss.strip(), maxsplit=1)[0].strip(" ;")
            sentences = tuple(s.strip() for s in re.findall(r'"([^"]+)"', gloss))
            if definition:
                key = (letter, field[0])
                synsets[key] = Synset(key, TOPICS[int(field[1])], words, links, definition, sentences)
    return synsets


def noun_topic(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Which of WordNet's 25 noun topics does a definition belong to?"""
    for s in synsets.values():
        if s.key[0] == "n" and s.topic != "noun.Tops":
            yield s.part, Example(s.definition, None, s.topic.split(".")[1])


def verb_topic(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Which of the 15 verb topics? The text is the definition with its example sentences."""
    for s in synsets.values():
        if s.key[0] == "v":
            yield s.part, Example("; ".join((s.definition, *s.sentences)), None, s.topic.split(".")[1])


def hypernymy(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Two noun definitions: is the first a kind of the second, the reverse, or are both kinds of a third thing?"""
    rng = random.Random(0)
    children: dict[tuple[str, str], list[Synset]] = defaultdict(list)
    for s in synsets.values():
        for symbol, other in s.links:
            if symbol == "@" and s.key[0] == "n":
                children[other].append(s)
    for parent_key, kinds in children.items():
        parent = synsets[parent_key]
        # At most two examples of each label from a parent, so that "genus" and "city" do not fill the data.
        for child in rng.sample(kinds, min(2, len(kinds))):
            if child.part == parent.part:
                yield child.part, Example(child.definition, parent.definition, "narrower")
        for child in rng.sample(kinds, min(2, len(kinds))):
            if child.part == parent.part:
                yield child.part, Example(parent.definition, child.definition, "broader")
        for _ in range(2 if len(kinds) > 1 else 0):
            a, b = rng.sample(kinds, 2)
            if a.part == b.part:
                yield a.part, Example(a.definition, b.definition, "siblings")


def word_order(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Is a definition as WordNet has it, or have two neighbouring words in its middle been swapped?"""
    rng = random.Random(0)
    for s in synsets.values():
        words = s.definition.split()
        places = [
            i
            for i in range(1, len(words) - 2)
            if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()
        ]
        if len(words) < 6 or not places:
            continue
        if rng.random() < 0.5:
            yield s.part, Example(s.definition, None, "intact")
        else:
            i = rng.choice(places)
            words[i], words[i + 1] = words[i + 1], words[i]
            yield s.part, Example(" ".join(words), None, "swapped")


FUNCTION_WORDS = {
    "a",
    "an",
    "the",
    "of",
    "to",
    "in",
    "on",
    "at",
    "by",
    "for",
    "with",
    "from",
    "and",
    "or",
    "is",
    "that",
}


def missing_word(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Is a definition as WordNet has it, or has a little word (of, the, to, ...) been left out of its middle?"""
    rng = random.Random(0)
    for s in synsets.values():
        words = s.definition.split()
        places = [i for i in range(1, len(words) - 1) if words[i] in FUNCTION_WORDS]
        if len(words) < 6 or not places:
            continue
        if rng.random() < 0.5:
            yield s.part, Example(s.definition, None, "intact")
        else:
            del words[rng.choice(places)]
            yield s.part, Example(" ".join(words), None, "left out")


def verb_form(synsets: dict[tuple[str, str], Synset], folder: Path) -> Iterator[tuple[str, Example]]:
    """Is the verb that a sentence is an example of in its base form, its -s form, its -ing form or a past form?"""
    irregular: dict[str, str] = {}
    for line in (folder / "verb.exc").read_text(encoding="utf-8").splitlines():
        form, lemma = line.split()[:2]
        irregular[form] = lemma
    for s in synsets.values():
        if s.key[0] != "v":
            continue
        lemmas = {w.lower() for w in s.words if "_" not in w}
        for sentence in s.sentences:
            tokens = re.findall(r"[a-z'-]+", sentence.lower())
            forms = {f for t in tokens for lemma in lemmas if (f := _form(t, lemma, irregular))}
            if len(tokens) >= 3 and len(forms) == 1:
                yield s.part, Example(sentence, None, forms.pop())


def _form(token: str, lemma: str, irregular: dict[str, str]) -> str | None:
    """The form of ``lemma`` that ``token`` is, or None; a token that may be two forms (``put``) counts as base."""
    if token == lemma:
        return "base"
    stems = {lemma, lemma + lemma[-1]} | ({lemma[:-1]} if lemma.endswith("e") else set())
    if token in {stem + "ing" for stem in stems} or (token.endswith("ing") and irregular.get(token) == lemma):
        return "ing"
    y_stem = lemma[:-1] + "i" if lemma.endswith("y") else lemma
    if token in {lemma + "s", y_stem + "es"}:
        return "s"
    if token in {stem + "ed" for stem in stems | {y_stem}} or irregular.get(token) == lemma:
        return "past"
    return None


class Task(NamedTuple):
    """How examples are made, and whether the classes are to be drawn in equal numbers."""

    make: Callable[[dict[tuple[str, str], Synset], Path], Iterator[tuple[str, Example]]]
    balanced: bool


TASKS = {
    "noun_topic": Task(noun_topic, False),
    "verb_topic": Task(verb_topic, False),
    "hypernymy": Task(hypernymy, True),
    "word_order": Task(word_order, True),
    "missing_word": Task(missing_word, True),
    "verb_form": Task(verb_form, False),
}


def load(name: str, folder: Path, synsets: dict[tuple[str, str], Synset], limits: dict[str, int]) -> Splits:
    """The examples of one task, without repeats, shuffled with a fixed seed and cut to ``limits`` per part."""
    task = TASKS[name]
    parts: dict[str, dict[tuple[str, str | None], Example]] = {part: {} for part in limits}
    for part, example in task.make(synsets, folder):
        parts[part].setdefault((example.text, example.pair), example)
    out = {}
    trained_on = {e.text for e in parts["train"].values()}
    for part, found in parts.items():
        if part != "train":  # two synsets may share an example sentence
            found = {k: e for k, e in found.items() if e.text not in trained_on}
        examples = sorted(found.values(), key=lambda e: (e.text, e.pair or "", e.label))
        random.Random(f"{name}/{part}").shuffle(examples)
        if task.balanced:
            examples = _balance(examples)
        out[part] = examples[: limits[part]]
    return out


def _balance(examples: list[Example]) -> list[Example]:
    """As many of each class as the rarest has, the classes taking turns (so that any prefix is balanced too)."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for e in examples:
        by_label[e.label].append(e)
    return [e for turn in zip(*(by_label[label] for label in sorted(by_label)), strict=False) for e in turn]
