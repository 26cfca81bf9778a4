"""``override_plans``: which rules fit, what they change, what they are refused for, and that launches made before are
forgotten."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import lora_fuse as lf
from lora_fuse.kernels import launch as launching
from lora_fuse.kernels.configs import plan
from lora_fuse.kernels.plan_rules import plan_by_rules

SIZES = {"in_features": 4096, "out_features": 6144, "max_rank": 16, "num_pairs": 16, "num_slots": 9}
SIZES |= {"dtype": "bfloat16", "backend": "cuda", "slices": 3, "num_rows": 16}


@pytest.fixture(autouse=True)
def shipped_again():
    yield
    lf.override_plans(None)


def made(**sizes):
    return plan_by_rules(**{**SIZES, **sizes})


def test_without_rules_it_is_the_shipped_plan():
    assert made() == plan(**SIZES)
    lf.override_plans([])
    assert made() == plan(**SIZES)


@pytest.mark.parametrize(
    ("where", "others"),
    [
        ({"in_features": 4096}, {"in_features": 4097}),
        ({"out_features": [1, 6144]}, {"out_features": 4096}),
        ({"max_rank": [16, 32]}, {"max_rank": 64}),
        ({"slices": 3}, {"slices": 1}),
        ({"dtype": ["float16", "bfloat16"]}, {"dtype": "float32"}),
        ({"backend": "cuda"}, {"backend": "hip"}),
        ({"pairs": [16, 20]}, {"num_pairs": 15}),
        ({"pairs": [1, 16]}, {"num_pairs": 17}),
        ({"in_features": 4096, "pairs": [16, 16]}, {"in_features": 64}),
    ],
)
def test_a_rule_is_for_the_shapes_that_it_names(where, others):
    lf.override_plans([{"where": where, "expand": {"num_warps": 8}}])
    assert made().expand.num_warps == 8
    assert made(**others) == plan(**{**SIZES, **others})


def test_rules_change_what_they_say_and_nothing_else(tmp_path):
    before = plan(**SIZES)
    rules = [
        {"where": {"max_rank": 16}, "shrink": {"split_len": 1024, "num_stages": 5}, "expand": {"block_n": 128}},
        {"expand": {"block_n": 256, "ahead": True}},
    ]
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(rules))
    for given in (rules, path, str(path)):
        lf.override_plans(None)
        lf.override_plans(given)
        got = made()
        changed = {k: v for k, v in vars(got.shrink).items() if v != vars(before.shrink)[k]}
        assert changed == {"split_len": 1024, "planes": 4, "num_stages": 5}
        assert {k: v for k, v in vars(got.expand).items() if v != vars(before.expand)[k]} == {
            "block_n": 256,
            "ahead": True,
        }


def test_cuts_are_no_longer_than_the_layer():
    """Or the kernel's numbers would overflow, and nothing would compile."""
    for split_len in (2**31, 2**70):
        lf.override_plans([{"shrink": {"split_len": split_len}}])
        assert made(in_features=4000).shrink.split_len == 4096
        assert made(in_features=4000).shrink.planes == 1


def test_planes_follow_the_cuts():
    for in_features, split_len, planes in itertools.product((100, 4096, 14336, 300_000), (256, 4096), (1, "all")):
        lf.override_plans([{"shrink": {"split_len": split_len, "planes": planes}}])
        for pairs in (1, 4096):
            got = made(in_features=in_features, num_pairs=pairs).shrink
            splits = -(-in_features // got.split_len)
            assert got.planes == (1 if planes == 1 else splits)
            assert splits <= 32
            assert got.split_len >= min(split_len, in_features)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, r"rules: expected a list of rules, got dict"),
        ([[]], r"rules\[0\]: expected a dict, got list"),
        ([{}, {"expnd": {}}], r"rules\[1\]: has \['expnd'\], accepted are \['where', 'shrink', 'expand'\]"),
        ([{"where": {"rank": 1}}], r"rules\[0\]\['where'\]: has \['rank'\], accepted are \['in_features'"),
        ([{"where": {"dtype": "bf16"}}], r"\['dtype'\]: got 'bf16', accepted are \['float32'"),
        ([{"where": {"max_rank": []}}], r"\['max_rank'\]: got \[\], accepted are whole numbers above 0"),
        ([{"where": {"slices": True}}], r"\['slices'\]: got True"),
        ([{"where": {"pairs": 16}}], r"\['pairs'\]: got 16, accepted is \[least, most\]"),
        ([{"where": {"pairs": [5, 4]}}], r"\['pairs'\]: got \[5, 4\]"),
        ([{"shrink": {"block_m": 64}}], r"\['shrink'\]: has \['block_m'\]"),
        ([{"shrink": {"split_len": 300}}], r"\['split_len'\]: got 300, accepted is a multiple of 256"),
        ([{"shrink": {"planes": torch.ones(2)}}], r"\['planes'\]: got tensor"),
        ([{"where": {"dtype": [torch.ones(2)]}}], r"\['dtype'\]: got \[tensor"),
        ([{"shrink": {"planes": 2}}], r"\['planes'\]: got 2, accepted is 1 or 'all'"),
        ([{"expand": {"block_n": 48}}], r"\['block_n'\]: got 48, accepted is a power of two from 16 to 256"),
        ([{"expand": {"steps": 0}}], r"\['steps'\]: got 0"),
        ([{"expand": {"ahead": 1}}], r"\['ahead'\]: got 1, accepted is true or false"),
        (
            [{"where": {"pairs": [1, 2]}, "shrink": {"split_len": 512}}],
            r"names \['pairs'\] and sets split_len, which decides a row's bits",
        ),
        ([{"where": {"out_features": 1}, "shrink": {"block_k": 32}}], r"names \['out_features'\] and sets block_k"),
    ],
)
def test_bad_rules_change_nothing(rules, message):
    lf.override_plans([{"expand": {"num_warps": 8}}])
    with pytest.raises((ValueError, TypeError), match=message):
        lf.override_plans(rules)
    assert made().expand.num_warps == 8


def test_bad_files(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plans\.json: is no JSON file"):
        lf.override_plans(path)
    path.write_text('[{"expand": {"block_n": 48}}]')
    with pytest.raises(ValueError, match=r"plans\.json\[0\]\['expand'\]\['block_n'\]: got 48"):
        lf.override_plans(path)
    with pytest.raises(FileNotFoundError):
        lf.override_plans(tmp_path / "none.json")


def test_what_was_launched_before_a_change_is_not_kept_after_it(monkeypatch):
    """Where the rules change while a thread is between its launch and the keeping of it."""
    ready, kept = {}, object()

    def prepare(*args):
        lf.override_plans([])
        return kept

    monkeypatch.setattr(launching, "prepare", prepare)
    launching.run([], (torch.zeros(2),), ready)
    assert not ready
    monkeypatch.setattr(launching, "prepare", lambda *args: kept)
    launching.run([], (torch.zeros(2),), ready)
    assert list(ready.values()) == [kept]


def test_launches_that_were_kept_are_forgotten(monkeypatch):
    ready = {b"key": object()}
    monkeypatch.setitem(launching._kept, id(ready), ready)
    lf.override_plans([{"expand": {"num_warps": 8}}])
    assert not ready
