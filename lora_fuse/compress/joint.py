"""Compress-then-Serve: a bank of adapters as bases that all share and a small core for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.joint_adapter import JointAdapter, JointBasis
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.compress.joint_als import JointFit, Products, fit_diagonal, fit_full, in_span, unit_products
from lora_fuse.compress.joint_clusters import assign
from lora_fuse.merging.config import lora_config
from lora_fuse.merging.progress import track
from lora_fuse.merging.terms import (
    LayerTerm,
    Sources,
    Term,
    check_dtype,
    check_finite,
    layer_terms,
    load_sources,
    refuse_other_bases,
)

Form = Literal["full", "diagonal"]
FITS = {"full": fit_full, "diagonal": fit_diagonal}


@dataclass(frozen=True)
class JointReport:
    """What a joint compression kept; ``str()`` gives a table with a line per adapter.

    Args:
        errors: adapter -> module path -> relative error ``||delta - compressed|| / ||delta||`` in the Frobenius norm,
            computed before rounding.
        nbytes_before: of the adapters' factors and biases; heads are not counted, here or after.
        nbytes_after: of the bases and of all cores and biases.
    """

    errors: Mapping[str, Mapping[str, float]]
    nbytes_before: int
    nbytes_after: int

    @property
    def error(self) -> float:
        """Root mean square of the relative errors over all adapters and layers: each counts alike."""
        every = [e for layers in self.errors.values() for e in layers.values()]
        return _rms(every)

    def error_of(self, name: str) -> float:
        """Root mean square of one adapter's relative errors over its layers."""
        return _rms(list(self.errors[name].values()))

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.errors, "adapter", "all"))
        lines = [f"{'adapter':{width}}  {'relative error':>14}  {'worst layer':>11}"]
        for name, layers in self.errors.items():
            worst = max(layers.values(), default=0.0)
            lines.append(f"{name:{width}}  {self.error_of(name):>14.4f}  {worst:>11.4f}")
        lines.append(f"{'all':{width}}  {self.error:>14.4f}")
        ratio = self.nbytes_before / max(1, self.nbytes_after)
        lines.append(f"{self.nbytes_before:,} -> {self.nbytes_after:,} bytes, {ratio:.1f} times fewer")
        return "\n".join(lines)


