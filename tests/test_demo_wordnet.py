"""examples/wordnet_tasks.py on a handful of entries in WordNet's own format."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "examples" / "wordnet_tasks.py"


@pytest.fixture(scope="module")
def wordnet():
    spec = importlib.util.spec_from_file_location("wordnet_tasks", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordnet")
    nouns = ["  1 licence text", "00000001 05 n 01 animal 0 000 | a living thing that moves and eats"]
    nouns += [
        f"{i:08d} 05 n 02 beast_{i} 0 brute 0 001 @ 00000001 n 0000 "
        f'| a beast of sort {i} that eats other small things; "a {i}"'
        for i in range(2, 80)
    ]
    verbs = [
        f'{i:08d} 30 v 01 hurry 0 000 01 + 02 00 | move in haste number {i}; "he hurried home to see {i}"; "they hurry"'
        for i in range(1, 60)
    ]
    (folder / "data.noun").write_text("\n".join(nouns))
    (folder / "data.verb").write_text("\n".join(verbs))
    (folder / "data.adj").write_text("00000001 00 s 01 quick(p) 0 000 | done in little time  \n")
    (folder / "data.adv").write_text("00000001 02 r 01 fast 0 000 | with great speed  \n")
    (folder / "verb.exc").write_text("ran run\nrunning run\n")
    return folder


def test_read_synsets(wordnet, folder):
    synsets = wordnet.read_synsets(folder)
    beast = synsets["n", "00000002"]
    assert beast.topic == "noun.animal"
    assert beast.words == ("beast_2", "brute")
    assert beast.links == (("@", ("n", "00000001")),)
    assert beast.definition == "a beast of sort 2 that eats other small things"
    assert beast.sentences == ("a 2",)
    assert synsets["a", "00000001"].words == ("quick",)
    assert len(synsets) == 79 + 59 + 2


@pytest.mark.parametrize("name", ["noun_topic", "verb_topic", "hypernymy", "word_order", "missing_word", "verb_form"])
def test_splits_share_nothing(wordnet, folder, name):
    synsets = wordnet.read_synsets(folder)
    limits = dict.fromkeys(("train", "validation", "test"), 10_000)
    splits = wordnet.load(name, folder, synsets, limits)
    assert splits == wordnet.load(name, folder, synsets, limits)
    texts = {part: {t for e in found for t in (e.text, e.pair) if t} for part, found in splits.items()}
    assert texts["train"]
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_word_order_swaps_two_neighbours(wordnet, folder):
    splits = wordnet.load(
        "word_order", folder, wordnet.read_synsets(folder), dict.fromkeys(("train", "validation", "test"), 99)
    )
    definitions = {s.definition for s in wordnet.read_synsets(folder).values()}
    for e in splits["train"]:
        assert (e.text in definitions) == (e.label == "intact")
        assert any(sorted(e.text.split()) == sorted(d.split()) for d in definitions)


def test_balanced_tasks_stay_balanced_when_cut(wordnet, folder):
    examples = [wordnet.Example(str(i), None, label) for i, label in enumerate("aaaaabbbcccc")]
    labels = [e.label for e in wordnet._balance(examples)]
    assert labels == list("abc") * 3


@pytest.mark.parametrize(
    ("token", "lemma", "form"),
    [
        ("walk", "walk", "base"), ("walks", "walk", "s"), ("walked", "walk", "past"), ("walking", "walk", "ing"),
        ("stopped", "stop", "past"), ("stopping", "stop", "ing"), ("making", "make", "ing"), ("baked", "bake", "past"),
        ("cries", "cry", "s"), ("cried", "cry", "past"), ("passes", "pass", "s"), ("ran", "run", "past"),
        ("running", "run", "ing"), ("walker", "walk", None), ("hundred", "run", None),
    ],
)  # fmt: skip
def test_form_of_a_verb(wordnet, token, lemma, form):
    assert wordnet._form(token, lemma, {"ran": "run", "running": "run"}) == form
