"""When a shrink runs beside its layer's product; what then happens is in tests/kernels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn_models import Mlp, adapter

import lora_fuse as lf
from lora_fuse.nn.overlap import overlaps, side_of


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "want"),
    [
        (1, 4096, 4096, True),
        (256, 4096, 4096, True),
        (257, 4096, 4096, False),
        (0, 4096, 4096, False),
        (16, 2048, 2048, True),
        (16, 2048, 2047, False),
        (16, 384, 1536, False),
    ],
)
def test_which_layers(rows: int, in_features: int, out_features: int, want: bool) -> None:
    assert overlaps(rows, in_features, out_features) is want


def test_a_cpu_has_no_streams() -> None:
    assert side_of(torch.device("cpu")) is None
    bare = Mlp().requires_grad_(False)
    adapters = {"a": adapter(bare, ("up", "out"), 2)}
    plain = lf.attach(copy.deepcopy(bare), adapters)
    model = lf.attach(copy.deepcopy(bare), adapters, overlap=True)
    x = torch.randn(3, 24)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.up.lora_serving.overlap  # type: ignore[union-attr]
        with torch.no_grad(), lf.use_adapters(other, "a"), lf.use_adapters(plain, "a"):
            assert torch.equal(other(x), plain(x))


def test_bad_values() -> None:
    for value in ("yes", 1, None):
        with pytest.raises(TypeError, match=r"overlap: got .*, accepted are True and False"):
            lf.attach(Mlp(), {}, overlap=value)  # type: ignore[arg-type]
