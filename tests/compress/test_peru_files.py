"""PERU folders: the same bits come back, and whatever was damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peru_models import assert_same, make, tuned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fuse as lf
from lora_fuse.adapters import sparse_files
from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.adapters.sparse_files import load_sparse_adapter, save_sparse_adapter
from lora_fuse.compress import peru_files


def make_peru(density: float = 0.1, dtype: torch.dtype = torch.float32, **options: Any) -> lf.Peru:
    base = make(dtype=dtype)
    tasks = {}
    for i, name in enumerate(("sql", "math x.2")):
        tasks[name] = tuned(base, i + 1).state_dict() | {"head.weight": torch.randn(i + 2, 5), "extra": torch.ones(2)}
    return lf.peru_fft(base, tasks, density=density, heads=["head", "extra"], **options)


def assert_same_adapter(got: SparseAdapter, want: SparseAdapter) -> None:
    assert_same(got.dense, want.dense)
    assert_same(got.heads, want.heads)
    assert got.matrices.keys() == want.matrices.keys()
    for name, matrix in want.matrices.items():
        ours, theirs = (
            {part: t for part in ("values", "row_starts", "columns", "bitmap") if (t := getattr(m, part)) is not None}
            for m in (got.matrices[name], matrix)
        )
        assert_same(ours, theirs)
        assert got.matrices[name].num_cols == matrix.num_cols
    for field in ("shapes", "fingerprint", "density", "squares", "aliases"):
        assert getattr(got, field) == getattr(want, field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("density", [0.005, 0.1, 0.9])
def test_the_same_bits_come_back(tmp_path: Path, density: float, dtype: torch.dtype) -> None:
    peru = make_peru(density, dtype)
    forms = {m.bitmap is None for a in peru.adapters.values() for m in a.matrices.values()}
    assert forms == ({True} if density == 0.005 else {False} if density == 0.9 else forms)
    peru.save_pretrained(tmp_path / "deep" / "peru")
    back = lf.load_peru(tmp_path / "deep" / "peru")
    assert list(back.merged) == list(peru.merged)
    assert_same(back.merged, peru.merged)
    assert back.merged["out.weight"] is back.merged["emb.weight"]
    assert (back.aliases, back.settings, back.report) == (peru.aliases, peru.settings, peru.report)
    assert list(back.adapters) == list(peru.adapters)
    for task, adapter in peru.adapters.items():
        assert_same_adapter(back.adapters[task], adapter)
        assert back.adapters[task].source == str(tmp_path / "deep" / "peru" / task)
        assert_same(back.state_dict(task), peru.state_dict(task))
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["peru"]


@pytest.mark.parametrize("merge", ["average", "ties", {}, None], ids=["average", "ties", "function", "given"])
def test_every_kind_of_merge_comes_back(tmp_path: Path, merge: Any) -> None:
    merge = make_peru().merged if merge is None else merge or (lambda base, others: others[0])
    peru = make_peru(merge=merge, scope="tensor")
    peru.save_pretrained(tmp_path)
    back = lf.load_peru(tmp_path)
    assert (back.settings, back.report) == (peru.settings, peru.report)
    peru.adapters["new"] = peru.adapters["sql"]
    with pytest.raises(ValueError, match=r"adapters\['new'\]: the report has no such task"):
        peru.save_pretrained(tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_files_are_plain(tmp_path: Path) -> None:
    """What docs/peru.md says: names, dtypes and JSON, readable without this package."""
    peru = make_peru(0.9)
    peru.save_pretrained(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    of_tasks = [f"{task}/sparse_adapter.{kind}" for task in peru.adapters for kind in ("json", "safetensors")]
    assert files == sorted(["merged.safetensors", "peru.json", *of_tasks])
    merged = load_file(tmp_path / "merged.safetensors")
    assert "out.weight" not in merged
    assert_same({n: t for n, t in peru.merged.items() if n != "out.weight"}, {n: merged[n] for n in merged} | {})
    config = json.loads((tmp_path / "peru.json").read_text())
    assert config["tasks"].keys() == peru.adapters.keys()
    assert config["aliases"] == {"out.weight": "emb.weight"}
    tensors = load_file(tmp_path / "sql" / "sparse_adapter.safetensors")
    info = json.loads((tmp_path / "sql" / "sparse_adapter.json").read_text())
    shape = info["matrices"]["conv.weight"]["shape"]
    assert (shape, info["matrices"]["conv.weight"]["positions"]) == ([6, 3, 3, 2], "bitmap")
    bitmap = tensors["matrix/conv.weight/bitmap"]
    places = [
        (row, col) for row in range(6) for col in range(18) if int(bitmap[row, col // 8]) >> (col % 8) & 1
    ]  # by hand, as the page describes it
    dense = merged["conv.weight"].clone().view(6, 18)
    for (row, col), value in zip(places, tensors["matrix/conv.weight/values"], strict=True):
        dense[row, col] = value
    assert torch.equal(dense.view(shape), peru.state_dict("sql")["conv.weight"])
    with safe_open(tmp_path / "sql" / "sparse_adapter.safetensors", "np") as file:
        assert set(file.keys()) == set(info["checksums"])


def test_some_tasks_and_single_adapters(tmp_path: Path) -> None:
    peru = make_peru()
    peru.save_pretrained(tmp_path / "peru")
    back = lf.load_peru(tmp_path / "peru", tasks=["math x.2"])
    assert list(back.adapters) == list(back.report.tasks) == ["math x.2"]
    assert list(lf.load_peru(tmp_path / "peru", tasks="sql").adapters) == ["sql"]
    with pytest.raises(ValueError, match=r"tasks: .* has no task 'mnli'; it has 'sql', 'math x.2'"):
        lf.load_peru(tmp_path / "peru", tasks=["sql", "mnli"])
    assert_same_adapter(load_sparse_adapter(tmp_path / "peru" / "sql"), peru.adapters["sql"])
    peru.adapters["sql"].save_pretrained(tmp_path / "alone")
    assert_same_adapter(load_sparse_adapter(str(tmp_path / "alone")), peru.adapters["sql"])


def test_saving_again_replaces_the_old_one(tmp_path: Path) -> None:
    make_peru().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    other = make_peru(0.5, merge="average")
    other.save_pretrained(tmp_path)
    assert_same(lf.load_peru(tmp_path).state_dict("sql"), other.state_dict("sql"))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_nothing_is_written_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peru = make_peru()
    peru.save_pretrained(tmp_path / "old")
    before = {p: p.read_bytes() for p in (tmp_path / "old").rglob("*") if p.is_file()}

    def unchanged() -> bool:
        return before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    bad = make_peru()
    bad.merged["norm.weight"][0] += 1
    with pytest.raises(ValueError, match=r"adapters\['sql'\]: was made against other merged weights: 'norm.weight'"):
        bad.save_pretrained(tmp_path / "old")
    bad = make_peru()
    bad.adapters["sql"].matrices["emb.weight"].values[0] = torch.nan
    with pytest.raises(ValueError, match=r"'emb.weight' has NaN or infinite entries"):
        bad.save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match=r"'emb.weight' has NaN or infinite entries"):
        save_sparse_adapter(bad.adapters["sql"], tmp_path / "new")
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        peru.save_pretrained(tmp_path / "old" / "peru.json")
    assert unchanged()

    def full_disk(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(peru_files, "write_json", full_disk)
    for place in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            peru.save_pretrained(tmp_path / place)
    monkeypatch.setattr(sparse_files, "write_json", full_disk)
    with pytest.raises(OSError, match="no space left"):
        peru.adapters["sql"].save_pretrained(tmp_path / "new")
    assert unchanged()
    assert not (tmp_path / "new").exists()


@pytest.fixture
def folder(tmp_path: Path, peru_folder: Path) -> Path:
    shutil.copytree(peru_folder, tmp_path / "peru")
    return tmp_path / "peru"


@pytest.fixture(scope="module")
def peru_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("peru") / "peru"
    make_peru().save_pretrained(path)
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any], checksums: bool = True) -> None:
    """Change tensors, and write checksums that agree, as a program with a mistake would."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    if checksums:
        sums = {key: fingerprint(t) for key, t in tensors.items()}
        name = "peru.json" if path.name == "merged.safetensors" else "sparse_adapter.json"
        edit_json(path.with_name(name), lambda config: config.update(checksums=sums))


