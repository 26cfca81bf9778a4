"""benchmarks/experiments end to end on a tiny random encoder: training, every setting of the table, the report."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_fuse.demo.model import Encoded

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.experiments import finetune_text, peru_fft_report, peru_fft_text

CLASSES = {"first": 2, "second": 3}


def tiny_encoder(cache=None):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertModel(config, add_pooling_layer=False).eval()


def tiny_tasks(names=tuple(CLASSES), cache=None):
    """Rows of random tokens; the label is the first token modulo the number of classes."""
    generator = torch.Generator().manual_seed(1)
    tasks = {}
    for name in names:
        rows, labels = {}, {}
        for part, n in (("train", 64), ("validation", 40), ("test", 50)):
            ids = [torch.randint(1, 40, (5 + i % 4,), generator=generator).tolist() for i in range(n)]
            rows[part] = [Encoded(row, [0] * len(row)) for row in ids]
            labels[part] = torch.tensor([row[0] % CLASSES[name] for row in ids])
        tasks[name] = finetune_text.TaskData(name, [str(c) for c in range(CLASSES[name])], rows, labels)
    return tasks


@pytest.fixture(scope="module")
def finetunes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetunes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_text, "load_encoder", tiny_encoder)
        for task in tiny_tasks().values():
            finetune_text.train(task, folder, folder, steps=8, trial_steps=3, bf16=False, rates=(1e-3, 1e-2))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(peru_fft_text, "load_encoder", tiny_encoder)
    monkeypatch.setattr(peru_fft_text, "read_tasks", tiny_tasks)
    monkeypatch.setattr(peru_fft_text, "TASKS", CLASSES)


def test_finetune_changes_the_whole_encoder_but_not_unseen_words(finetunes):
    base, tuned = load_file(finetunes / "base.safetensors"), load_file(finetunes / "first.safetensors")
    assert set(tuned) == set(base) | {"classifier.weight", "classifier.bias"}
    words = "encoder.embeddings.word_embeddings.weight"
    unseen = {"encoder.embeddings.token_type_embeddings.weight", "encoder.embeddings.position_ids"}
    unseen |= {k for k in base if k.endswith("key.bias")}  # softmax does not see it
    assert [k for k in base if torch.equal(base[k], tuned[k]) and k not in unseen] == []
    assert torch.equal(base[words][0], tuned[words][0])  # token 0 is in no text
    assert json.loads((finetunes / "first.json").read_text())["finetuned"]["lr"] in (1e-3, 1e-2)


def test_evaluate_writes_table_report_and_picture(finetunes, tiny, tmp_path):
    given = peru_fft_text.read_inputs(finetunes, finetunes)
    results = peru_fft_text.evaluate(given, finetunes)
    peru_fft_text.write(results, tmp_path)
    rows = results["settings"]
    assert {"PERU-FFT 10.0%", "post-pruning 10.0%", "merged: average", peru_fft_report.SINGLE} <= set(rows)
    recorded = {name: json.loads((finetunes / f"{name}.json").read_text()) for name in CLASSES}
    for name in CLASSES:  # the same files, scored by other code
        assert rows[peru_fft_report.SINGLE]["test"][name] == recorded[name]["finetuned"]["test"]
        assert rows["tuned head, frozen encoder"]["test"][name] == recorded[name]["head_only"]["test"]
    energies = [rows[f"PERU-FFT {d:.1%}"]["energy"] for d in sorted(peru_fft_text.DENSITIES)]
    assert energies == sorted(energies)
    assert 0 < energies[0] < energies[-1] < 1
    assert json.loads((tmp_path / "peru_fft_experiment.json").read_text())["settings"].keys() == rows.keys()
    text = (tmp_path / "peru_fft_experiment.md").read_text()
    assert peru_fft_report.verdict(results) in text
    assert all(f"| {label} | " in text for label in rows)
    assert (tmp_path / "peru_fft_experiment.png").stat().st_size > 1000


def test_mixed_batches_give_what_each_task_gives_alone(finetunes, tiny):
    given = peru_fft_text.read_inputs(finetunes, finetunes)
    _, peru = peru_fft_text.compressed("", given.base, given.finetuned, 0.1, "global")
    served = peru_fft_text.serve(given, peru, finetunes, batch=16)
    assert served["rows"] == 100
    assert served["largest_difference"] < 1e-5 * served["largest_logit"]
    assert served["accuracy"] == served["accuracy_alone"]


def test_check_refuses_a_wrong_selection(finetunes, tiny):
    base = load_file(finetunes / "base.safetensors")
    finetuned = {name: load_file(finetunes / f"{name}.safetensors") for name in CLASSES}
    _, peru = peru_fft_text.compressed("", base, finetuned, 0.1, "tensor")
    with pytest.raises(RuntimeError, match="first: kept"):
        peru_fft_text.check(peru, finetuned, 0.1)  # per tensor is not the global choice
    finetuned["second"]["encoder.embeddings.LayerNorm.bias"] = torch.ones(32)
    with pytest.raises(RuntimeError, match=r"second: .*LayerNorm.bias is not the fine-tune's own"):
        peru_fft_text.check(peru, finetuned, None)


def test_evaluate_names_an_empty_folder(tiny, tmp_path):
    with pytest.raises(ValueError, match="two tasks or more"):
        peru_fft_text.read_inputs(tmp_path, tmp_path)


def test_average_is_paired():
    single = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True] * 10)}
    assert peru_fft_report.average(single, single) == {
        "average": 0.75,
        "of_single": 1.0,
        "points": 0.0,
        "points_ci95": 0.0,
    }
    worse = {"a": torch.tensor([True, False, False, False]), "b": single["b"]}
    found = peru_fft_report.average(worse, single)
    assert found["average"] == 0.625
    assert found["points"] == -12.5
    assert found["points_ci95"] == pytest.approx(196 * 0.25 / 2, abs=0.01)  # gains 0, -1, 0, 0: variance 1/4, n = 4