def _rms(values: Sequence[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5 if values else 0.0


@dataclass(frozen=True, eq=False)
class JointBank:
    """Adapters that share bases: ``lf.attach(model, bank.adapters)`` serves them as they are.

    Args:
        bases: module path -> the bases of that layer, a pair per cluster.
        adapters: name -> its cores, in the order given.
        form: "full" or "diagonal".
        report: what the compression kept.
    """

    bases: Mapping[str, JointBasis]
    adapters: Mapping[str, JointAdapter]
    form: Form
    report: JointReport

    @property
    def nbytes(self) -> int:
        """Bytes of the bases and of everything that the adapters have of their own."""
        return sum(b.nbytes for b in self.bases.values()) + sum(a.nbytes for a in self.adapters.values())

    def to_adapter(self, name: str) -> LoraAdapter:
        """One adapter with factors of its own, which PEFT and vLLM can load: as large as a LoRA of the bank's rank.

        Raises:
            ValueError: no adapter of that name (those there are get listed).
        """
        adapter = self.adapters.get(name)
        if adapter is None:
            raise ValueError(f"name: the bank has no adapter {name!r}; it has {', '.join(map(repr, self.adapters))}")
        layers = {path: adapter.layer(path) for path in adapter.cores}
        heads = {path: dict(module) for path, module in adapter.modules_to_save.items()}
        config = lora_config(layers, heads, [adapter.config])
        return LoraAdapter(layers, heads, config=config, source=f"joint_compress({adapter.source})")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``joint.json`` and ``joint.safetensors``, both or neither; ``load_joint`` reads them.

        Args:
            directory: created if need be. A bank already in it is replaced; other files stay.
        Raises:
            ValueError: ``directory`` is a file, or an adapter is not sound.
        """
        from lora_fuse.compress.joint_files import save_joint  # the writer imports this module

        save_joint(self, directory)

    def __repr__(self) -> str:
        clusters = max((basis.u.shape[0] for basis in self.bases.values()), default=0)
        rank = max((basis.rank for basis in self.bases.values()), default=0)
        return (
            f"JointBank({len(self.adapters)} adapters, {len(self.bases)} layers, {self.form} cores of rank {rank}, "
            f"{clusters} cluster{'' if clusters == 1 else 's'}, {self.nbytes:,} bytes)"
        )


@torch.no_grad()
def joint_compress(
    adapters: Sources,
    rank: int = 16,
    num_clusters: int = 1,
    form: Form = "full",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> JointBank:
    """Compress many adapters together: ``scaling_i B_i A_i ~ U core_i V^T`` in every layer, U and V shared.

    A core has ``rank * rank`` numbers (``rank`` in the diagonal form), the bases are paid for once, so it pays from
    some tens of adapters on. The error that is minimised is that of the products scaled to norm 1: each counts alike.
    Alternating least squares on the factors; nothing of a weight's shape is formed.

    Args:
        adapters: a dict name -> adapter, or a list (names "0", "1", ...); an entry may be a path. Linear layers only;
            ranks, scalings and the sets of layers may differ.
        rank: columns of U and V, at most ``min(in, out)`` of each layer. Up to about 100 adapters the authors take half
            their number plus 7.
        num_clusters: groups of adapters with bases of their own; an adapter is in the same group in all layers. The
            authors take 25 for 500 and more adapters.
        form: "full": ``rank x rank`` cores between orthonormal bases. "diagonal": diagonal cores, bases free; far
            smaller per adapter and less exact.
        seed: of the random starts.
        dtype: of bases and cores. None: the first adapter's. Computed in fp32 (spans in fp64), rounded once.
        progress: show a bar on stderr.

    Returns:
        A ``JointBank``. ``lora_bias`` and ``modules_to_save`` stay each adapter's own, in full.

    Raises:
        ValueError: a layer that is no linear one, DoRA, replaced biases or token rows (they are named); factors that
            are not finite or do not fit each other; sizes out of range; an unknown form.
    Source: Brüel-Gabrielsson et al., Compress then Serve, arXiv:2407.00066.
    """
    for what, size in (("rank", rank), ("num_clusters", num_clusters)):
        if type(size) is not int or size < 1:
            raise ValueError(f"{what}: expected an integer of at least 1, got {size!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if form not in get_args(Form):
        raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    if dtype is not None:
        check_dtype(dtype)
    sources = load_sources(adapters)
    if num_clusters > len(sources):
        raise ValueError(f"num_clusters: {num_clusters} for {len(sources)} adapters; at most one each")
    terms = [Term(repr(name), adapter, 1.0) for name, adapter in sources.items()]
    for name, adapter in sources.items():
        _refuse(name, adapter)
    grouped = layer_terms(terms)
    check_finite(terms)
    refuse_other_bases(terms)
    names = {repr(name): i for i, name in enumerate(sources)}
    members = {path: torch.tensor([names[part.name] for part in parts]) for path, parts in grouped.items()}
    labels = torch.zeros(len(sources), dtype=torch.int64)
    if num_clusters > 1:
        labels = assign(len(sources), _sampled(grouped, members), num_clusters, rank, FITS[form], seed, progress)

    out = dtype or next((layer.lora_a.dtype for a in sources.values() for layer in a.layers.values()), torch.float32)
    bases: dict[str, JointBasis] = {}
    cores: list[dict[str, Tensor]] = [{} for _ in sources]
    errors: list[dict[str, float]] = [{} for _ in sources]
    for path, parts in track(grouped.items(), "joint compression", progress):
        bases[path] = _compress(path, parts, members[path], labels, num_clusters, rank, form, seed, out, cores, errors)
    small = {}
    for i, (name, adapter) in enumerate(sources.items()):
        biases = {
            path: (layer.lora_bias.double() * layer.scaling).to(out)
            for path, layer in adapter.layers.items()
            if layer.lora_bias is not None
        }
        heads = {path: dict(module) for path, module in adapter.modules_to_save.items()}
        small[name] = JointAdapter(bases, int(labels[i]), cores[i], biases, heads, adapter.source, adapter.config)
    before = sum(t.nbytes for a in sources.values() for layer in a.layers.values() for t in layer.tensors())
    own = sum(t.nbytes for a in small.values() for t in (*a.cores.values(), *a.lora_bias.values()))
    after = own + sum(basis.nbytes for basis in bases.values())
    return JointBank(bases, small, form, JointReport(dict(zip(sources, errors, strict=True)), before, after))


def _compress(
    path: str,
    parts: Sequence[LayerTerm],
    members: Tensor,
    labels: Tensor,
    num_clusters: int,
    rank: int,
    form: Form,
    seed: int,
    dtype: torch.dtype,
    cores: list[dict[str, Tensor]],
    errors: list[dict[str, float]],
) -> JointBasis:
    """The bases of one layer; the adapters' cores and errors go into ``cores`` and ``errors``."""
    out_features, in_features = parts[0].layer.weight_shape
    rank = min(rank, out_features, in_features)
    products, norms = _products(parts)
    u = torch.zeros(num_clusters, out_features, rank)
    v = torch.zeros(num_clusters, in_features, rank)
    for cluster in range(num_clusters):
        chosen = (labels[members] == cluster).nonzero().flatten()
        if not len(chosen):
            continue
        fit = fit_layer(products.chosen(chosen), rank, form, seed)
        u[cluster], v[cluster] = fit.u, fit.v
        for k, i in enumerate(chosen.tolist()):
            core = (fit.cores[k].double() * norms[i]).to(dtype)
            if not all_finite(core):
                raise ValueError(f"layer {path!r}: the core of adapter {parts[i].name} overflows {dtype}")
            cores[members[i]][path] = core
            errors[members[i]][path] = float(fit.errors[k]) ** 0.5
    return JointBasis(u.to(dtype), v.to(dtype))


def fit_layer(products: Products, rank: int, form: Form, seed: int) -> JointFit:
    """Bases and cores of products of norm 1, in the smaller coordinates of their span if there are such."""
    reduced, span = in_span(products)
    inner = min(rank, reduced.b.shape[1], reduced.a.shape[2])
    fit = span.lift(FITS[form](reduced, inner, seed))
    if inner == rank:
        return fit
    more = rank - inner  # the products together have a smaller rank: the rest of the bases stays zero
    pad = torch.nn.functional.pad
    cores = pad(fit.cores, (0, more) if form == "diagonal" else (0, more, 0, more))
    return replace(fit, u=pad(fit.u, (0, more)), v=pad(fit.v, (0, more)), cores=cores)


def _products(parts: Sequence[LayerTerm]) -> tuple[Products, Tensor]:
    return unit_products([p.layer.lora_b.double() * p.coef for p in parts], [p.layer.lora_a for p in parts])


_SAMPLED = 12  # layers that decide on the clusters, evenly spread


def _sampled(
    grouped: Mapping[str, Sequence[LayerTerm]], members: Mapping[str, Tensor]
) -> list[tuple[Products, Tensor]]:
    paths = list(grouped)
    step = max(1, len(paths) // _SAMPLED)
    return [(in_span(_products(grouped[path])[0])[0], members[path]) for path in paths[::step][:_SAMPLED]]


def _refuse(name: str, adapter: LoraAdapter) -> None:
    for path, layer in adapter.layers.items():
        if layer.kind != "linear":
            raise ValueError(
                f"adapter {name!r}: layer {path!r} is a {layer.kind} layer; joint_compress takes linear layers only"
            )
        if layer.magnitude is not None:
            raise ValueError(
                f"adapter {name!r}: uses DoRA (layer {path!r}); its magnitudes belong to the product as it is, so it "
                "cannot be compressed"
            )
    for what, held in (("biases of the base", adapter.base_biases), ("token rows", adapter.trainable_tokens)):
        if held:
            first: Any = next(iter(held))
            raise ValueError(f"adapter {name!r}: it replaces {what} ({first!r}), which a joint bank does not hold")
