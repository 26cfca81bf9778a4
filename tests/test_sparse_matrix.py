"""SparseMatrix: forms, conversions, checks, and writing into a dense weight."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from lora_fuse import _cpu
from lora_fuse.adapters.sparse_pool import pack
from lora_fuse.sparse import SparseMatrix, Write, write_all

SHAPES = [  # rows, cols, density
    pytest.param(1, 1, 1.0, id="one"),
    pytest.param(37, 100, 0.3, id="bitmap"),
    pytest.param(64, 384, 0.1, id="bitmap-384"),
    pytest.param(33, 130, 0.02, id="columns"),
    pytest.param(5, 65_536, 0.001, id="65536-columns"),
    pytest.param(4, 70_001, 0.2, id="wide-bitmap"),
    pytest.param(4, 70_001, 0.001, id="wide-columns"),
    pytest.param(20, 63, 1.0, id="everything"),
    pytest.param(20, 63, 0.0, id="nothing"),
    pytest.param(0, 63, 0.5, id="no-rows"),
    pytest.param(700, 300, 0.15, id="two-threads"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=_cpu.available_isas())
def isa(request):
    before = _cpu.isa()
    _cpu.choose_isa(request.param)
    yield request.param
    _cpu.choose_isa(before)


def make(rows: int, cols: int, density: float, dtype: torch.dtype = torch.float32) -> tuple[SparseMatrix, torch.Tensor]:
    mask = torch.rand(rows, cols) < density
    mask[::5] &= density == 1.0  # empty rows
    return SparseMatrix.from_mask(torch.randn(rows, cols).to(dtype), mask), mask


def other_form(matrix: SparseMatrix) -> SparseMatrix:
    """The same entries in the form that takes more bytes."""
    mask = matrix.mask()
    if matrix.bitmap is not None:
        dtype = torch.uint16 if matrix.num_cols <= 65_536 else torch.int32
        return replace(matrix, bitmap=None, columns=mask.nonzero()[:, 1].to(dtype))
    words = -(-matrix.num_cols // 64)
    bits = torch.zeros(matrix.num_rows, words * 64, dtype=torch.uint8)
    bits[:, : matrix.num_cols] = mask
    packed = (bits.view(matrix.num_rows, 8 * words, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return replace(matrix, columns=None, bitmap=packed)


@pytest.mark.parametrize(("rows", "cols", "density"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_and_undo(isa, rows, cols, density, dtype):
    smaller, mask = make(rows, cols, density, dtype)
    threads = torch.get_num_threads()
    for matrix in (smaller, other_form(smaller)):
        weight = torch.randn(rows, cols).to(dtype)
        before, saved = weight.clone(), torch.empty(matrix.nnz, dtype=dtype)
        torch.set_num_threads(2)
        assert matrix.write_into(weight, saved=saved) is weight
        torch.set_num_threads(threads)
        want = before.clone()
        want[mask] = matrix.values
        assert torch.equal(weight, want)
        assert torch.equal(saved, before[mask])
        matrix.write_into(weight, saved)
        assert torch.equal(weight, before)
        weight.fill_(float("nan"))
        matrix.write_into(weight)
        assert torch.equal(weight[mask], matrix.values)
        assert weight[~mask].isnan().all()


@pytest.mark.parametrize(("rows", "cols", "density"), SHAPES)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_conversions(rows, cols, density):
    matrix, mask = make(rows, cols, density)
    for form in (matrix, other_form(matrix)):
        form.check("m")
        assert torch.equal(form.mask(), mask)
        assert torch.equal(form.row_index(), mask.nonzero()[:, 0])
        assert torch.equal(form.column_index(), mask.nonzero()[:, 1])
        assert torch.equal(form.flat_index(), mask.view(-1).nonzero()[:, 0])
        base = torch.randn(rows, cols)
        assert torch.equal(form.to_dense(base), torch.where(mask, form.to_dense(), base))
    if rows:
        back = SparseMatrix.from_csr(matrix.to_csr())
        assert torch.equal(back.to_dense(), matrix.to_dense())
        assert (back.bitmap is None) == (matrix.bitmap is None)


def test_weights_that_the_kernel_does_not_take():
    matrix, mask = make(20, 30, 0.3)
    strided = torch.randn(30, 20).t()
    before = strided.clone()
    saved = torch.empty(2 * matrix.nnz)[::2]
    matrix.write_into(strided, saved=saved)
    assert torch.equal(strided[mask], matrix.values)
    assert torch.equal(strided[~mask], before[~mask])
    matrix.write_into(strided, saved.clone())
    assert torch.equal(strided, before)
    dense = before.contiguous()
    matrix.write_into(dense, saved=saved)
    assert torch.equal(saved, before[mask])
    half = torch.zeros(20, 30).half()  # values are cast
    matrix.write_into(half)
    assert torch.equal(half[mask], matrix.values.half())


@pytest.mark.parametrize("shape", [(40, 0), (0, 5), (1, 0), (0, 0)], ids=str)
def test_nothing_to_write(shape):
    rows, cols = shape
    matrix = SparseMatrix.from_mask(torch.empty(shape), torch.empty(shape, dtype=torch.bool))
    for weight in (torch.empty(shape), torch.empty(rows, 2 * cols)[:, ::2]):
        assert matrix.write_into(weight, saved=torch.empty(0)) is weight
    assert matrix.to_dense().shape == shape


def test_parameters_and_versions():
    matrix, mask = make(20, 30, 0.3)
    weight = torch.nn.Parameter(torch.randn(20, 30))
    product = (weight * torch.randn(20, 30, requires_grad=True)).sum()
    version = weight._version
    matrix.write_into(weight)
    assert weight._version > version
    assert weight.is_leaf
    assert torch.equal(weight.detach()[mask], matrix.values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        matrix.write_into(weight, torch.zeros(matrix.nnz))
        assert not weight[mask].any()
        matrix.write_into(torch.zeros(20, 30), saved=torch.empty(matrix.nnz))


def test_bad_input_writes_nothing():
    matrix, _ = make(20, 30, 0.3)
    weight, n = torch.randn(20, 30), matrix.nnz
    before = weight.clone()
    for match, kwargs in [
        (r"weight: expected shape \[20, 30\], got \[30, 20\]", {"weight": torch.zeros(30, 20)}),
        (r"values: expected shape", {"values": torch.zeros(n + 1)}),
        (r"saved: expected shape", {"saved": torch.zeros(n - 1)}),
        (r"saved: expected shape .*float32", {"saved": torch.zeros(n).half()}),
        (r"values, saved: share memory", {"saved": matrix.values}),
        (r"weight, saved: share memory", {"saved": weight.view(-1)[:n]}),
    ]:
        with pytest.raises(ValueError, match=match):
            matrix.write_into(**({"weight": weight} | kwargs))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("two_threads")
def test_many_at_once(dtype):
    """Bits as one by one, whatever the sizes and however rows fall to threads; a fault in one stops all."""
    torch.manual_seed(0)
    shapes = [(1, 1), (300, 400), (0, 5), (700, 90), (3, 70_000), (64, 2000)]
    writes, want = [], []
    for i, (rows, cols) in enumerate(shapes):
        matrix, _ = make(rows, cols, (0.02, 0.3)[i % 2])
        matrix = replace(matrix, values=matrix.values.to(dtype))
        weight = torch.randn(rows, cols).to(dtype)
        writes.append(Write(matrix, weight, matrix.values, torch.empty_like(matrix.values)))
        saved = weight[matrix.mask()]
        want.append((matrix.write_into(weight.clone()), saved))
    assert sum(w.matrix.nnz for w in writes) > 16 * 1024  # enough for a second thread
    first = writes[1]
    before = first.weight.clone()
    for bad, match in [
        (Write(first.matrix, torch.zeros(2, 2), first.values), "weight: expected shape"),
        (Write(first.matrix, first.weight, first.values), "weight, weight: share memory"),
        (Write(first.matrix, torch.randn(300, 400).to(dtype), first.values, first.saved), "saved"),
        (Write(first.matrix, first.weight.clone(), first.weight.view(-1)[: first.matrix.nnz]), "weight, values: share"),
    ]:
        with pytest.raises(ValueError, match=match):
            write_all([*writes, bad])
    assert torch.equal(first.weight, before)
    write_all(writes)
    for write, (weight, saved) in zip(writes, want, strict=True):
        assert torch.equal(write.weight, weight)
        assert torch.equal(write.saved, saved)


@pytest.mark.parametrize("form", ["columns", "bitmap"])
def test_damaged_positions_are_refused_before_any_read(form):
    matrix, _ = make(20, 100, 0.3 if form == "bitmap" else 0.02)
    assert getattr(matrix, form) is not None
    cases = [("row_starts", 3, 1 << 40), ("row_starts", 3, -5), ("row_starts", 0, 1), ("row_starts", -1, 10_000)]
    cases += (
        [("columns", 0, 100), ("columns", 0, 65_535)]
        if form == "columns"
        else [("bitmap", (1, 15), 0x80), ("bitmap", (1, 0), 0)]
    )
    weight = torch.zeros(20, 100)
    for name, place, value in cases:
        bad = copy.deepcopy(matrix)
        if name == "bitmap" and value == 0:
            bad.bitmap[1, 0] ^= 1
        else:
            getattr(bad, name)[place] = value
        with pytest.raises(ValueError, match=r"row_starts|columns|bitmap"):
            bad.write_into(weight)
        with pytest.raises(ValueError, match=r"m: "):
            bad.check("m")
    with pytest.raises(ValueError, match="expected one of them"):
        replace(matrix, columns=None, bitmap=None).write_into(weight)
    assert not weight.any()


@pytest.mark.parametrize("change", ["swap", "twice", "outside"])
@pytest.mark.parametrize("cols", [100, 70_001], ids=["uint16", "int32"])
def test_columns_rise_within_a_row(cols, change):
    """Checked before the first use, and again once a tensor was written."""
    matrix, _ = make(20, cols, 2.0 / cols)
    matrix = other_form(matrix) if matrix.columns is None else matrix
    matrix.write_into(torch.zeros(20, cols))
    row = int((matrix.row_starts.diff() >= 2).nonzero()[0])
    first = int(matrix.row_starts[row])
    pair = matrix.columns[first : first + 2].tolist()
    new = {"swap": pair[::-1], "twice": pair[:1] * 2, "outside": [pair[0], cols]}[change]
    matrix.columns[first : first + 2] = torch.tensor(new).to(matrix.columns.dtype)
    weight = torch.zeros(20, cols)
    match = "columns: value" if change == "outside" else f"columns: do not rise within row {row}"
    for bad in (matrix, copy.deepcopy(matrix)):
        with pytest.raises(ValueError, match=match):
            bad.write_into(weight)
        with pytest.raises(ValueError, match=f"m: {match}"):
            bad.check("m")
    assert not weight.any()


@pytest.mark.parametrize(("rows", "cols", "density"), SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2], ids=str)
def test_reading_the_kept_places(rows, cols, density, dtype):
    smaller, mask = make(rows, cols, density)
    weight = torch.randn(rows, cols).to(dtype)
    want, version = weight.float()[mask], weight._version
    for matrix in (smaller, other_form(smaller)):
        for t in (weight, weight.t().contiguous().t(), torch.nn.Parameter(weight)):
            got = matrix.read_from(t)
            assert got.dtype == dtype
            assert not got.requires_grad
            assert torch.equal(got.float(), want)
    assert weight._version == version
    with pytest.raises(ValueError, match="weight: expected shape"):
        smaller.read_from(torch.zeros(rows + 1, cols))


@pytest.mark.parametrize("cols", [200, 257, 5000, 70_001])
def test_packing_entries_that_lie_far_apart(cols):
    """Both forms of positions are packed alike, with fillers where a gap is too wide for its type."""
    torch.manual_seed(0)
    mask = torch.zeros(70, cols, dtype=torch.bool)
    mask[:, -3:] = True  # one gap over the whole row
    mask[1, ::256] = mask[2, ::255] = mask[3, ::64] = mask[4, ::511] = True  # just fitting, just not
    mask[5], mask[6, :100], mask[7] = True, True, False
    dense = torch.randn(70, cols) * mask
    smaller = SparseMatrix.from_mask(dense, mask)
    first, second = (pack(m, torch.float32, None, torch.device("cpu")) for m in (smaller, other_form(smaller)))
    for a, b in zip(first.map(torch.clone).__dict__.values(), second.__dict__.values(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(first.dense(70, cols, torch.float32), dense)


def test_other_values_at_the_same_places():
    matrix, mask = make(20, 30, 0.3)
    known = matrix.positions()
    other = matrix.with_values(-matrix.values)
    assert other.positions() is known
    assert torch.equal(other.to_dense(), -matrix.to_dense())
    assert torch.equal(matrix.mask(), mask)


def test_more_columns_than_an_index_can_tell():
    for cols in (-1, 2**31, 2**63 - 1):
        with pytest.raises(ValueError, match=f"num_cols: got {cols}, accepted are 0 to"):
            _cpu.SparsePositions(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), None, cols)


def test_copies_forget_the_checked_view():
    matrix, _ = make(20, 30, 0.02)
    assert matrix.columns is not None
    matrix.positions()
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix)), replace(matrix)):
        assert "_positions" not in other.__dict__
        assert torch.equal(other.to_dense(), matrix.to_dense())
