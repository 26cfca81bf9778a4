"""The linear layers of an 8B decoder as a model has them: q, k, v packed, o, gate and up packed, down.

Ours is the attached model itself (``attach(pack=True)``, and with each of its options); the rivals' kernels run on
packed weights, layer by layer. All over the bare products, packed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lora_fuse as lf
from benchmarks.gpu import measure, report
from benchmarks.gpu.own_ways import OPTIONS
from benchmarks.gpu.rival_ways import Factors, Problem, Way, settle, ways
from lora_fuse.adapters.lora import LoraLayer

SCALING, RANK = 0.5, 16
LIMIT = 4.0  # machine epsilons of the largest result


@dataclass(frozen=True)
class Sizes:
    """A decoder layer's."""

    hidden: int
    key_value: int
    wide: int
    layers: int

    @property
    def sites(self) -> dict[str, tuple[int, dict[str, int]]]:
        """By site: input features, and the output features of its parts."""
        return {
            "self_attn.qkv": (self.hidden, {"q_proj": self.hidden, "k_proj": self.key_value, "v_proj": self.key_value}),
            "self_attn.o": (self.hidden, {"o_proj": self.hidden}),
            "mlp.gate_up": (self.hidden, {"gate_proj": self.wide, "up_proj": self.wide}),
            "mlp.down": (self.wide, {"down_proj": self.hidden}),
        }


LLAMA_8B = Sizes(4096, 1024, 14336, 16)  # of 32 layers, which no cache holds either
TINY = Sizes(64, 32, 96, 2)
SHAPES = [(1, 1), (16, 8), (64, 8), (4, 4), (16, 1), (4096, 8)]  # rows, adapters


class Layer(nn.Module):
    """All linear layers of one decoder layer, and nothing between them."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for site, (fan_in, parts) in sizes.sites.items():
            for name, width in parts.items():
                made = nn.Linear(fan_in, width, bias=False, device="meta")
                made.weight = nn.Parameter(
                    torch.randn(width, fan_in, device=device, dtype=dtype) / fan_in**0.5, requires_grad=False
                )
                setattr(getattr(self, site.split(".")[0]), name, made)

    def forward(self, x: Tensor, wide: Tensor) -> list[Tensor]:
        a, m = self.self_attn, self.mlp
        return [a.q_proj(x), a.k_proj(x), a.v_proj(x), a.o_proj(x), m.gate_proj(x), m.up_proj(x), m.down_proj(wide)]


class Decoder(nn.Module):
    """Layers, each on the same input; the outputs of the first are returned."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes, device, dtype) for _ in range(sizes.layers))

    def forward(self, x: Tensor, wide: Tensor) -> list[Tensor]:
        first: list[Tensor] = self.layers[0](x, wide)
        for layer in self.layers[1:]:
            layer(x, wide)
        return first


def paths(sizes: Sizes) -> list[str]:
    """Of the linear layers, within a decoder layer."""
    return [f"{site.split('.')[0]}.{part}" for site, (_, parts) in sizes.sites.items() for part in parts]


