"""kohya's files against the formula that its trainer states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fuse as lf


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 6)])
        self.proj_in = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(3, 5, 3, stride=2)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Attention(), Attention()])


Q, CONV, PROJ = "down_blocks.0.to_q", "down_blocks.1.conv", "down_blocks.0.proj_in"


def _flat(path: str, prefix: str = "lora_unet") -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _pair(path: str, down: tuple[int, ...], up: tuple[int, ...], prefix: str = "lora_unet") -> dict[str, Tensor]:
    name = _flat(path, prefix)
    return {f"{name}.lora_down.weight": torch.randn(down), f"{name}.lora_up.weight": torch.randn(up)}


def _good() -> dict[str, Tensor]:
    return {
        **_pair(Q, (2, 6), (4, 2)),
        f"{_flat(Q)}.alpha": torch.tensor(1.0),
        **_pair("down_blocks.1.to_out.0", (3, 4), (6, 3)),
        **_pair(CONV, (2, 3, 3, 3), (5, 2, 1, 1)),
        f"{_flat(CONV)}.alpha": torch.tensor(4),
        **_pair(PROJ, (2, 3, 1, 1), (6, 2, 1, 1)),
    }


def test_formula(tmp_path: Path) -> None:
    tensors, model = _good(), Unet()
    assert tensors[f"{_flat(CONV)}.alpha"].dtype == torch.int64  # as the trainer writes it
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_network_dim": "2"})
    adapter = lf.load_adapter(tmp_path / "kohya.safetensors", model=model)
    assert sorted(adapter.layers) == sorted([Q, "down_blocks.1.to_out.0", CONV, PROJ])
    for path, scaling in {Q: 0.5, "down_blocks.1.to_out.0": 1.0, CONV: 2.0, PROJ: 1.0}.items():
        down, up = (tensors[f"{_flat(path)}.lora_{end}.weight"] for end in ("down", "up"))
        expected = scaling * torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
        assert adapter.delta(path).shape == model.get_submodule(path).weight.shape
        torch.testing.assert_close(adapter.delta(path).double(), expected, rtol=1e-6, atol=1e-6)
    # a convolution's delta is its two convolutions in a row
    layer, x = adapter.layers[CONV], torch.randn(1, 3, 9, 9)
    both = layer.scaling * nn.functional.conv2d(nn.functional.conv2d(x, layer.lora_a, stride=2), layer.lora_b)
    torch.testing.assert_close(nn.functional.conv2d(x, adapter.delta(CONV), stride=2), both, rtol=1e-5, atol=1e-5)
    adapter.save_pretrained(tmp_path / "peft")
    again = lf.load_adapter(tmp_path / "peft")
    assert all(torch.equal(again.delta(path), adapter.delta(path)) for path in adapter.layers)


def test_linear_trained_as_convolution_and_back() -> None:
    as_conv = _pair(Q, (2, 6, 1, 1), (4, 2, 1, 1)) | _pair(PROJ, (2, 3), (6, 2))
    adapter = lf.load_adapter(as_conv, model=Unet())
    assert {path: layer.kind for path, layer in adapter.layers.items()} == {PROJ: "conv2d", Q: "linear"}
    assert adapter.delta(PROJ).shape == (6, 3, 1, 1)


def test_dora_scale() -> None:
    tensors = _pair(Q, (2, 6), (4, 2)) | {f"{_flat(Q)}.dora_scale": torch.rand(4, 1) + 1}
    model = Unet()
    adapter = lf.load_adapter(tensors, model=model)
    weight = model.get_submodule(Q).weight.detach()
    merged = weight + tensors[f"{_flat(Q)}.lora_up.weight"] @ tensors[f"{_flat(Q)}.lora_down.weight"]
    expected = tensors[f"{_flat(Q)}.dora_scale"] * merged / merged.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(adapter.delta(Q, weight), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"dora_scale: expected one value per output, \(4, 1\), got \(1, 6\)"):
        lf.load_adapter({**tensors, f"{_flat(Q)}.dora_scale": torch.ones(1, 6)}, model=model)


def test_components() -> None:
    class TextModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(6, 4)

    both = _pair(Q, (2, 6), (4, 2)) | _pair("q_proj", (3, 6), (4, 3), "lora_te1")
    with pytest.raises(ValueError, match=r"component: .* has several, choose one of 'lora_te1', 'lora_unet'"):
        lf.load_adapter(both, model=Unet())
    with pytest.raises(ValueError, match=r"has no 'te2', choose one of 'lora_te1', 'lora_unet'"):
        lf.load_adapter(both, model=Unet(), component="te2")
    assert list(lf.load_adapter(both, model=Unet(), component="unet").layers) == [Q]
    assert list(lf.load_adapter(both, model=TextModel(), component="lora_te1").layers) == ["q_proj"]


def test_dotted_names_need_no_model() -> None:
    tensors = {"blocks.0.q.lora_down.weight": torch.ones(2, 6), "blocks.0.q.lora_up.weight": torch.ones(4, 2)}
    assert lf.load_adapter(tensors).delta("blocks.0.q").shape == (4, 6)
    prefixed = {f"diffusion_model.{key}": t for key, t in tensors.items()}
    assert list(lf.load_adapter(prefixed, component="diffusion_model").layers) == ["blocks.0.q"]


def test_model_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model: .*underscores .*lora_unet_down_blocks_0_to_q.* pass model="):
        lf.load_adapter(_pair(Q, (2, 6), (4, 2)))


def test_conv1d_weights_lie_transposed() -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    adapter = lf.load_adapter(
        _pair("c.attn", (2, 6), (4, 2)), model=nn.ModuleDict({"c": nn.ModuleDict({"attn": conv1d(4, 6)})})
    )
    assert adapter.delta("c.attn").shape == (4, 6)


def test_collision() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(6, 4), "a": nn.ModuleDict({"b": nn.Linear(6, 4)})})
    with pytest.raises(ValueError, match=r"lora_unet_a_b: may mean any of a_b, a\.b"):
        lf.load_adapter(_pair("a.b", (2, 6), (4, 2)), model=model)


def test_other_model() -> None:
    tensors = _pair(Q, (2, 6), (4, 2)) | _pair("input_blocks.4.q", (2, 6), (4, 2))
    with pytest.raises(ValueError, match=r"lora_unet_input_blocks_4_q: the model has no such module"):
        lf.load_adapter(tensors, model=Unet())
    with pytest.warns(UserWarning, match="the model has no such module"):
        assert list(lf.load_adapter(tensors, model=Unet(), strict=False).layers) == [Q]
    with pytest.raises(
        ValueError, match=r"down_blocks\.0\.to_q: made for a weight of \(4, 7\), the model's is \(4, 6\)"
    ):
        lf.load_adapter(_pair(Q, (2, 7), (4, 2)), model=Unet())


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("hada_w1_a", "LoHa"),
        ("hada_t1", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_diag", "OFT"),
        ("diff", "full differences"),
        ("diff_b", "full differences"),
        ("lora_mid.weight", r"Tucker \(CP\)"),
        ("on_input", "IA3"),
        ("a1.weight", "GLoRA"),
        ("w_norm", "trained norms"),
    ],
)
def test_lycoris_is_refused_by_name(end: str, name: str) -> None:
    tensors = _pair(Q, (2, 6), (4, 2)) | {f"{_flat(Q)}.{end}": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=rf"{end}: LyCORIS {name}"):
        lf.load_adapter(tensors, model=Unet())
    with pytest.raises(ValueError, match=rf"{end}: LyCORIS {name}"):
        lf.load_adapter({f"lycoris_x.{end}": torch.ones(2, 2)}, model=Unet(), format="kohya")


def test_peft_modules_with_such_names_are_not_lycoris() -> None:
    tensors = {
        "a1.diff.lora_A.weight": torch.ones(2, 6),
        "a1.diff.lora_B.weight": torch.ones(4, 2),
        "a1.weight": torch.ones(3),
    }
    adapter = lf.load_adapter(tensors, config={"peft_type": "LORA", "r": 2, "modules_to_save": ["a1"]})
    assert (list(adapter.layers), list(adapter.modules_to_save)) == (["a1.diff"], ["a1"])
    dotted = {"a1.q.lora_down.weight": torch.ones(2, 6), "a1.q.lora_up.weight": torch.ones(4, 2)}
    assert list(lf.load_adapter(dotted).layers) == ["a1.q"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_down.weight": torch.full((2, 6), float("nan"))}, r"lora_down\.weight: contains NaN"),
        ({"lora_down.weight": torch.ones(3, 6)}, "the factors do not share a rank"),
        ({"lora_down.weight": None}, "lora_a is missing"),
        ({"alpha": torch.ones(3)}, r"alpha: expected a single number, got shape \(3,\)"),
        ({"alpha": torch.tensor(float("inf"))}, r"alpha: contains inf"),
        ({"mystery": torch.ones(3)}, "mystery: unexpected tensor"),
    ],
)
def test_broken_tensors(change: dict[str, Tensor | None], message: str) -> None:
    tensors = _pair(Q, (2, 6), (4, 2))
    for end, tensor in change.items():
        tensors.pop(f"{_flat(Q)}.{end}", None)
        if tensor is not None:
            tensors[f"{_flat(Q)}.{end}"] = tensor
    with pytest.raises(ValueError, match=message):
        lf.load_adapter(tensors, model=Unet())
