"""Layers with slots for joint adapters: ``y[row] += weight * U_c core V_c^T x[row]``, U and V shared by a cluster.

Three products of ``multi_lora``, so mixed batches, every device and autograd come along: down with the clusters as
slots, the cores with the adapters as slots, up with the clusters again. Identities fill the factors that a product
lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.joint_adapter import JointAdapter, JointBasis
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.nn.linear import add_lora
from lora_fuse.nn.sparse_site import Call, SiteSlots
from lora_fuse.nn.targets import device_of, pool_dtype


@dataclass(frozen=True)
class JointOwn:
    """One joint adapter's part in one layer."""

    adapter: JointAdapter
    path: str

    @property
    def basis(self) -> JointBasis:
        return self.adapter.bases[self.path]

    @property
    def core(self) -> Tensor:
        return self.adapter.cores[self.path]


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a routing whose slots hold joint adapters.

    Args:
        clusters: which row uses which cluster's bases.
        cores: which row uses which adapter's core.
        up: ``clusters`` with the pairs' weights.
        rows: where a row has several pairs, every pair is a row of its own, made from this row; else None.
        slots, places: ``[num_pairs]``, the slot of each pair and its row, in ``x`` or, if there are such, in ``rows``.
        weights: ``[num_pairs, 1]`` or None, likewise.
    """

    clusters: Routing
    cores: Routing
    up: Routing
    rows: Tensor | None
    slots: Tensor
    places: Tensor
    weights: Tensor | None


class JointSlots(SiteSlots):
    """The bases of one layer and a core per slot."""

    def __init__(self, owner: nn.Module, num_slots: int, one_entry: bool = False) -> None:
        super().__init__(owner, num_slots, one_entry)
        self.__dict__.update(assignment=(-1,) * num_slots, fingerprint="")
        self.down: AdapterPool | None = None
        self.cores: AdapterPool | None = None
        self.up: AdapterPool | None = None
        self.register_buffer("diagonals", None, persistent=False)  # [num_slots, rank], instead of cores
        self.register_buffer("biases", None, persistent=False)  # [num_slots, out_features] once an adapter has one

    assignment: tuple[int, ...]  # slot -> cluster, -1 where a slot is empty
    fingerprint: str  # of the bases that it holds
    diagonals: Tensor | None
    biases: Tensor | None

    @property
    def pools(self) -> list[AdapterPool]:
        """Down, cores (if they are matrices) and up; none before the first adapter."""
        return [pool for pool in (self.down, self.cores, self.up) if pool is not None]

    def _write(self, slot: int, own: Any) -> None:
        assert isinstance(own, JointOwn)
        with torch.inference_mode(False):
            if self.fingerprint != own.basis.fingerprint:
                self._set_basis(own)
            core = own.core
            if core.dim() == 1:
                assert self.diagonals is not None
                self.diagonals.data[slot] = core.to(self.diagonals)
            else:
                assert self.cores is not None
                self.cores.write(slot, core, torch.eye(core.shape[0]), 1.0)
            self._write_bias(slot, own.adapter.lora_bias.get(own.path))
        self.__dict__["assignment"] = _replaced(self.assignment, slot, own.adapter.cluster)

    def _set_basis(self, own: JointOwn) -> None:
        basis, dtype, device = own.basis, pool_dtype(self.owner, own.core.dtype), device_of(self.owner)
        clusters, out_features, rank = basis.u.shape
        in_features = basis.v.shape[1]
        eye = torch.eye(rank)
        self.down = AdapterPool(clusters, rank, in_features, rank, dtype, device)
        self.up = AdapterPool(clusters, rank, rank, out_features, dtype, device)
        for cluster in range(clusters):
            self.down.write(cluster, basis.v[cluster].t(), eye, 1.0)
            self.up.write(cluster, eye, basis.u[cluster], 1.0)
        self.cores = self.diagonals = None
        if own.core.dim() == 1:
            self.diagonals = torch.zeros(self.num_slots, rank, dtype=dtype, device=device)
        else:
            self.cores = AdapterPool(self.num_slots, rank, rank, rank, dtype, device)
        self.biases = None
        self.__dict__["fingerprint"] = basis.fingerprint

    def _write_bias(self, slot: int, bias: Tensor | None) -> None:
        if bias is not None and self.biases is None:
            assert self.up is not None
            self.biases = self.up.pool_b.new_zeros(self.num_slots, self.up.out_features)
        if self.biases is not None:
            self.biases.data[slot] = 0 if bias is None else bias.to(self.biases)

    def _clear(self, slot: int) -> None:
        self.__dict__["assignment"] = _replaced(self.assignment, slot, -1)
        if self.cores is not None:
            self.cores.clear(slot)

    def serve(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        lead = tuple(x.shape[:-1])
        routing = call.routing(lead, x.device)
        pairs = None if routing is None else self._pairs(routing)
        if pairs is None:
            return y
        assert self.down is not None
        assert self.up is not None
        flat = x.reshape(-1, x.shape[-1]).to(self.down.pool_a.dtype)
        if pairs.rows is not None:
            flat = flat[pairs.rows]
        h = multi_lora(flat, self.down, pairs.clusters)
        if self.cores is not None:
            h = multi_lora(h, self.cores, pairs.cores)
        else:
            assert self.diagonals is not None
            h = h * h.new_zeros(h.shape).index_copy(0, pairs.places, self.diagonals[pairs.slots])
        if pairs.rows is None:
            served = add_lora(y.reshape(-1, y.shape[-1]), h, self.up, pairs.up, call.fresh)
        else:
            delta = multi_lora(h, self.up, pairs.up)
            served = y.reshape(-1, y.shape[-1]).index_add(0, pairs.rows, delta.to(y.dtype))
        if self.biases is not None:
            shift = self.biases[pairs.slots] if pairs.weights is None else self.biases[pairs.slots] * pairs.weights
            rows = pairs.places if pairs.rows is None else pairs.rows
            served = served.index_add(0, rows, shift.to(served.dtype))
        return served.view(y.shape)

    def _pairs(self, routing: Routing) -> _Pairs | None:
        """Laid out once per routing for all layers whose slots are assigned alike."""
        known = routing.__dict__.setdefault("_joint", {})
        if self.assignment not in known:
            with torch.inference_mode(False), torch.no_grad():
                known[self.assignment] = self._lay_out(routing)
        return known[self.assignment]  # type: ignore[no-any-return]

    def _lay_out(self, routing: Routing) -> _Pairs | None:
        slots, weights = routing.pair_slots(), routing.weights
        clusters = torch.tensor(self.assignment, device=routing.device)[slots]
        kept = clusters >= 0
        rows, slots, clusters = routing.rows[kept].long(), slots[kept], clusters[kept]
        if not len(rows):
            return None
        weights = None if weights is None else weights[kept]
        count, gathered = routing.num_rows, None
        if routing.row_starts is not None:
            count, gathered = len(rows), rows
            rows = torch.arange(count, device=rows.device)
        assert self.down is not None
        num_clusters, leases = self.down.num_slots, routing.leases
        return _Pairs(
            Routing.from_pairs(rows, clusters, None, count, num_clusters, leases),
            Routing.from_pairs(rows, slots, None, count, self.num_slots, leases),
            Routing.from_pairs(rows, clusters, weights, count, num_clusters, leases),
            gathered,
            slots,
            rows,
            None if weights is None else weights[:, None],
        )

    def extra_repr(self) -> str:
        rank = 0 if self.down is None else self.down.max_rank
        return f"{super().extra_repr()}, joint rank {rank}"


def _replaced(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
