"""Rows of sparse adapters in mixed batches: what every row's whole fine-tune would make of it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import nn_models
import pytest
import torch
from sparse_models import Flat, fine_tuned, materialised, mixture, model_of, sparse_adapter
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.nn import warmup
from lora_fuse.nn.sparse_site import SparseSite

KINDS = ("tokens", "images")
ENTRIES = ["t0", None, "t1", "lora", "t2", None, "t0"]
LORA_LAYERS = {"tokens": ["up", "down"], "images": ["out"]}


def prepared(kind: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The merged model, a batch, and three sparse adapters beside a LoRA adapter."""
    model, x = model_of(kind)
    model = model.to(dtype)
    adapters: dict[str, Any] = {f"t{i}": sparse_adapter(model, fine_tuned(model, i), **kwargs) for i in range(3)}
    adapters["lora"] = nn_models.adapter(model, LORA_LAYERS[kind], 4).to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x, adapters


def rows_of(model: nn.Module, adapters: dict[str, Any], entries: list[Any], x: Tensor) -> Tensor:
    """Every sample through a model that is its entry's."""
    lora = {name: a for name, a in adapters.items() if isinstance(a, lf.LoraAdapter)}
    made: list[Tensor] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            own = mixture(model, {adapters[n]: w for n, w in entry.items() if n not in lora})
            own = nn_models.adapted_copy(own, lora, {n: w for n, w in entry.items() if n in lora})
        elif entry in lora or entry is None:
            own = nn_models.adapted_copy(model, lora, entry)
        else:
            own = materialised(model, adapters[entry])
        made.append(own(x[i : i + 1]))
    return torch.cat(made)


