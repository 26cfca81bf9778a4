"""extract: near-optimal factors of what changed, a report of what did not fit, files that PEFT loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.cli import main
from lora_fuse.compress import extract_plan


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.norm = nn.LayerNorm(24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.head = nn.Linear(24, 5)


def _tuned(base: nn.Module, scale: float = 0.1, frozen: tuple[str, ...] = ("blocks.1.up",)) -> Any:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if not name.startswith(frozen):
                p += scale * torch.randn_like(p)
    return tuned


@pytest.fixture
def pair() -> tuple[Model, Model]:
    base = Model()
    return base, _tuned(base)


def _difference(base: nn.Module, tuned: nn.Module, path: str) -> Tensor:
    return (tuned.get_submodule(path).weight - base.get_submodule(path).weight).detach().double()  # type: ignore[operator]


def _optimal(difference: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(difference.flatten(1))[rank:].norm())


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_layers_are_factored_near_the_optimum(pair: tuple[Model, Model], rank: int) -> None:
    base, tuned = pair
    adapter = lf.extract(base, tuned, rank=rank)
    assert set(adapter.layers) == {"blocks.0.up", "blocks.0.down", "blocks.1.down", "conv", "head"}
    for path, layer in adapter.layers.items():
        difference = _difference(base, tuned, path)
        assert layer.kind == ("conv2d" if path == "conv" else "linear")
        assert layer.rank == min(rank, *difference.flatten(1).shape)
        error = float((adapter.delta(path).double() - difference).norm())
        floor = 1e-6 * float(difference.norm())
        assert error <= _optimal(difference, rank) * 1.001 + floor
        report = adapter.report.layers[path]
        assert report.squared_norm == pytest.approx(float(difference.norm() ** 2), rel=1e-5)
        assert report.squared_error == pytest.approx(error**2, rel=1e-3, abs=1e-10 * report.squared_norm)
    assert adapter.report.energy > (0.99999 if rank == 64 else 0.1)


def test_what_changed_besides_is_listed(pair: tuple[Model, Model]) -> None:
    base, tuned = pair
    report = lf.extract(base, tuned, rank=2).report
    assert set(report.uncovered) == {
        "embed.weight", "norm.weight", "norm.bias", "blocks.0.up.bias", "blocks.0.down.bias", "blocks.1.down.bias",
        "conv.bias", "grouped.weight", "grouped.bias", "head.bias",
    }  # fmt: skip
    assert report.unchanged == 2  # blocks.1.up
    left = report.uncovered["norm.bias"]
    assert left.reason == "one-dimensional"
    assert left.squared_norm == pytest.approx(float((tuned.norm.bias - base.norm.bias).detach().norm() ** 2), rel=1e-5)
    assert report.uncovered["grouped.weight"].reason == "a grouped convolution"
    text = str(report)
    assert "5 layers, rank 2, energy kept" in text
    assert all(name in text for name in report.uncovered)


def test_targets_and_modules_to_save(pair: tuple[Model, Model]) -> None:
    base, tuned = pair
    adapter = lf.extract(base, tuned, rank=3, targets=["up", "embed"], modules_to_save=["head", "norm"])
    assert set(adapter.layers) == {"blocks.0.up", "embed"}
    assert adapter.layers["embed"].kind == "embedding"
    difference = _difference(base, tuned, "embed")
    error = (adapter.delta("embed").double() - difference).norm()
    assert error <= _optimal(difference, 3) * 1.001
    assert set(adapter.modules_to_save) == {"head", "norm"}
    for name, t in adapter.modules_to_save["head"].items():
        assert torch.equal(t, getattr(tuned.head, name))
    assert adapter.report.uncovered["blocks.0.down.weight"].reason == "not in targets"
    assert adapter.report.saved == ("norm", "head")
    by_regex = lf.extract(base, tuned, rank=3, targets=r"blocks\.\d\.down")
    assert set(by_regex.layers) == {"blocks.0.down", "blocks.1.down"}
    assert set(lf.extract(base, tuned, targets="all-linear").layers) == set(lf.extract(base, tuned).layers)


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_energy(pair: tuple[Model, Model], energy: float) -> None:
    base, tuned = pair
    adapter = lf.extract(base, tuned, energy=energy)
    for path, layer in adapter.layers.items():
        squares = torch.linalg.svdvals(_difference(base, tuned, path).flatten(1)).square()
        assert layer.rank == int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        assert adapter.report.layers[path].energy >= energy


@pytest.mark.parametrize("kind", ["state dict", "file", "folder"])
def test_sources_without_modules(pair: tuple[Model, Model], kind: str, tmp_path: Path) -> None:
    states = [{k: v.detach() for k, v in m.state_dict().items()} for m in pair]
    sources: list[Any] = states
    if kind != "state dict":
        for name, state in zip(("base", "tuned"), states, strict=True):
            (tmp_path / name).mkdir()
            save_file(state, tmp_path / name / "model.safetensors")
        sources = [tmp_path / n / ("model.safetensors" if kind == "file" else "") for n in ("base", "tuned")]
    adapter, same = lf.extract(*sources, rank=4), lf.extract(*pair, rank=4)
    assert set(adapter.layers) == set(same.layers) - {"conv"}  # without a module, a convolution has to be named
    assert adapter.report.uncovered["conv.weight"].reason == "looks like a convolution; name it in targets"
    for path, layer in adapter.layers.items():
        assert all(torch.equal(x, y) for x, y in zip(layer.tensors(), same.layers[path].tensors(), strict=True))
    named = lf.extract(*sources, rank=4, targets=["conv"])
    assert torch.equal(named.layers["conv"].lora_a, same.layers["conv"].lora_a)


def test_sixteen_bits_and_mixed_dtypes(pair: tuple[Model, Model]) -> None:
    base, tuned = pair
    low = {k: v.detach().bfloat16() for k, v in base.state_dict().items()}
    adapter = lf.extract(low, tuned, rank=64, dtype=torch.float16)
    layer = adapter.layers["blocks.1.down"]
    assert layer.lora_a.dtype == torch.float16
    exact = tuned.blocks[1]["down"].weight.detach().double() - low["blocks.1.down.weight"].double()  # type: ignore[index]
    assert (layer.product().double() - exact).norm() < 2e-3 * exact.norm()


def test_equal_seeds_equal_bits(pair: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = nn.Linear(300, 400), nn.Linear(300, 400)
    state = torch.get_rng_state()
    models = [nn.ModuleDict({"x": m}) for m in (base, tuned)]
    first, again, other = (lf.extract(*models, rank=8, seed=s).layers["x"].lora_a for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights() -> None:
    base = nn.ModuleDict(
        {"embed": nn.Embedding(50, 24), "mid": nn.Linear(24, 24), "head": nn.Linear(24, 50, bias=False)}
    )
    base["head"].weight = base["embed"].weight
    tuned = _tuned(base)
    report = lf.extract(base, tuned, rank=4).report
    assert set(report.layers) == {"mid"}
    assert report.uncovered["embed.weight"].reason == "tied to head.weight"
    assert "head.weight" not in report.uncovered  # the same tensor
    untied = copy.deepcopy(tuned)
    untied["head"].weight = nn.Parameter(tuned["head"].weight + 1.0)
    named = lf.extract(base, untied, rank=24, targets=["head"])
    want = (untied["head"].weight - base["embed"].weight).detach()
    torch.testing.assert_close(named.delta("head"), want, rtol=0, atol=1e-5)


def test_prefix_and_head_only_in_the_finetune(pair: tuple[Model, Model]) -> None:
    base, tuned = pair
    whole = nn.ModuleDict({"encoder": tuned, "score": nn.Linear(24, 2)})
    adapter = lf.extract(base, whole, rank=2, prefix="encoder.")
    assert "encoder.blocks.0.up" in adapter.layers
    assert adapter.report.uncovered["score.weight"].squared_norm is None
    saved = lf.extract(base, whole, rank=2, prefix="encoder.", modules_to_save=["score"])
    assert torch.equal(saved.modules_to_save["score"]["weight"], whole["score"].weight)
    with pytest.raises(ValueError, match=r"finetuned: lacks .* give prefix='encoder\.'"):
        lf.extract(base, whole)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("conv1d", [False, True])
def test_peft_loads_what_is_saved(pair: tuple[Model, Model], conv1d: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if conv1d:
        from transformers import GPT2Config, GPT2Model

        base = GPT2Model(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, n_positions=8))
        tuned = _tuned(base, frozen=())
        options: dict[str, Any] = {"modules_to_save": ["ln_f"]}
    else:
        base, tuned = pair  # type: ignore[assignment]
        options = {"modules_to_save": ["head"], "targets": ["up", "down", "conv", "embed"]}
    adapter = lf.extract(base, tuned, rank=100, **options)
    adapter.save_pretrained(tmp_path / "a")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).merge_and_unload()
    wanted, got = dict(tuned.named_parameters()), dict(merged.named_parameters())
    assert len(adapter.layers) == (8 if conv1d else 5)
    for name in wanted:
        covered = name.rpartition(".")[0] in adapter.layers and name.endswith(".weight")
        exact = covered or name.startswith(("ln_f", "head"))
        want = wanted[name] if exact else before[name]
        torch.testing.assert_close(got[name], want, rtol=0, atol=2e-6 if exact else 0, msg=name)
    again = lf.load_adapter(tmp_path / "a")
    assert set(again.layers) == set(adapter.layers)


def test_conv1d_folders_are_read_by_their_config(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    base = GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=8))
    tuned = _tuned(base, frozen=())
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    adapter, same = lf.extract(tmp_path / "base", tmp_path / "tuned", rank=4), lf.extract(base, tuned, rank=4)
    assert set(adapter.layers) == set(same.layers)
    for path, layer in same.layers.items():
        assert torch.equal(adapter.layers[path].lora_a, layer.lora_a)
    assert adapter.config["fan_in_fan_out"] is True
    assert adapter.config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("name", ["wte", "model.embed_tokens", "bert.embeddings.position_embeddings", "shared"])
def test_embeddings_are_known_by_name(name: str) -> None:
    assert extract_plan._kind(name, (30, 8), None, lambda path: False) == ("embedding", True)
    assert extract_plan._kind("embed_out", (30, 8), None, lambda path: False) == ("linear", False)


def test_cli(pair: tuple[Model, Model], tmp_path: Path) -> None:
    for name, model in zip(("base", "tuned"), pair, strict=True):
        save_file({k: v.detach() for k, v in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    out = tmp_path / "out"
    run = CliRunner().invoke(main, ["extract", *paths, "--rank", "3", "--modules-to-save", "head", "-o", str(out)])
    assert run.exit_code == 0, run.output
    adapter = lf.load_adapter(out)
    assert {layer.rank for layer in adapter.layers.values()} == {3}
    assert torch.equal(adapter.modules_to_save["head"]["weight"], pair[1].head.weight)
    assert "2 x down" in run.stdout
    assert "Changed, but not in the adapter: 10 tensors" in run.stderr
    assert "an embedding; name it in targets: embed.weight" in run.stderr
    run = CliRunner().invoke(
        main, ["extract", *paths, "--energy", "0.9", "--dtype", "bf16", "--targets", "up", "-o", str(out)]
    )
    assert run.exit_code != 0  # not without --overwrite
    run = CliRunner().invoke(
        main,
        ["extract", *paths, "--energy", "0.9", "--dtype", "bf16", "--targets", "up", "-o", str(out), "--overwrite"],
    )
    assert run.exit_code == 0, run.output
    assert set(lf.load_adapter(out).layers) == {"blocks.0.up"}
    run = CliRunner().invoke(main, ["extract", paths[0], paths[0], "-o", str(tmp_path / "none")])
    assert run.exit_code != 0
    assert "differs from the base" in run.output
    assert not (tmp_path / "none").exists()


BASE = {"a.weight": torch.zeros(6, 4), "a.bias": torch.zeros(6), "b.weight": torch.zeros(3, 3)}
TUNED = {name: t + torch.randn_like(t) for name, t in BASE.items()}


@pytest.mark.parametrize(
    ("tuned", "kwargs", "message"),
    [
        (TUNED, {"rank": 0}, "rank: expected an integer"),
        (TUNED, {"rank": 4, "energy": 0.5}, "one of the two"),
        (TUNED, {"energy": 1.5}, "energy: expected"),
        (TUNED, {"dtype": torch.int8}, "dtype: expected one of"),
        (TUNED, {"targets": ["c"]}, r"targets: \['c'\] matches no weight"),
        (TUNED, {"targets": "("}, "is no regex"),
        (TUNED, {"modules_to_save": ["c"]}, "modules_to_save: .* matches no module"),
        (TUNED, {"tolerance": 0.0}, "tolerance: expected"),
        (BASE, {}, "no weight that an adapter can hold differs from the base$"),
        (BASE | {"a.bias": torch.ones(6)}, {}, "changed, but not covered: a.bias"),
        ({"a.weight": TUNED["a.weight"]}, {}, "lacks 'a.bias', 'b.weight' of the base; is it a fine-tune of another"),
        (TUNED | {"b.weight": torch.ones(4, 3)}, {}, r"'b.weight' has shape \[4, 3\], the base's is \[3, 3\]"),
        (TUNED | {"a.weight": torch.full((6, 4), torch.nan)}, {}, "finetuned: 'a.weight' has NaN or infinite"),
        (TUNED | {"a.weight": torch.full((6, 4), 1e14)}, {"dtype": torch.float16}, "layer 'a': the factors overflow"),
        (TUNED | {"a.weight": torch.empty(6, 4, device="meta")}, {}, "finetuned: 'a.weight' is on the meta device"),
    ],
)  # fmt: skip
def test_bad_input(tuned: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lf.extract(BASE, tuned, **kwargs)


def test_wrong_types() -> None:
    for args, kwargs in (((3, TUNED), {}), ((BASE, TUNED), {"targets": [1]}), ((BASE, TUNED), {"prefix": 1})):
        with pytest.raises(TypeError):
            lf.extract(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"targets": 5}, TypeError, "targets: expected a regex or a list of names, got 5"),
        ({"targets": "("}, ValueError, "targets: '\\(' is no regex"),
        ({"modules_to_save": 3}, TypeError, "modules_to_save: expected a regex or a list of names, got 3"),
        ({"energy": "x"}, TypeError, "energy: expected 0 < energy <= 1, got 'x'"),
        ({"tolerance": "x"}, TypeError, "tolerance: expected 0 < tolerance < 1, got 'x'"),
    ],
)
def test_wrong_types_name_the_argument(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    base = {"lin.weight": torch.zeros(3, 4)}
    with pytest.raises(error, match=message):
        lf.extract(base, {"lin.weight": torch.ones(3, 4)}, **kwargs)