ADAPTER, MERGED = "sql/sparse_adapter.safetensors", "merged.safetensors"
FILES = ["peru.json", MERGED, ADAPTER, "sql/sparse_adapter.json"]


@pytest.mark.parametrize("name", FILES)
def test_missing_cut_and_foreign_files(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for damaged in (b"", whole[:-2], whole[: len(whole) // 2], whole[:7], whole + b"x", b"version https://git-lfs\n"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=Path(name).name):
            lf.load_peru(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        lf.load_peru(folder)
    with pytest.raises(ValueError, match=r"not a PERU folder: there is no peru.json in it"):
        lf.load_peru(folder / "sql")


@pytest.mark.parametrize("name", [MERGED, ADAPTER])
def test_any_changed_byte_is_found(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole), (60,), generator=generator).tolist()
    places += torch.randint(0, start, (60,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (folder / name).write_bytes(damaged)
        if place >= start:
            with pytest.raises(ValueError, match=rf"{Path(name).name}: damaged or changed: '"):
                lf.load_peru(folder)
            continue
        with suppress(ValueError):
            back = lf.load_peru(folder)  # a changed header may still say the same, such as 'format': 'qt'
            (folder / name).write_bytes(whole)
            assert_same(back.state_dict("sql"), lf.load_peru(folder).state_dict("sql"))


def _poke(key: str, value: float, index: int = 0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[index] = value

    return change


def _swap_columns(tensors: dict[str, Tensor]) -> None:
    starts, columns = tensors["matrix/emb.weight/row_starts"], tensors["matrix/emb.weight/columns"]
    row = int((starts.diff() >= 2).nonzero()[0])
    first = int(starts[row])
    columns[first : first + 2] = columns[first : first + 2].int().flip(0).to(torch.uint16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poke("matrix/emb.weight/values", torch.nan), "'emb.weight' has NaN or infinite entries"),
        (_poke("dense/norm.bias", torch.inf), "'norm.bias' has NaN or infinite entries"),
        (_poke("head/head.weight", torch.nan), "'head.weight' has NaN or infinite entries"),
        (_poke("matrix/emb.weight/columns", 12), "'emb.weight'.*columns"),
        (_swap_columns, "'emb.weight': columns: do not rise within row "),
        (_poke("matrix/emb.weight/row_starts", 1), "'emb.weight'.*row_starts"),
        (_poke("matrix/emb.weight/row_starts", -1, 3), "'emb.weight'.*row_starts"),
        (lambda t: t.pop("matrix/emb.weight/columns"), "'matrix/emb.weight/columns', which"),
        (lambda t: t.pop("matrix/emb.weight/values"), "'matrix/emb.weight/values', which"),
        (lambda t: t.pop("dense/conv.bias"), "'dense/conv.bias', which"),
        (lambda t: t.update(more=torch.ones(2)), "unknown tensors 'more'"),
        (lambda t: t.update({"dense/more": torch.ones(2)}), "unknown tensors 'dense/more'"),
        (lambda t: t.update({"dense/conv.bias": torch.ones(7)}), "'conv.bias' is torch.float32 of shape .7."),
        (lambda t: t.update({"dense/conv.bias": torch.ones(6).half()}), "'conv.bias' is torch.float16"),
        (
            lambda t: t.update({"matrix/emb.weight/values": t["matrix/emb.weight/values"].bfloat16()}),
            "'emb.weight' is torch.bfloat16 of shape .19, 12., merged has torch.float32",
        ),
        (
            lambda t: t.update({"matrix/emb.weight/values": t["matrix/emb.weight/values"].int()}),
            "'emb.weight'.*values is not a 1-d floating",
        ),
        (
            lambda t: t.update({"matrix/emb.weight/values": t["matrix/emb.weight/values"][0]}),
            "'emb.weight'.*values is not a 1-d floating",
        ),
        (
            lambda t: t.update({"matrix/emb.weight/row_starts": t["matrix/emb.weight/row_starts"][:0]}),
            "'emb.weight'.*row_starts",
        ),
        (
            lambda t: t.update({"matrix/emb.weight/columns": t["matrix/emb.weight/columns"].to(torch.int32)}),
            "'emb.weight'.*columns is not a torch.uint16",
        ),
        (
            lambda t: t.update({"matrix/emb.weight/columns": t["matrix/emb.weight/columns"][1:]}),
            "'emb.weight': columns: expected a contiguous uint16 or int32 tensor",
        ),
    ],
)
def test_wrong_tensors_whose_checksums_agree(folder: Path, change: Callable[..., Any], message: str) -> None:
    edit_tensors(folder / ADAPTER, change)
    with pytest.raises(ValueError, match=message):
        lf.load_peru(folder)
    lf.load_peru(folder, tasks=["math x.2"])  # the other is as good as it was


@pytest.mark.parametrize("bit", [0, 17, 18, 63])
def test_bitmaps_that_disagree(tmp_path: Path, bit: int) -> None:
    """A bit inside the row moves the count, a bit beyond it belongs to no column."""
    make_peru(0.9).save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        bitmap = tensors["matrix/conv.weight/bitmap"]
        bitmap[2, bit // 8] ^= 1 << (bit % 8)

    edit_tensors(tmp_path / ADAPTER, change)
    with pytest.raises(ValueError, match=r"sql: 'conv.weight': bitmap: does not agree with row_starts"):
        lf.load_peru(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poke("norm.bias", 7.0), "sql: was made against other merged weights: 'norm.bias' differs"),
        (_poke("head.bias", torch.nan), "'head.bias' has NaN or infinite entries"),
        (lambda t: t.pop("norm.bias"), "'tensors' and merged.safetensors disagree on 'norm.bias'"),
        (lambda t: t.update(more=torch.ones(2)), "'tensors' and merged.safetensors disagree on 'more'"),
        (lambda t: t.update({"conv.bias": torch.ones(7)}), "other merged weights: 'conv.bias' differs"),
    ],
)
def test_wrong_merged_weights_whose_checksums_agree(folder: Path, change: Callable[..., Any], message: str) -> None:
    edit_tensors(folder / MERGED, change)
    with pytest.raises(ValueError, match=message):
        lf.load_peru(folder)


def test_changed_merged_weights(folder: Path) -> None:
    for change, message in (
        (_poke("conv.bias", 7.0), "merged.safetensors: damaged or changed: 'conv.bias'"),
        (lambda t: t.pop("norm.bias"), "merged.safetensors: lacks 'norm.bias'"),
        (lambda t: t.update({"x": torch.ones(2)}), "unknown tensors 'x'"),
    ):
        whole = (folder / MERGED).read_bytes()
        edit_tensors(folder / MERGED, change, checksums=False)
        with pytest.raises(ValueError, match=message):
            lf.load_peru(folder)
        (folder / MERGED).write_bytes(whole)


def test_adapters_of_another_peru(folder: Path, tmp_path: Path) -> None:
    make_peru(merge="average").save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / "sql")
    shutil.copytree(tmp_path / "other" / "sql", folder / "sql")
    with pytest.raises(ValueError, match=r"sql: was made against other merged weights: '"):
        lf.load_peru(folder)


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = to

    return change


EMB = ("matrices", "emb.weight")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("peru.json", _set("format", to="x"), "'format' is 'x', expected 'lora_fuse.peru'"),
        ("peru.json", _set("version", to=2), "version 2 of the format; this release reads 1"),
        ("peru.json", lambda c: c.pop("tasks"), "damaged: lacks 'tasks'"),
        ("peru.json", _set("more", to=1), "unknown fields 'more'"),
        ("peru.json", _set("tasks", to=["sql"]), "'tasks' is damaged: got list"),
        ("peru.json", _set("settings", "density", to=0), "'settings' has 'density' as 0"),
        ("peru.json", _set("settings", "density", to="0.1"), "'settings' has 'density' as 0.1"),
        ("peru.json", _set("settings", "merge", to="tsne"), "'settings' has 'merge' as tsne"),
        ("peru.json", _set("settings", "merge", to=[]), "'settings' has 'merge' as "),
        ("peru.json", _set("settings", "scaling", to=None), "'settings' has 'scaling' as None"),
        ("peru.json", _set("settings", "scaling", to=float("inf")), "'settings' has 'scaling' as inf"),
        ("peru.json", _set("settings", "scope", to=1), "'settings' has 'scope' as 1"),
        ("peru.json", _set("settings", "trim", to=0.2), "'settings' has 'trim' as 0.2"),
        ("peru.json", lambda c: c["settings"].pop("density"), "'settings' has 'density' as None"),
        ("peru.json", _set("tasks", "../sql", to={"nbytes_finetuned": 1}), "'../sql' cannot be a task's name"),
        ("peru.json", _set("tasks", "more", to={"nbytes_finetuned": 1}), "more/sparse_adapter.json: no such file"),
        ("peru.json", _set("tasks", "sql", to={}), "damaged: task 'sql'"),
        ("peru.json", _set("tasks", "sql", "nbytes_finetuned", to="7"), "damaged: task 'sql'"),
        ("peru.json", _set("treatments", "emb.weight", to="lost"), "unknown treatment 'lost'"),
        ("peru.json", _set("treatments", "emb.weight", to=["pruned"]), "unknown treatment"),
        ("peru.json", _set("treatments", "emb.weight", to="dense"), "'emb.weight' is pruned, the PERU says dense"),
        ("peru.json", _set("treatments", "head.weight", to="dense"), "'head.weight' is head, the PERU says dense"),
        ("peru.json", _set("treatments", "x", to="dense"), "'tensors' and 'treatments' disagree on 'x'"),
        ("peru.json", lambda c: c["treatments"].pop("emb.weight"), "'treatments' disagree on 'emb.weight'"),
        ("peru.json", lambda c: c["tensors"].append("emb.weight"), "'tensors' names one twice"),
        ("peru.json", lambda c: c["tensors"].remove("out.weight"), "'aliases' disagree on 'out.weight'"),
        ("peru.json", _set("tensors", to=[["a"]]), "hold text only"),
        ("peru.json", _set("aliases", "out.weight", to="nothing"), "'aliases' disagree on 'nothing'"),
        ("peru.json", _set("aliases", "out.weight", to=3), "hold text only"),
        ("peru.json", _set("checksums", "conv.bias", to="00000000"), "damaged or changed: 'conv.bias'"),
        ("sparse_adapter.json", _set("density", to=1.5), "density 1.5 is not in"),
        ("sparse_adapter.json", _set("density", to=float("nan")), "density nan is not in"),
        ("sparse_adapter.json", _set("density", to=True), "'density' is damaged: got bool"),
        ("sparse_adapter.json", _set("format", to="lora_fuse.peru"), "expected 'lora_fuse.sparse_adapter'"),
        ("sparse_adapter.json", _set(*EMB, to=3), "'emb.weight' is described as 3"),
        ("sparse_adapter.json", _set(*EMB, "shape", to=[12, 19]), "matrix for a weight of shape .12, 19."),
        ("sparse_adapter.json", _set(*EMB, "shape", to=[19, 3, 4]), "'emb.weight' is .* of shape .19, 3, 4."),
        ("sparse_adapter.json", _set(*EMB, "shape", to=[19]), "'emb.weight' is described as"),
        ("sparse_adapter.json", _set(*EMB, "shape", to="19"), "'emb.weight' is described as"),
        ("sparse_adapter.json", _set(*EMB, "kept", to=5), "'emb.weight' has .* values, 'kept' says otherwise"),
        ("sparse_adapter.json", _set(*EMB, "positions", to="bitmap"), "'matrix/emb.weight/bitmap', which"),
        ("sparse_adapter.json", _set(*EMB, "squares", to=[2.0, 1.0]), "'emb.weight' has sums of squares 2.0 of 1.0"),
        ("sparse_adapter.json", _set(*EMB, "squares", to=[1.0, float("inf")]), "sums of squares 1.0 of inf"),
        ("sparse_adapter.json", lambda c: c["matrices"].pop("emb.weight"), "unknown tensors 'matrix/emb.weight"),
        ("sparse_adapter.json", lambda c: c["dense"].remove("conv.bias"), "unknown tensors 'dense/conv.bias'"),
        ("sparse_adapter.json", lambda c: c["dense"].append("conv.bias"), "names 'dense/conv.bias'"),
        ("sparse_adapter.json", lambda c: c["dense"].append({}), "which sparse_adapter.safetensors lacks"),
        ("sparse_adapter.json", lambda c: c["merged"].pop("conv.bias"), "'conv.bias' has no fingerprint"),
        ("sparse_adapter.json", lambda c: c["merged"].pop("block.2.weight"), "no fingerprint"),
        ("sparse_adapter.json", _set("merged", "conv.bias", to=7), "damaged: 'merged' does not hold text only"),
        ("sparse_adapter.json", _set("aliases", "out.weight", to=7), "damaged: 'aliases' does not hold text only"),
        ("sparse_adapter.json", _set("aliases", to={}), "sql: has tied weights {}, the PERU has {'out.weight': 'emb.w"),
        ("sparse_adapter.json", _set("merged", "conv.bias", to="0"), "other merged weights: 'conv.bias' differs"),
        ("sparse_adapter.json", _set("merged", "more", to="0"), "other merged weights: 'more' differs"),
        ("sparse_adapter.json", _set("checksums", "dense/conv.bias", to="0"), "damaged or changed: 'dense/conv.bias'"),
    ],
)  # fmt: skip
def test_tampered_json(folder: Path, name: str, change: Callable[..., Any], message: str) -> None:
    edit_json(next(folder.rglob(name)) if name == "peru.json" else folder / "sql" / name, change)
    with pytest.raises(ValueError, match=message):
        lf.load_peru(folder)