def assert_close(got: Tensor, model: nn.Module, adapters: dict[str, Any], entries: list[Any], x: Tensor) -> None:
    """At most twice the error that the fine-tunes themselves have in this dtype, against an fp64 truth."""
    with torch.no_grad():
        theirs = rows_of(model, adapters, entries, x)
        wide = copy.deepcopy(model).double()
        wide_adapters = {n: a.to(torch.float64) if isinstance(a, lf.LoraAdapter) else a for n, a in adapters.items()}
        sparse = {n: a for n, a in adapters.items() if not isinstance(a, lf.LoraAdapter)}
        owns = {n: materialised(model, a).double() for n, a in sparse.items()}
        made = []
        for i, entry in enumerate(entries):
            pairs = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
            own = copy.deepcopy(wide)
            for name, p in own.state_dict().items():
                for n, w in pairs.items():
                    if n in owns:
                        p += w * (owns[n].state_dict()[name] - wide.state_dict()[name])
            lora = {n: w for n, w in pairs.items() if n not in owns}
            own = nn_models.adapted_copy(own, wide_adapters, lora)
            made.append(own(x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]))
        truth = torch.cat(made)
    floor = 2 * torch.finfo(got.dtype).eps * float(truth.abs().max())
    assert float((got - truth).abs().max()) <= 2 * float((theirs - truth).abs().max()) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch(kind: str, dtype: torch.dtype) -> None:
    model, x, adapters = prepared(kind, dtype)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        base = bare(x)
        lora_only = lf.attach(copy.deepcopy(bare), {"lora": adapters["lora"]})
        with lf.use_adapters(lora_only, ["lora" if e == "lora" else None for e in ENTRIES]):
            lora = lora_only(x)
        lf.attach(model, adapters)
        assert torch.equal(model(x), base)
        with lf.use_adapters(model, ENTRIES):
            got = model(x)
    assert_close(got, bare, adapters, ENTRIES, x)
    for i, entry in enumerate(ENTRIES):
        if entry is None:
            assert torch.equal(got[i], base[i])
        elif entry == "lora":
            assert torch.equal(got[i], lora[i])
        else:
            assert not torch.allclose(got[i].float(), base[i].float(), atol=0.03)  # it does something


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    model, x, adapters = prepared(kind)
    lf.attach(model, adapters)
    mixed = [{"t0": 0.5, "t1": 1.0}, *ENTRIES[1:]]
    with torch.no_grad():
        with lf.use_adapters(model, mixed):
            together = model(x)
        with lf.use_adapters(model, mixed[::-1]):
            assert torch.equal(model(x.flip(0)).flip(0), together)
        with lf.use_adapters(model, ENTRIES):
            without_mix = model(x)
    assert torch.equal(without_mix[1:], together[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entry",
    [{"t0": 1.0}, {"t0": 0.5, "t1": -0.25}, {"lora": 0.5, "t1": 1.0}, {"t0": 0.7, "lora": 1.0, "t2": 0.3}, {"t1": 0.0}],
    ids=str,
)
def test_weighted_mixes_add_weighted_differences(kind: str, entry: dict[str, float]) -> None:
    model, x, adapters = prepared(kind)
    bare = copy.deepcopy(model)
    lf.attach(model, adapters)
    entries = [entry, None, "t1", entry, "lora", entry, "t2"]
    with torch.no_grad(), lf.use_adapters(model, entries):
        got = model(x)
    assert_close(got, bare, adapters, entries, x)
    assert torch.equal(got[1], bare(x)[1])
    with torch.no_grad(), lf.use_adapters(model, entry):
        assert_close(model(x), bare, adapters, [entry] * len(x), x)


def test_a_slot_per_token() -> None:
    """A model of rows only; and one whose position embeddings are looked up once for all samples."""
    model, x, adapters = prepared("tokens")
    bare = copy.deepcopy(model)
    lf.attach(model, adapters)
    slots = {**lf.adapter_slots(model), None: -1}
    tokens = torch.tensor([slots[e] for e in ENTRIES], dtype=torch.int32).repeat_interleave(x.shape[1])
    body = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 6)).eval()
    own = {"a": sparse_adapter(body, fine_tuned(body, 5))}
    plain, rows = copy.deepcopy(body), torch.randn(5, 24)
    lf.attach(body, own)
    slot = lf.adapter_slots(body)["a"]
    with torch.no_grad():
        with lf.use_adapters(body, torch.tensor([slot, -1, slot, -1, -1], dtype=torch.int32)):
            got = body(rows)
        torch.testing.assert_close(got[[0, 2]], materialised(plain, own["a"])(rows)[[0, 2]])
        assert torch.equal(got[[1, 3, 4]], plain(rows)[[1, 3, 4]])
        embedded: list[Tensor] = []
        for m in (model, bare):
            m.norm.register_forward_hook(lambda module, args, out: embedded.append(out))
        with lf.use_adapters(model, tokens), pytest.raises(ValueError, match="7 rows"):
            model(x)  # the head sees one row per sample
        bare(x)
        with lf.use_adapters(model, ENTRIES):
            model(x)
    by_token, base, by_sample = embedded
    assert torch.equal(by_token, by_sample)
    assert torch.equal(by_token[1], base[1])


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_runs_sparse_slots(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every distinct kind of layer with sparse products once per batch size, in slots that hold something."""
    seen: list[tuple[int, int, int, list[int]]] = []

    def counted(x: Tensor, pool: Any, routing: Any, out: Tensor) -> Tensor:
        used = [slot for slot, n in enumerate(routing.segment_starts.diff().tolist()) if n]
        assert all(pool.packed[slot] is not None for slot in used)
        seen.append((x.shape[0], x.shape[1], out.shape[1], used))
        return sparse_delta_linear(x, pool, routing, out=out)

    monkeypatch.setattr(warmup, "sparse_delta_linear", counted)
    model, x, adapters = prepared(kind)
    sparse = {name: a for name, a in adapters.items() if name != "lora"}
    lf.attach(model, sparse, num_slots=6, max_rank=4)
    slots = sorted(lf.adapter_slots(model).values())
    sizes = {"tokens": [(24, 40), (40, 24), (24, 6)], "images": [(27, 8), (8, 12), (12, 5)]}[kind]
    assert lf.warmup(model, num_tokens=(0, 1, 7)) == 3
    assert seen == [(n, *size, slots[: min(n, 3)]) for size in sizes for n in (0, 1, 7)]
    lf.add_adapter(model, "lora", adapters["lora"])
    assert lf.warmup(model) == 3 + len(LORA_LAYERS[kind])
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        assert_close(model(x), model_of(kind)[0], adapters, ENTRIES, x)
    for name in adapters:
        lf.remove_adapter(model, name)
    assert lf.warmup(model) == len(LORA_LAYERS[kind])


def test_positions_that_could_be_samples_are_refused() -> None:
    bare = Flat()
    adapter = sparse_adapter(bare, fine_tuned(bare, 0))
    model, own = lf.attach(copy.deepcopy(bare), {"t": adapter}), materialised(bare, adapter)
    with lf.use_adapters(model, ["t", None, "t"]):
        ids = torch.randint(9, (3, 5))
        assert torch.equal(model(ids)[[0, 2]], own(ids)[[0, 2]])
        assert torch.equal(model(ids)[1], bare(ids)[1])
        with pytest.raises(ValueError, match="places: cannot tell whether its 3 ids are one per sample"):
            model(torch.randint(9, (3, 3)))


def test_norms_and_embeddings_have_the_bits_of_the_fine_tune() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm, self.rms = nn.Embedding(40, 65), nn.LayerNorm((5, 65)), nn.RMSNorm(65)

        def forward(self, ids: Tensor) -> Tensor:
            return self.rms(self.norm(self.words(ids)))

    bare, ids = Rows(), torch.randint(40, (4, 5))
    for density, dense in ((0.02, []), (0.4, []), (0.4, ["words.*"])):  # columns, a bitmap, all of it
        adapters = {f"t{i}": sparse_adapter(bare, fine_tuned(bare, i), density, dense=dense) for i in range(2)}
        model = lf.attach(copy.deepcopy(bare), adapters)
        with torch.no_grad(), lf.use_adapters(model, ["t0", "t1", None, "t0"]):
            got = model(ids)
        for i, own in enumerate([materialised(bare, a) for a in (adapters["t0"], adapters["t1"])]):
            assert torch.equal(got[i], own(ids)[i])
        assert torch.equal(got[2], bare(ids)[2])


def test_heads_of_several_widths() -> None:
    model, x = model_of("tokens")
    bare, adapters = copy.deepcopy(model), {}
    for i, width in enumerate((6, 4, 9)):
        tuned = fine_tuned(model, i)
        tuned.head = nn.Linear(24, width)
        adapters[f"t{i}"] = sparse_adapter(model, tuned, heads=["head.*"])
    lf.attach(model, adapters)
    assert lf.head_sizes(model) == {"head": {None: 6, "t0": 6, "t1": 4, "t2": 9}}
    entries = ["t0", None, "t1", "t2", "t2", None, "t1"]
    with torch.no_grad():
        with lf.use_adapters(model, entries):
            got = model(x)
        for i, entry in enumerate(entries):
            want = bare(x)[i] if entry is None else materialised(bare, adapters[entry])(x)[i]
            torch.testing.assert_close(got[i, : len(want)], want, rtol=1e-5, atol=1e-6)
            assert bool((got[i, len(want) :] == -torch.inf).all())
            assert entry is not None or torch.equal(got[i, :6], want)
        with (
            pytest.raises(ValueError, match="one adapter with a head of its own"),
            lf.use_adapters(model, {"t0": 0.5, "t1": 0.5}),
        ):
            model(x)


def test_a_weight_kept_whole_and_a_head_with_a_shared_bias() -> None:
    model, x = model_of("tokens")
    tuned = fine_tuned(model, 1)
    adapter = sparse_adapter(model, tuned, heads=["head.weight"], dense=["up.weight", "words.weight"])
    bare = copy.deepcopy(model)
    lf.attach(model, {"t": adapter})
    with torch.no_grad(), lf.use_adapters(model, ["t"] * 6 + [None]):
        got = model(x)
        torch.testing.assert_close(got[:6], materialised(bare, adapter)(x)[:6], rtol=1e-5, atol=1e-6)
        assert torch.equal(got[6], bare(x)[6])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_with_respect_to_the_input(kind: str) -> None:
    model, x, adapters = prepared(kind)
    bare, place = copy.deepcopy(model), {"tokens": "norm", "images": "stem"}[kind]
    lf.attach(model, adapters)

    def grad(m: nn.Module, x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def watch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            found.append(args[0].detach().requires_grad_())
            return (found[-1],)

        with m.get_submodule(place).register_forward_pre_hook(watch):
            out = m(x)
        return torch.autograd.grad(out.square().sum(), found[-1])[0]

    with lf.use_adapters(model, ENTRIES):
        got = grad(model, x)
    for i, entry in enumerate(ENTRIES):
        one = x[i : i + 1]
        if entry == "lora":
            with lf.use_adapters(model, "lora"):
                want = grad(model, one)
        else:
            want = grad(bare if entry is None else materialised(bare, adapters[entry]), one)
        # The embedded input is the fine-tune's own, so only the part after it is compared.
        if kind == "images":
            torch.testing.assert_close(got[i], want[0], rtol=1e-4, atol=1e-6)
        assert torch.isfinite(got[i]).all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own RMSNorm says so
def test_autocast() -> None:
    model, x, adapters = prepared("tokens")
    bare = copy.deepcopy(model)
    lf.attach(model, adapters)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), lf.use_adapters(model, ENTRIES):
        got = model(x)
        for i, entry in enumerate(ENTRIES):
            if entry in ("t0", "t1", "t2"):
                want = materialised(bare, adapters[entry])(x)[i]
                torch.testing.assert_close(got[i], want, rtol=0.05, atol=0.05)
            elif entry is None:
                assert torch.equal(got[i], bare(x)[i])


def test_copies_serve_on_their_own() -> None:
    model, x, adapters = prepared("tokens")
    lf.attach(model, adapters)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        want = model(x)
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        lf.swap_adapter(twin, "t0", adapters["t1"])
        lf.remove_adapter(twin, "t2")
        with torch.no_grad():
            with lf.use_adapters(twin, ["t0" if e == "t1" else None for e in ENTRIES]):
                torch.testing.assert_close(twin(x)[2], want[2])
            with lf.use_adapters(model, ENTRIES):
                assert torch.equal(model(x), want)
    assert set(model.state_dict()) == set(model_of("tokens")[0].state_dict())


def test_a_cast_after_attach() -> None:
    model, x, adapters = prepared("tokens")
    bare = copy.deepcopy(model).bfloat16()
    owns = {n: materialised(model_of("tokens")[0], adapters[n]).bfloat16() for n in ("t0", "t1", "t2")}
    lf.attach(model, adapters).bfloat16()
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        got = model(x)
    for i, entry in enumerate(ENTRIES):
        if entry in owns:
            torch.testing.assert_close(got[i], owns[entry](x)[i], rtol=0.05, atol=0.03)
        elif entry is None:
            assert torch.equal(got[i], bare(x)[i])


def test_lora_and_sparse_slots_come_and_go_on_one_layer() -> None:
    model, x, adapters = prepared("tokens")
    bare, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    sparse = {n: a for n, a in adapters.items() if n != "lora"}
    orders: list[list[str]] = [["t0", "lora", "t1", "t2"], ["lora", "t0", "t1", "t2"]]
    for order in orders:
        lf.attach(model, {order[0]: adapters[order[0]]}, max_rank=4)
        for name in order[1:]:
            lf.add_adapter(model, name, adapters[name])
        assert isinstance(model.up, SparseSite)
        assert "lora_pool" in model.up._modules
        with torch.no_grad(), lf.use_adapters(model, ENTRIES):
            assert_close(model(x), bare, adapters, ENTRIES, x)
        info = lf.adapters(model)["t1"]
        assert (info.rank, info.density) == (0, 0.2)
        assert "norm" in info.layers
        assert info.nbytes == sparse["t1"].nbytes
        lf.remove_adapter(model, "t1")
        lf.swap_adapter(model, "t0", adapters["t2"])
        with torch.no_grad(), lf.use_adapters(model, ["t2", "t0", None, *["t2"] * 4]):
            got = model(x)
            torch.testing.assert_close(got[1], materialised(bare, adapters["t2"])(x)[1], rtol=1e-5, atol=1e-6)
            assert torch.equal(got[2], bare(x)[2])
        assert len(model.up.lora_sparse.filled) == 2  # what nobody can select is freed
        for name in ("t0", "t2", "lora"):
            lf.remove_adapter(model, name)
        assert torch.equal(model(x), bare(x))
        assert not model.up.lora_sparse.filled
        lf.detach(model)
        assert [type(m) for m in model.modules()] == classes
        assert not any("lora" in key for m in model.modules() for key in m.__dict__)


def test_layers_without_sparse_slots_keep_their_class() -> None:
    model, _, adapters = prepared("tokens")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.words.weight += 1.0
    lf.attach(model, {"t": sparse_adapter(model, tuned, dense=["*"]), "lora": adapters["lora"]})
    assert type(model.words).__name__ == "SparseEmbedding"
    assert type(model.up).__name__ == "MultiLoRALinear"
    assert type(model.norm) is nn.LayerNorm
    assert type(model.head) is nn.Linear
