"""fuse_checkpoint against PEFT's own merge, on tiny real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_models import (
    BERT,
    BERT_CLS,
    GPT2,
    LLAMA,
    adapter,
    assert_same_state,
    load,
    logits,
    make_adapter,
    peft_merged,
    peft_model,
    save_bert,
    save_gpt2,
    save_llama,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.checkpoints import fuse_checkpoint, open_checkpoint

ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"target_modules": ATTENTION}, id="attention"),
        pytest.param({"target_modules": "all-linear", "use_rslora": True}, id="rslora"),
        pytest.param(
            {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, id="pattern"
        ),
        pytest.param({"target_modules": "all-linear", "use_dora": True}, id="dora"),
        pytest.param({"target_modules": ["embed_tokens", "lm_head"]}, id="embedding-and-head"),
        pytest.param({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, id="dora-embedding"),
        pytest.param({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, id="modules_to_save"),
        pytest.param({"target_modules": ATTENTION, "trainable_token_indices": [3, 17]}, id="token-rows"),
    ],
)
def test_llama_equals_peft_merge(llama: Path, tmp_path: Path, config: dict) -> None:
    path = make_adapter(LLAMA, llama, tmp_path / "adapter", **config)
    report = fuse_checkpoint(llama, [adapter(path)], out=tmp_path / "out")
    assert len(report.files) == len(open_checkpoint(llama).shards) > 2
    assert_same_state(load(LLAMA, tmp_path / "out").state_dict(), peft_merged(LLAMA, llama, path))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_conv1d_equals_peft_merge(tmp_path: Path, config: dict) -> None:
    base = save_gpt2(tmp_path / "gpt2")
    path = make_adapter(GPT2, base, tmp_path / "a", target_modules=["c_attn", "c_proj", "c_fc"], **config)
    square = "transformer.h.0.attn.c_proj.weight"
    assert open_checkpoint(base).tensors[square].shape == (32, 32)  # only the model's type tells its orientation
    fuse_checkpoint(base, [adapter(path)], out=tmp_path / "out")
    assert_same_state(load(GPT2, tmp_path / "out").state_dict(), peft_merged(GPT2, base, path))


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {}], ids=str)
def test_bert_biases_and_a_new_head(tmp_path: Path, config: dict) -> None:
    base = save_bert(tmp_path / "bert")  # a bare encoder: no "bert." in its names, no head
    wide = {"num_labels": 5}
    path = make_adapter(
        BERT_CLS, base, tmp_path / "a", model_kwargs=wide, task_type="SEQ_CLS", target_modules=["query", "dense"],
        exclude_modules=["classifier"], **config,
    )  # fmt: skip
    report = fuse_checkpoint(base, [adapter(path)], out=tmp_path / "out")
    assert any("inserted" in note for note in report.notes)
    # no num_labels here: the config that was written knows
    assert_same_state(load(BERT_CLS, tmp_path / "out").state_dict(), peft_merged(BERT_CLS, base, path, **wide))
    assert load(BERT, tmp_path / "out") is not None


def test_a_wrapper_of_ones_own_leaves_the_names_alone(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert")
    names = open_checkpoint(base).tensors.keys()
    layer = LoraLayer(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    head = {"classifier": {"weight": torch.ones(3, 32)}}
    wrapped = LoraAdapter({"encoder.encoder.layer.0.attention.self.query": layer}, modules_to_save=head)
    fuse_checkpoint(base, [wrapped], out=tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors.keys() == {*names, "classifier.weight"}
    before = load(BERT, base).encoder.layer[0].attention.self.query.weight
    after = load(BERT, tmp_path / "out").encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(after, before + layer.product())


def test_convolutions_equal_peft_merge(tmp_path: Path) -> None:
    import peft
    from safetensors.torch import save_file

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

    net = Net()
    (tmp_path / "base").mkdir()
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    for dora in (False, True):
        model = Net()
        model.load_state_dict(net.state_dict())
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv", "point"], r=2, use_dora=dora))
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
        wrapped.save_pretrained(tmp_path / f"a{dora}")
        fuse_checkpoint(tmp_path / "base", [adapter(tmp_path / f"a{dora}")], out=tmp_path / f"out{dora}")
        assert_same_state(
            load_file(tmp_path / f"out{dora}" / "model.safetensors"), wrapped.merge_and_unload().state_dict()
        )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_head_is_untied(tmp_path: Path, target: str) -> None:
    base = save_llama(tmp_path / "tied", tie=True)
    assert "lm_head.weight" not in open_checkpoint(base).tensors
    path = make_adapter(LLAMA, base, tmp_path / "a", target_modules=[target, "q_proj"])
    report = fuse_checkpoint(base, [adapter(path)], out=tmp_path / "out")
    assert "tie_word_embeddings=false" in report.notes[0]
    model = load(LLAMA, tmp_path / "out")
    # PEFT's merge would change both ends of the tie; its forward pass is what the adapter means
    torch.testing.assert_close(logits(model), logits(peft_model(LLAMA, base, path)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_token_rows_keep_the_tie(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "tied", tie=True)
    path = make_adapter(LLAMA, base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[3, 17])
    fuse_checkpoint(base, [adapter(path)], out=tmp_path / "out")
    model = load(LLAMA, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(peft_model(LLAMA, base, path)), rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weighted_sum_of_several(llama: Path, tmp_path: Path) -> None:
    paths = [
        make_adapter(LLAMA, llama, tmp_path / f"a{i}", i, r=2 + i, target_modules=ATTENTION[: 1 + i]) for i in range(2)
    ]
    adapters, weights = [adapter(p) for p in paths], [0.7, -0.4]
    report = fuse_checkpoint(llama, adapters, weights, tmp_path / "out")
    before, after = load(LLAMA, llama).state_dict(), load(LLAMA, tmp_path / "out").state_dict()
    for name, tensor in before.items():
        truth, plain = tensor.double(), tensor.clone()
        for a, w in zip(adapters, weights, strict=True):
            layer = a.layers.get(name.removesuffix(".weight"))
            if layer is not None:
                truth = truth + w * layer.product(torch.float64)
                plain = plain + w * layer.product()
        if name in report.changed:
            assert (after[name] - truth).abs().max() <= 2 * (plain - truth).abs().max()
        else:
            assert torch.equal(after[name], tensor)


def test_one_rounding_in_bf16_and_untouched_files_bit_identical(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16, shard="10KB")
    path = make_adapter(LLAMA, base, tmp_path / "a", target_modules=["q_proj"])
    small = adapter(path)
    report = fuse_checkpoint(base, [small] * 3, [0.3, 0.3, 0.3], tmp_path / "out")
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert after.config == before.config
    untouched = 0
    for file in before.shards:
        if not {t.name for t in before.shards[file]} & set(report.changed):
            assert (base / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
            untouched += 1
    assert 0 < untouched < len(before.shards)
    for name in report.changed:
        with safe_open(before.tensors[name].path, "pt") as f, safe_open(after.tensors[name].path, "pt") as g:
            truth = f.get_tensor(name).double() + 0.9 * small.layers[name.removesuffix(".weight")].product(
                torch.float64
            )
            # what differs from the rounded truth is what fp32 accumulation moved over a tie
            assert (g.get_tensor(name) != truth.bfloat16()).float().mean() < 0.01


def test_blocks_of_rows_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_fuse.checkpoints.edits as edits

    base = save_gpt2(tmp_path / "gpt2")
    path = make_adapter(GPT2, base, tmp_path / "a", target_modules=["c_attn", "c_proj", "wpe"], use_dora=True)
    fuse_checkpoint(base, [adapter(path)], out=tmp_path / "whole")
    tiles = []

    def small_tiles(tensor, max_bytes=400):
        for tile in read_tiles(tensor, max_bytes):
            tiles.append(tile)
            yield tile

    read_tiles = edits.read_tiles
    monkeypatch.setattr(edits, "read_tiles", small_tiles)
    fuse_checkpoint(base, [adapter(path)], out=tmp_path / "tiled")
    assert len(tiles) > 200
    assert_same_state(load(GPT2, tmp_path / "tiled").state_dict(), load(GPT2, tmp_path / "whole").state_dict())


@pytest.mark.parametrize("size", [5_000, 10**9])
def test_new_shard_size_and_dtype(llama: Path, tmp_path: Path, size: int) -> None:
    path = make_adapter(LLAMA, llama, tmp_path / "a", target_modules=ATTENTION)
    seen: list[tuple[int, int]] = []
    report = fuse_checkpoint(
        llama, [adapter(path)], out=tmp_path / "out", dtype=torch.bfloat16, max_shard_size=size,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    out = open_checkpoint(tmp_path / "out")
    assert {t.dtype for t in out.tensors.values()} == {"BF16"}
    assert out.config["dtype"] == "bfloat16"
    if size == 10**9:
        assert report.files == ("model.safetensors",)
    for shard in out.shards.values():
        assert len(shard) == 1 or sum(t.nbytes for t in shard) <= size
    model, oracle = load(LLAMA, tmp_path / "out", dtype=torch.bfloat16), peft_merged(LLAMA, llama, path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, oracle[name].bfloat16(), rtol=2**-7, atol=1e-6)


def test_stochastic_rounding_is_unbiased_and_seeded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file({"m.weight": torch.ones(64, 64, dtype=torch.bfloat16)}, tmp_path / "base" / "model.safetensors")
    tiny = LoraAdapter({"m": LoraLayer(torch.full((1, 64), 1e-3), torch.ones(64, 1), 1.0)})
    results = {}
    for name, seed in (("nearest", None), ("a", 0), ("b", 0), ("c", 1)):
        options = {} if seed is None else {"rounding": "stochastic", "seed": seed}
        fuse_checkpoint(tmp_path / "base", [tiny], out=tmp_path / name, **options)
        results[name] = load_file(tmp_path / name / "model.safetensors")["m.weight"].double()
    assert (results["nearest"] == 1).all()  # the whole delta is lost: half a step of bf16 at 1 is 0.004
    assert abs(results["a"].mean() - 1.001) < 1e-4
    assert torch.equal(results["a"], results["b"])
    assert not torch.equal(results["a"], results["c"])


@pytest.mark.parametrize("drift", ["missing model.", "extra prefix"])
def test_prefix_drift_is_resolved_and_noted(llama: Path, tmp_path: Path, drift: str) -> None:
    path = make_adapter(LLAMA, llama, tmp_path / "a", target_modules=[*ATTENTION, "lm_head"])
    straight = adapter(path)

    def rename(p: str) -> str:
        return p.removeprefix("model.") if drift == "missing model." else p.replace("model.", "model.language_model.")

    drifted = LoraAdapter({rename(p): layer for p, layer in straight.layers.items()}, source="drifted")
    report = fuse_checkpoint(llama, [drifted], out=tmp_path / "out")
    assert "renamed" in report.notes[0]
    assert_same_state(load(LLAMA, tmp_path / "out").state_dict(), peft_merged(LLAMA, llama, path))


def test_companion_files_are_copied_and_other_weights_are_not(llama: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "model.safetensors").write_bytes(b"dense")
    fuse_checkpoint(
        base, [adapter(make_adapter(LLAMA, llama, tmp_path / "a", target_modules=ATTENTION))], out=tmp_path / "o"
    )
    out = {str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*") if p.is_file()}
    assert {"tokenizer.json", "config.json", "generation_config.json", "2_Dense/model.safetensors"} <= out
    assert "pytorch_model.bin" not in out
