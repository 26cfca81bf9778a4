"""When a routed op may call its kernel directly, and when torch has to see it; the same for every such op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fuse import functional
from lora_fuse.adapters.routing import Routing


class Seen(TorchDispatchMode):
    """Records the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class StepsAside:
    """Wherever torch must see the op, it does; with nothing to see, the dispatcher is not entered.

    A subclass says which op; its pool has to be linear in ``x``.
    """

    op: ClassVar[str]  # of the public function, of the op, and with "_eager" of the fast path
    pool: nn.Module

    def make_pool(self) -> nn.Module:
        """Two slots, 20 features in, 12 out, fp32."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = self.make_pool()
        self.routing = Routing.from_slots(torch.tensor([0, 1, -1, 0]), 2)
        self.x = torch.randn(4, 20)
        self.kernel_calls = 0
        fast = getattr(functional, f"_{self.op}_eager")

        def counted(*args: Any) -> bool:
            done = fast(*args)
            self.kernel_calls += done
            return done

        monkeypatch.setattr(functional, f"_{self.op}_eager", counted)
        self.want = self.call(self.x)
        assert self.kernel_calls == 1
        self.kernel_calls = 0

    def call(self, x: Tensor, routing: Routing | None = None, **kwargs: Any) -> Tensor:
        function: Callable[..., Tensor] = getattr(functional, self.op)
        return function(x, self.pool, routing or self.routing, **kwargs)

    def test_dispatch_mode(self):
        with Seen() as seen:
            got = self.call(self.x)
        assert any(name.startswith(f"lora_fuse.{self.op.removesuffix('_linear')}.") for name in seen.names)
        assert self.kernel_calls == 0
        assert torch.equal(got, self.want)

    def test_function_mode(self):
        class Functions(torch.overrides.TorchFunctionMode):
            seen: list = []  # noqa: RUF012

            def __torch_function__(self, func, types, args=(), kwargs=None):
                self.seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Functions() as mode:
            self.call(self.x)
        assert any(self.op.removesuffix("_linear") in name for name in mode.seen)
        assert self.kernel_calls == 0

    def test_subclass(self):
        class Mine(torch.Tensor):
            pass

        got = self.call(self.x.as_subclass(Mine))
        assert type(got) is Mine
        assert self.kernel_calls == 0

    def test_grad(self):
        x = self.x.clone().requires_grad_()
        assert self.call(x).requires_grad
        assert self.kernel_calls == 0
        with torch.no_grad():
            assert not self.call(x).requires_grad
        assert self.kernel_calls == 1

    def test_functorch(self):
        got = torch.func.grad(lambda x: self.call(x).square().sum())(self.x)
        x = self.x.clone().requires_grad_()
        (want,) = torch.autograd.grad(self.call(x).square().sum(), x)
        torch.testing.assert_close(got, want)
        assert self.kernel_calls == 0

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's word on its own per-sample fallback
    def test_vmap(self):
        batch = torch.stack([self.x, 2 * self.x])
        got = torch.func.vmap(self.call)(batch)
        torch.testing.assert_close(got, torch.stack([self.want, 2 * self.want]))
        assert self.kernel_calls == 0

    def test_forward_mode_ad(self):
        """The op is linear in x and in the weights, so its jvp is itself."""
        tangent = torch.randn_like(self.x)
        _, got = torch.func.jvp(self.call, (self.x,), (tangent,))
        torch.testing.assert_close(got, self.call(tangent))
        rows, slots = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 0, 0, 1])

        def of_weights(w: Tensor) -> Tensor:
            return self.call(self.x, Routing.from_pairs(rows, slots, w, 4, 2))

        weights, tangent = torch.randn(4), torch.randn(4)
        self.kernel_calls = 0
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weights, tangent)
            got = torch.autograd.forward_ad.unpack_dual(of_weights(dual)).tangent
        assert self.kernel_calls == 0
        torch.testing.assert_close(got, of_weights(tangent))

    def test_out_is_refused_under_transforms(self):
        """Written in place, a tangent or a vmapped batch would be lost."""

        def call(x: Tensor) -> Tensor:
            return self.call(x, out=torch.zeros(4, 12))

        with pytest.raises(ValueError, match="out: cannot be given under a functorch transform or forward-mode AD"):
            torch.func.jvp(call, (self.x,), (self.x,))
        with pytest.raises(ValueError, match="out: cannot be given under"):
            torch.func.vmap(call)(self.x[None])
        with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="out: cannot be given under"):
            call(torch.autograd.forward_ad.make_dual(self.x, self.x))

    def test_negated_view(self):
        """Its memory holds the negative of what it is."""
        torch.testing.assert_close(self.call(torch._neg_view(self.x)), -self.want)
        assert self.kernel_calls == 0
        with pytest.raises(ValueError, match="out: is a view whose memory holds the negative"):
            self.call(self.x, out=torch._neg_view(torch.zeros(4, 12)))

    def test_autocast_follows_linear(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.call(self.x)
            assert got.dtype == torch.nn.functional.linear(self.x, torch.randn(12, 20)).dtype == torch.bfloat16
        assert self.kernel_calls == 0
        torch.testing.assert_close(got.float(), self.want, rtol=0.05, atol=0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_more_dimensions_than_the_kernel_reads(self, dtype):
        self.pool.to(dtype)
        x = self.x.to(dtype)
        want = self.call(x)
        self.kernel_calls = 0
        many = x.view(1, 1, 2, 1, 1, 1, 1, 2, 20)
        got = self.call(many)
        assert self.kernel_calls == 0
        assert got.shape == (*many.shape[:-1], 12)
        assert torch.equal(got.view(4, 12), want)
        out = torch.ones_like(got)
        assert self.call(many, out=out) is out
        assert torch.equal(out.view(4, 12), self.call(x, out=torch.ones_like(want)))

    def test_tensors_without_data(self):
        """Shapes alone: the fake's answer, with autocast as without."""
        x = self.x.to("meta")
        got = self.call(x)
        assert (got.device.type, got.shape, got.dtype) == ("meta", (4, 12), torch.float32)
        out = torch.empty(4, 12, device="meta")
        assert self.call(x, out=out) is out
        with torch.autocast("cpu", torch.bfloat16):
            assert self.call(x).device.type == "meta"
        assert self.kernel_calls == 0

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # still used, and still traced right
    def test_jit_trace(self):
        traced = torch.jit.trace(self.call, (self.x,), check_trace=False)
        assert f"lora_fuse::{self.op.removesuffix('_linear')}" in str(traced.graph)
