"""peru_fft on state dicts and modules: against plain torch in fp64, bit for bit where nothing is lost."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from peru_models import PRUNED, Net, assert_same, bits, make, tuned, wide
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.sparse_adapter import fingerprint
from lora_fuse.merging import full


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def nets(request: pytest.FixtureRequest) -> tuple[Net, dict[str, Net]]:
    base = make(dtype=request.param)
    return base, {"sql": tuned(base, 1), "math": tuned(base, 2), "chat": tuned(base, 3)}


def reference_merge(base: dict[str, Tensor], tasks: list[dict[str, Tensor]], merge: str, scaling: float) -> Any:
    if merge == "average":
        return {n: torch.stack([t[n] for t in tasks]).mean(0) for n in base}
    if merge == "task_arithmetic":
        return {n: w + scaling * torch.stack([t[n] - w for t in tasks]).sum(0) for n, w in base.items()}
    names = [n for n in base if n != "out.weight"]
    flat = torch.stack([torch.cat([(t[n] - base[n]).flatten() for n in names]) for t in tasks])
    k = int(0.2 * flat.shape[1])
    for row in flat:
        order = row.float().abs().argsort(descending=True, stable=True)
        row[order[k:]] = 0
    sign = flat.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = torch.where(flat.sign() == sign, flat, 0)
    mean = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    parts = mean.split([base[n].numel() for n in names])
    merged = {n: base[n] + scaling * part.view_as(base[n]) for n, part in zip(names, parts, strict=True)}
    return merged | {"out.weight": merged["emb.weight"]}


def reference_kept(own: list[Tensor], merged: list[Tensor], density: float, scope: str) -> list[Tensor]:
    """Masks by a stable sort of the fp32 magnitudes (fp64 for fp64)."""
    keys = [
        ((a.double() - b.double()) if a.dtype == torch.float64 else (a.float() - b.float())).abs()
        for a, b in zip(own, merged, strict=True)
    ]

    def keep(key: Tensor) -> Tensor:
        mask = torch.zeros_like(key, dtype=torch.bool)
        mask[key.argsort(descending=True, stable=True)[: int(density * key.numel())]] = True
        return mask

    if scope == "global":
        parts = keep(torch.cat([k.flatten() for k in keys])).split([k.numel() for k in keys])
        return [p.view_as(k) for p, k in zip(parts, keys, strict=True)]
    if scope == "tensor":
        return [keep(k.flatten()).view_as(k) for k in keys]
    return [torch.stack([keep(row) for row in k.flatten(1)]).view_as(k) for k in keys]


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties"])
def test_merges_agree_with_plain_torch(nets: tuple[Net, dict[str, Net]], merge: Any) -> None:
    base, tasks = nets
    scaling = None if merge == "average" else 0.7
    peru = lf.peru_fft(base, tasks, merge=merge, scaling=scaling)
    want = reference_merge(wide(base.state_dict()), [wide(t.state_dict()) for t in tasks.values()], merge, 0.7)
    assert peru.merged.keys() == base.state_dict().keys()
    for name, tensor in peru.merged.items():
        ours = base.state_dict()[name]
        assert (tensor.dtype, tensor.shape) == (ours.dtype, ours.shape)
        if name not in want:
            assert torch.equal(tensor, ours)  # the step counter
            continue
        # one rounding of the fp64 sum; sums in another order may fall on the other side of a rounding boundary
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), want[name], rtol=0.5001 * eps, atol=1e-12)
    base.load_state_dict(peru.merged)
    assert peru.settings["merge"] == merge


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("density", [0.005, 0.1, 0.5, 1.0])
def test_kept_values_are_the_finetunes_own(nets: tuple[Net, dict[str, Net]], scope: Any, density: float) -> None:
    base, tasks = nets
    peru = lf.peru_fft(base, tasks, density=density, scope=scope)
    merged = [peru.merged[name] for name in PRUNED]
    for task, net in tasks.items():
        adapter, own = peru.adapters[task], net.state_dict()
        masks = reference_kept([own[n] for n in PRUNED], merged, density, scope)
        state = peru.state_dict(task)
        report = peru.report.tasks[task]
        kept = whole = 0.0
        for name, mask in zip(PRUNED, masks, strict=True):
            assert torch.equal(adapter.matrices[name].mask().view_as(mask), mask)
            want = torch.where(mask, own[name], peru.merged[name])
            assert torch.equal(bits(state[name]), bits(want))
            square = (own[name].double() - peru.merged[name].double()).square()
            assert report.parameters[name].kept == int(mask.sum()) == adapter.matrices[name].nnz
            assert report.parameters[name].entries == mask.numel()
            assert report.parameters[name].squared_norm == pytest.approx(float(square.sum()), rel=1e-12)
            assert report.parameters[name].squared_kept == pytest.approx(float(square[mask].sum()), rel=1e-12)
            kept, whole = kept + float(square[mask].sum()), whole + float(square.sum())
        assert report.energy == adapter.energy == pytest.approx(kept / whole, rel=1e-12)
        if scope == "global":
            assert report.kept == adapter.nnz == int(density * sum(m.numel() for m in masks))
        assert state["out.weight"] is state["emb.weight"]  # tied
        for name in own:
            if name not in (*PRUNED, "out.weight"):
                assert torch.equal(bits(state[name]), bits(own[name])), name
        net.load_state_dict(state)
        if density == 1.0:
            assert_same(state, own)
            assert report.energy == 1.0


def test_one_finetune_with_weight_one_is_that_finetune(nets: tuple[Net, dict[str, Net]]) -> None:
    base, tasks = nets
    state, own = base.state_dict(), tasks["sql"].state_dict()
    want = own | {name: t for name, t in state.items() if not t.is_floating_point()}
    options: list[Any] = [
        full.task_arithmetic(state, [own], 1.0),
        full.average(state, [own]),
        full.ties(state, [own], 1.0, trim=1.0),
    ]
    for merged in options:
        if base.emb.weight.dtype != torch.float64:  # there the difference itself is rounded
            assert_same(merged, want)
        else:
            torch.testing.assert_close(merged, want, rtol=1e-14, atol=1e-14)


def test_ties_by_hand() -> None:
    base = {"a": torch.tensor([1.0, 1, 1, 1, 1]), "b": torch.tensor([[10.0, 10], [10, 10], [10, 10]])}
    one = {"a": torch.tensor([4.0, 1, -4, 2.5, 1]), "b": torch.tensor([[12.0, 10], [10, 10], [10.5, 10]])}
    two = {"a": torch.tensor([6.0, -3, 6, -0.5, 1]), "b": torch.tensor([[10.0, 10], [10, 7.0], [10, 10]])}
    # task vectors: a 3 0 -5 1.5 0, b 2 0 0 0 .5 0 and a 5 -4 5 -1.5 0, b 0 0 0 -3 0 0; of 11 entries 5 stay
    # elected: + - 0 0 . | + . . - + .   ->  zeros take the sign of the sum of signs, + + + - - = +
    merged = full.ties(base, [one, two], 0.5, trim=0.5)
    assert merged["a"].tolist() == [1 + 0.5 * 4, 1 - 0.5 * 4, 1 + 0.5 * 5, 1 + 0.5 * 1.5, 1]
    assert merged["b"].tolist() == [[11, 10], [10, 8.5], [10.25, 10]]


def test_treatments() -> None:
    base = make()
    tasks: dict[str, Any] = {"sql": tuned(base, 1).state_dict(), "math": tuned(base, 2).state_dict()}
    tasks["sql"]["head.weight"], tasks["sql"]["head.bias"] = torch.randn(8, 5), torch.randn(8)
    tasks["math"]["extra.scale"] = torch.randn(2)
    peru = lf.peru_fft(base, tasks, heads=["head", "extra.*"], exclude="emb", shared=["block.2", "norm.bias"])
    kinds = peru.report.treatments
    assert [n for n, kind in kinds.items() if kind == "pruned"] == ["conv.weight", "block.0.weight"]
    assert [n for n, kind in kinds.items() if kind == "shared"] == ["block.2.weight", "norm.bias"]
    assert [n for n, kind in kinds.items() if kind == "head"] == ["head.weight", "head.bias", "extra.scale"]
    assert kinds["emb.weight"] == "dense"
    assert set(kinds) | set(peru.aliases) == {*base.state_dict(), "extra.scale"}
    assert "65" not in peru.report.__str__().splitlines()[-1]
    assert "3 head (head.weight, head.bias, extra.scale)" in str(peru.report)
    for name in ("head.weight", "head.bias"):  # the merged model has the base's
        assert torch.equal(peru.merged[name], base.state_dict()[name])
    for task, state in tasks.items():
        adapter, got = peru.adapters[task], peru.state_dict(task)
        assert set(adapter.heads) == {n for n in state if n.startswith(("head.", "extra."))}
        for name in adapter.heads:
            assert torch.equal(got[name], state[name])
        assert torch.equal(bits(got["emb.weight"]), bits(state["emb.weight"]))
        assert got["out.weight"] is got["emb.weight"]
        for name in ("block.2.weight", "norm.bias"):
            assert got[name].data_ptr() == peru.merged[name].data_ptr()
            assert not torch.equal(got[name], state[name])
        pruned = sum(state[n].numel() for n in ("conv.weight", "block.0.weight"))
        assert adapter.nnz == int(0.1 * pruned) == peru.report.tasks[task].kept


def test_base_may_lack_heads() -> None:
    base = {name: t for name, t in make().state_dict().items() if not name.startswith("head.")}
    tasks = {str(n): tuned(make(classes=n), n).state_dict() for n in (2, 3)}
    peru = lf.peru_fft(base, tasks, heads="head")
    assert peru.merged.keys() == base.keys()
    for n in (2, 3):
        assert peru.state_dict(str(n))["head.weight"].shape == (n, 5)
        make(classes=n).load_state_dict(peru.state_dict(str(n)))


def test_shared_storage_counts_once() -> None:
    base = make()
    state = base.state_dict()
    tasks: dict[str, Any] = {"tied": tuned(base, 1)}
    tasks["lacks the alias"] = {k: v for k, v in tuned(base, 2).state_dict().items() if k != "out.weight"}
    tasks["lacks the first"] = {k: v for k, v in tuned(base, 3).state_dict().items() if k != "emb.weight"}
    tasks["equal copies"] = {k: v.clone() for k, v in tuned(base, 4).state_dict().items()}
    peru = lf.peru_fft(base, tasks, density=0.2, merge="average")
    assert peru.aliases == {"out.weight": "emb.weight"}
    assert list(peru.merged) == list(state)
    assert peru.merged["out.weight"] is peru.merged["emb.weight"]
    once = {name: t for name, t in state.items() if name != "out.weight"}
    assert peru.report.nbytes_merged == sum(t.nbytes for t in once.values())
    for task in tasks:
        assert peru.report.tasks[task].entries == sum(once[name].numel() for name in PRUNED)
        assert peru.report.tasks[task].nbytes_finetuned == peru.report.nbytes_merged
        assert "out.weight" not in peru.adapters[task].matrices
        copies = {name: t.clone() for name, t in peru.merged.items()}  # equal, but no longer one tensor
        got = peru.adapters[task].state_dict(copies)
        assert got["out.weight"] is got["emb.weight"]
        assert_same(got, peru.state_dict(task))


def test_what_equals_the_merged_model_is_left_out() -> None:
    base = make()
    tasks: dict[str, Any] = {"sql": tuned(base, 1), "math": tuned(base, 2)}
    for net in tasks.values():  # a frozen embedding and norm
        net.emb.weight.data.copy_(base.emb.weight)
        net.norm.load_state_dict(base.norm.state_dict())
    peru = lf.peru_fft(base, tasks, scope="row")
    report = peru.report.tasks["sql"]
    frozen = {"emb.weight", *(f"norm.{name}" for name in base.norm.state_dict())}
    assert set(report.unchanged) == frozen
    assert report.parameters["emb.weight"].kept == 0
    assert report.parameters["emb.weight"].energy == 1.0
    assert frozen.isdisjoint({*peru.adapters["sql"].matrices, *peru.adapters["sql"].dense})
    assert frozen - {"norm.num_batches_tracked"} <= peru.adapters["sql"].fingerprint.keys()
    assert_same(lf.peru_fft(base, tasks, density=1.0).state_dict("math"), tasks["math"].state_dict())


def test_given_merges() -> None:
    base = make()
    tasks = {"sql": tuned(base, 1), "math": tuned(base, 2)}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in {"": base, **tasks}.items()}
    seen: list[Any] = []

    def largest(ours: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        seen.extend([ours, *others])
        merged = {}
        for name, t in ours.items():
            merged[name] = t
            for other in others:
                if t.is_floating_point():
                    merged[name] = torch.maximum(t, other[name], out=t)  # in place, which must not reach the caller's
        return merged

    peru = lf.peru_fft(base, tasks, merge=largest, heads="head")
    assert all("head.weight" not in state and "out.weight" not in state for state in seen)
    want = {n: torch.stack([s[n] for s in before.values()]).amax(0) for n in before[""]}
    for name in ("emb.weight", "norm.bias"):
        assert torch.equal(peru.merged[name], want[name])
    for name, net in {"": base, **tasks}.items():
        assert_same(net.state_dict(), before[name])
    again = lf.peru_fft(base, tasks, merge=dict(peru.merged), heads="head")
    assert_same(again.merged, peru.merged)
    assert again.settings == {"density": 0.1, "merge": "given", "scaling": None, "scope": "global"}
    assert again.merged["emb.weight"].data_ptr() != peru.merged["emb.weight"].data_ptr()
    assert_same(again.state_dict("sql"), peru.state_dict("sql"))


def test_other_dtypes_are_rounded_to_the_bases() -> None:
    base = make(dtype=torch.bfloat16)
    task = tuned(base.float(), 1)
    base = base.bfloat16()
    head = {"head.weight": torch.randn(2, 5), "head.bias": torch.randn(2)}
    peru = lf.peru_fft(base, {"sql": {**task.state_dict(), **head}}, density=1.0, heads="head")
    state = peru.state_dict("sql")
    assert_same(state, {**copy.deepcopy(task).bfloat16().state_dict(), **head})
    assert peru.report.notes == ["finetuned['sql']: 11 tensors rounded from torch.float32 to the base's torch.bfloat16"]
    exact = lf.peru_fft(task, {"sql": base})  # the other way loses nothing
    assert exact.report.notes == []


def test_odd_shapes_and_mixed_dtypes() -> None:
    base = {
        "half": torch.randn(6, 4).half(),
        "double": torch.randn(5, 3).double(),
        "wide": torch.randn(2, 70_000),
        "thin": torch.randn(9, 1),
        "conv1d": torch.randn(4, 3, 5).bfloat16(),
        "empty": torch.randn(0, 3),
        "scalar": torch.tensor(2.0),
        "flag": torch.tensor([True, False]),
    }
    task = {
        name: t + 0.1 * torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else ~t for name, t in base.items()
    }
    pruned = ["half", "double", "wide", "thin", "conv1d"]
    for scope in ("global", "tensor", "row"):
        peru = lf.peru_fft(base, {"a": task}, density=0.25, scope=scope)  # type: ignore[arg-type]
        adapter, state = peru.adapters["a"], peru.state_dict("a")
        masks = reference_kept([task[n] for n in pruned], [peru.merged[n] for n in pruned], 0.25, scope)
        for name, mask in zip(pruned, masks, strict=True):
            assert torch.equal(adapter.matrices[name].mask().view_as(mask), mask)
            assert torch.equal(state[name], torch.where(mask, task[name], peru.merged[name]))
        assert adapter.dense.keys() == {"scalar", "flag"}
        assert [n for n, kind in peru.report.treatments.items() if kind == "pruned"] == pruned
        assert torch.equal(state["flag"], ~base["flag"])
        assert torch.equal(peru.merged["flag"], base["flag"])
        assert adapter.matrices["wide"].bitmap is not None or adapter.matrices["wide"].columns.dtype == torch.int32  # type: ignore[union-attr]
    assert_same(lf.peru_fft(base, {"a": task}, density=1.0, merge="ties").state_dict("a"), task)
    small = {name: base[name] for name in ("scalar", "flag")}
    peru = lf.peru_fft(small, {"a": {name: task[name] for name in small}}, merge="ties")  # nothing to prune
    assert (peru.adapters["a"].nnz, peru.report.tasks["a"].energy) == (0, 1.0)


def test_tied_heads_keep_both_names() -> None:
    base, task = make(), tuned(make(), 1)
    task.decoder = nn.Linear(5, 4)
    task.decoder.register_parameter("tied", task.decoder.bias)
    peru = lf.peru_fft(base, {"a": task}, heads="decoder")
    assert_same(lf.peru_fft(base, {"a": task}, heads="decoder", density=1.0).state_dict("a"), task.state_dict())
    assert set(peru.adapters["a"].heads) == {"decoder.weight", "decoder.bias", "decoder.tied"}
    short = {name: t for name, t in base.state_dict().items() if name != "out.weight"}  # as files hold tied weights
    peru = lf.peru_fft(short, {"a": tuned(make(), 1)})
    assert peru.merged.keys() == short.keys()
    assert peru.adapters["a"].heads == {}


def test_a_task_may_come_later() -> None:
    base = make()
    first = lf.peru_fft(base, {"sql": tuned(base, 1), "math": tuned(base, 2)})
    later = lf.peru_fft(base, {"chat": tuned(base, 3)}, merge=first.merged)
    later.adapters["chat"].check_merged(first.merged)
    assert_same(later.merged, first.merged)
    masks = reference_kept(
        [tuned(base, 3).state_dict()[n] for n in PRUNED], [first.merged[n] for n in PRUNED], 0.1, "global"
    )
    for name, mask in zip(PRUNED, masks, strict=True):
        assert torch.equal(later.adapters["chat"].matrices[name].mask().view_as(mask), mask)


def test_prefix() -> None:
    base, tasks = make(), {"sql": tuned(make(), 1).state_dict(), "math": tuned(make(), 2).state_dict()}
    inside = {task: {f"net.{n}": t for n, t in state.items()} | {"top": torch.ones(2)} for task, state in tasks.items()}
    plain, peru = lf.peru_fft(base, tasks), lf.peru_fft(base, inside, prefix="net.", heads="top")
    assert_same(peru.merged, {f"net.{name}": t for name, t in plain.merged.items()})
    assert peru.aliases == {"net.out.weight": "net.emb.weight"}
    for task in tasks:
        want = {f"net.{name}": t for name, t in plain.state_dict(task).items()} | {"top": torch.ones(2)}
        assert_same(peru.state_dict(task), want)


def test_integer_buffers_that_one_side_lacks() -> None:
    base = make().state_dict()
    tasks = {"sql": tuned(make(), 1).state_dict(), "math": tuned(make(), 2).state_dict()}
    del tasks["sql"]["norm.num_batches_tracked"]
    tasks["math"]["position_ids"] = torch.arange(9)
    peru = lf.peru_fft(base, tasks)
    assert peru.state_dict("sql")["norm.num_batches_tracked"] == 0
    assert peru.state_dict("math")["norm.num_batches_tracked"] == 2
    assert "position_ids" not in peru.state_dict("math")
    first, second = peru.report.notes
    assert "'norm.num_batches_tracked', not floating-point, is missing in finetuned['sql']" in first
    assert "'position_ids', not floating-point, is in finetuned['math']" in second
    assert str(peru.report).endswith(second)


def test_residual(nets: tuple[Net, dict[str, Net]]) -> None:
    base, tasks = nets
    peru = lf.peru_fft(base, tasks, density=0.3)
    adapter = peru.adapters["chat"]
    for name in PRUNED:
        merged, own = peru.merged[name], tasks["chat"].state_dict()[name]
        before = adapter.matrices[name].values.clone()
        residual = adapter.residual(name, merged)
        assert torch.equal(bits(adapter.matrices[name].values), bits(before))
        accurate = torch.float64 if merged.dtype == torch.float64 else torch.float32
        want = (own.to(accurate) - merged.to(accurate)).to(merged.dtype).reshape(residual.shape)
        mask = adapter.matrices[name].mask()
        assert torch.equal(bits(residual.to_dense()), bits(torch.where(mask, want, torch.zeros_like(want))))
    with pytest.raises(ValueError, match=r"name: .* has 5 .*, but not 'emb.wieght'; did you mean 'emb.weight'"):
        adapter.residual("emb.wieght", peru.merged["emb.weight"])
    with pytest.raises(ValueError, match=r"merged_weight: 'conv.weight' has shape \[6, 3, 3, 2\], got \[6, 18\]"):
        adapter.residual("conv.weight", peru.merged["conv.weight"].flatten(1))


def test_fingerprints_tell_dtype_shape_and_bytes_apart() -> None:
    t = torch.arange(6.0)
    others = [t.view(2, 3), t.view(3, 2), t.double(), t.view(torch.int32), t.flip(0), -t, t[:0], t[0]]
    assert len({fingerprint(x) for x in [t, *others]}) == 9
    assert fingerprint(torch.arange(12.0).view(6, 2).t()[0]) == fingerprint(torch.arange(0, 12, 2.0))


def test_bytes_are_those_of_the_tensors() -> None:
    base = make(dtype=torch.bfloat16)
    peru = lf.peru_fft(base, {"sql": tuned(base, 1), "math": tuned(base, 2)}, density=0.3, heads="head")
    for task, adapter in peru.adapters.items():
        report = peru.report.tasks[task]
        forms = [(m.columns, m.bitmap) for m in adapter.matrices.values()]
        assert report.nbytes == adapter.nbytes == sum(t.nbytes for t in adapter.tensors())
        assert report.nbytes_values == 2 * adapter.nnz
        assert report.nbytes_positions == sum(
            8 * (m.num_rows + 1) + sum(t.nbytes for t in form if t is not None)
            for m, form in zip(adapter.matrices.values(), forms, strict=True)
        )
        assert report.nbytes_heads == 2 * (3 * 5 + 3)
        assert adapter.num_parameters() == adapter.nnz + sum(
            t.numel() for t in (*adapter.dense.values(), *adapter.heads.values())
        )
        assert f"{adapter.nnz:,} of {report.entries:,} entries of 4 matrices" in repr(adapter)
    whole = peru.report
    assert whole.nbytes == whole.nbytes_merged + sum(a.nbytes for a in peru.adapters.values())
    assert whole.nbytes_finetuned == 2 * whole.nbytes_merged
    lines = str(whole).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "merged", "sql", "math", "all", "parameters:"]
    assert f"{whole.nbytes:,}" in lines[-2]


def test_neither_threads_nor_strides_matter() -> None:
    base = make().state_dict()
    tasks = {"sql": tuned(make(), 1).state_dict(), "math": tuned(make(), 2).state_dict()}
    for state in (base, *tasks.values()):
        state["large"] = torch.randn(400, 400)  # large enough for torch to share out a sum among threads
    strided = {t: {n: torch.stack([x, x], -1)[..., 0] for n, x in s.items()} for t, s in tasks.items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for count, given in ((1, tasks), (2, tasks), (2, strided)):
            torch.set_num_threads(count)
            results.append(lf.peru_fft(base, given, merge="ties"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other.merged, results[0].merged)
        for task in tasks:
            assert_same(other.state_dict(task), results[0].state_dict(task))
        assert other.report == results[0].report  # energies to the last bit


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    lf.peru_fft(make(), {"sql": tuned(make(), 1)}, merge="ties", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search("trim.*merge.*prune", err, re.DOTALL)