class Bench:
    """A decoder bare, attached both ways, and as the rivals take it; adapters of one rank."""

    def __init__(self, sizes: Sizes, num_slots: int, dtype: torch.dtype) -> None:
        self.sizes, self.num_slots, device = sizes, num_slots, measure.device()
        self.device, self.dtype = device, dtype
        bare = Decoder(sizes, device, dtype)
        factors: dict[str, tuple[Tensor, Tensor]] = {}  # [num_slots, rank, in], [num_slots, out, rank]
        for i in range(sizes.layers):
            for path in paths(sizes):
                out, fan_in = bare.layers[i].get_submodule(path).weight.shape
                a = torch.randn(num_slots, RANK, fan_in, device=device, dtype=dtype) / fan_in**0.5
                b = torch.randn(num_slots, out, RANK, device=device, dtype=dtype) / RANK**0.5
                factors[f"layers.{i}.{path}"] = a, b
        self.factors = factors
        self.weights = [self._packed(bare, i) for i in range(sizes.layers)]
        adapters = {
            str(slot): lf.LoraAdapter({p: LoraLayer(a[slot], b[slot], SCALING) for p, (a, b) in factors.items()})
            for slot in range(num_slots)
        }
        self.models = {}
        for name, options in OPTIONS.items():
            model = Decoder(sizes, device, dtype)
            model.load_state_dict(bare.state_dict())
            self.models[name] = lf.attach(model, adapters, num_slots=num_slots, pack=True, **options)

    def _packed(self, bare: Decoder, i: int) -> dict[str, Factors]:
        """A layer's weights and factors, its siblings behind one another."""
        made = {}
        for site, (_, parts) in self.sizes.sites.items():
            room = site.split(".")[0]
            weight = torch.cat([bare.layers[i].get_submodule(f"{room}.{part}").weight for part in parts])
            a, b = zip(*(self.factors[f"layers.{i}.{room}.{part}"] for part in parts), strict=True)
            made[site] = Factors(weight, [*a], [*b], torch.cat(a, 1), torch.cat(b, 1))
        return made

    @contextlib.contextmanager
    def batch(self, rows: int, adapters: int) -> Iterator[None]:
        """Rows that fall to the adapters in equal runs, selected in the models too: a context of its own for each size,
        since a captured graph ties its context to a number of rows."""
        self.x = torch.randn(rows, self.sizes.hidden, device=self.device, dtype=self.dtype)
        self.wide = torch.randn(rows, self.sizes.wide, device=self.device, dtype=self.dtype)
        self.slots = [row * adapters // rows for row in range(rows)]
        entries = [str(slot) for slot in self.slots]
        self.problems = {
            site: Problem(
                self.wide if site == "mlp.down" else self.x,
                self.slots,
                [RANK] * self.num_slots,
                SCALING,
                tuple(parts.values()),
                [weights[site] for weights in self.weights],
            )
            for site, (_, parts) in self.sizes.sites.items()
        }
        by_site = {site: ways(problem) for site, problem in self.problems.items()}
        names = [n for n in by_site["mlp.down"] if n.startswith(("vllm", "sglang"))]
        self.rivals: dict[str, dict[str, Way]] = {n: {site: by_site[site][n] for site in by_site} for n in names}
        with contextlib.ExitStack() as selected:
            for model in self.models.values():
                selected.enter_context(lf.use_adapters(model, entries))
            yield

    def nbytes(self) -> float:
        """What the LoRA parts of one layer must move."""
        item, total = self.dtype.itemsize, 0
        for fan_in, parts in self.sizes.sites.values():
            factors = len(set(self.slots)) * RANK * (len(parts) * fan_in + sum(parts.values()))
            total += item * (factors + len(self.slots) * (fan_in + 2 * sum(parts.values())))
        return total

    def check(self) -> None:
        """The first layer of each way against fp64; a rival that is wrong or fails is told and left out.

        Raises:
            SystemExit: ours is wrong.
        """
        limit, want = LIMIT * torch.finfo(self.dtype).eps, {}
        for site, p in self.problems.items():
            at = p.copies[0]
            want[site] = p.x.double() @ at.weight.double().t()
            for slot in set(self.slots):
                rows = p.int32([row for row, s in enumerate(self.slots) if s == slot]).long()
                for a, b, part in zip(at.a, at.b, want[site].split(p.widths, -1), strict=True):
                    part[rows] += SCALING * (p.x[rows].double() @ a[slot].double().t()) @ b[slot].double().t()
        together = torch.cat([*want.values()], -1)
        for name, model in self.models.items():
            measure.require(f"decoder: {name}", torch.cat(model(self.x, self.wide), -1), together, limit)
        for name, rival in list(self.rivals.items()):
            try:
                for site, way in rival.items():
                    measure.require(f"{name}, {site}", way.with_base(self.problems[site], 0), want[site], limit)
            except (Exception, SystemExit) as problem:
                measure.tell(name, problem)
                del self.rivals[name]

    def time(self) -> tuple[dict[str, float], dict[str, str]]:
        """Microseconds a layer, and which of a rival's plans was the fastest."""

        def every(of: Callable[[str, int], Any]) -> Callable[[int], None]:
            def run(_: int) -> None:
                for i in range(self.sizes.layers):
                    for site in self.problems:
                        of(site, i)

            return run

        problems = self.problems
        calls = {"linear": every(lambda site, i: linear(problems[site].x, problems[site].copies[i].weight))}
        for name, model in self.models.items():
            calls[f"{name} + base"] = lambda _, model=model: model(self.x, self.wide)
        for name, rival in self.rivals.items():
            calls[f"{name} + base"] = every(lambda site, i, r=rival: r[site].with_base(problems[site], i))
        timed = measure.device_us(calls, 1, seconds=1.0, may_fail=[f"{name} + base" for name in self.rivals])
        us, chosen = {n: t / self.sizes.layers for n, t in timed.items()}, {}
        for rival_name, kept in (("vllm", "vllm tuned"), ("sglang v2", "sglang v2")):
            if any(name.startswith(rival_name) for name in us):
                chosen[kept] = settle(us, rival_name, kept)
        return us, chosen


def bench() -> tuple[Bench, list[tuple[int, int]]]:
    if measure.device().type == "cpu":
        return Bench(TINY, 2, torch.float16), [(5, 2), (3, 1)]
    return Bench(LLAMA_8B, 8, torch.bfloat16), SHAPES


def compile_share(share: slice) -> Iterator[None]:
    """Run all ways of some shapes once, on one layer."""
    of = Bench(replace(LLAMA_8B, layers=1), 8, torch.bfloat16)
    for rows, adapters in SHAPES[share]:
        with of.batch(rows, adapters):
            of.check()
        yield


def check() -> None:
    on_card = measure.device().type == "cuda"
    made = Bench(TINY, 2, torch.bfloat16 if on_card else torch.float16)
    with made.batch(5, 2):
        made.check()


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    of, shapes = bench()
    for rows, adapters in shapes[: 3 if at.quick else None]:
        shape = f"layer r{RANK} T{rows} N{adapters}"
        if at.budget.over(shape):
            continue
        with of.batch(rows, adapters):
            of.check()
            us, chosen = of.time()
        about = {"rows": rows, "adapters": adapters, "chosen": chosen}
        found = report.row("decoder", shape, us, of.nbytes(), at.bandwidth, "linear", **about)
        report.show(found)
        yield found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    decode = [r for r in rows if r["rows"] <= 64]
    for name in OPTIONS:
        most, shape = max(((r["overhead"][name], r["shape"]) for r in decode), default=(None, ""))
        made.append(
            report.target(f"{name}: packed 8B decoder layer, 1-64 rows: most over the linears", 0.10, most, note=shape)
        )
    return made
