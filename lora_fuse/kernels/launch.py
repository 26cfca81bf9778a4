"""One launch of a Triton kernel, as data: what runs it, and what compiles it ahead of time, read the same fields.

Triton's own way of launching looks at every argument again, in Python, each time. So what an op launched is kept under
all that it depends on (``lora_fuse._cpu.operand_key``: dtypes, devices, shapes, strides, alignments of the op's
operands), as ``Prepared``: compiled kernels, grids and arguments, in which only addresses change from call to call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from lora_fuse import _cpu
from lora_fuse.kernels.direct import direct_launches

Operands = Sequence[Tensor | int | None]
_MOST_PREPARED = 4096  # of one op; a batch of another size is another entry
_KNOWS_LAUNCHER = triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.hip is None
# Whether launches are made without Triton's launcher, see direct.py.
DIRECT = os.environ.get("LORA_FUSE_DIRECT_LAUNCH") == "1"
_compiled: dict[int, Any] = {}  # every kernel that was asked for, by id
_kept: dict[int, dict[bytes, Any]] = {}  # what ``run`` put launches into, by id
_forgotten = 0  # times


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments in the kernel's order; constexprs by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread
    scratch: tuple[Tensor, ...] = ()  # among the launches' arguments: memory that holds nothing yet
    instruction: int | None = None  # on AMD, rows and columns of a matrix instruction; None: as large as blocks allow
    ahead: bool = False  # may start before the launch before it has ended (programmatic dependent launch)

    @property
    def options(self) -> dict[str, Any]:
        made = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        more = {
            "maxnreg": self.max_registers,
            "matrix_instr_nonkdim": self.instruction,
            "launch_pdl": self.ahead,
        }
        return made | {name: value for name, value in more.items() if value}

    @property
    def bound(self) -> tuple[Any, ...]:
        """A value for each of the kernel's parameters."""
        values = iter(self.args)
        names = self.kernel.arg_names
        made = tuple([self.constexprs[name] if name in self.constexprs else next(values) for name in names])
        assert next(values, None) is None
        return made

    def run(self) -> Any:
        """Launch, on the current device and stream; compiled first if need be. Returns Triton's compiled kernel."""
        return _counted(self.kernel[self.grid](*self.args, **self.constexprs, **self.options))

    @property
    def variant(self) -> tuple[Any, ...]:
        """All that chooses the compiled kernel, for tensors of the same dtypes and alignments."""
        sizes = []
        for value, parameter in zip(self.bound, self.kernel.params, strict=True):
            if isinstance(value, int) and not parameter.is_constexpr:
                wide = not -(2**31) <= value < 2**31
                sizes.append((wide,) if parameter.do_not_specialize else (wide, value == 1, value % 16 == 0))
            else:
                sizes.append((value is None,))
        return self.kernel, tuple(self.constexprs.items()), tuple(self.options.items()), tuple(sizes)


def compile_all(launches: Iterable[Launch], device: torch.device) -> int:
    """Compile and load what these would run, side by side, and launch nothing. Returns how many kernels there are.

    Args:
        launches: their tensors may be on the meta device.
        device: where they would run.
    """
    with on_device(device):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, triton.AsyncCompileMode(threads):
            asked = [
                each.kernel.run(*each.args, grid=each.grid, warmup=True, **each.constexprs, **each.options)
                for each in launches
            ]
        kernels = {id(kernel): kernel for kernel in map(_counted, asked)}
        for kernel in kernels.values():
            kernel._init_handles()
    return len(kernels)


def compilations() -> int:
    """How many different kernels this process has asked Triton for."""
    return len(_compiled)


def _counted(kernel: Any) -> Any:
    if isinstance(kernel, triton.FutureKernel):
        kernel = kernel.result()
    if kernel is not None:
        _compiled.setdefault(id(kernel), kernel)
    return kernel


class Arguments:
    """The values of launches' parameters, for operands that lie elsewhere. Made by ``arguments_of``."""

    __slots__ = ("constants", "picks", "places", "scratch", "views")

    def __init__(self) -> None:
        self.scratch: list[tuple[torch.Size, torch.dtype]] = []
        # Of each launch: (operand or scratch by number, bytes from its address), or (-1, the value itself).
        self.places: list[list[tuple[int, Any]]] = []
        self.views: list[tuple[int, int]] = []  # which address it hangs on, and bytes from there
        self.constants: list[Any] = []
        self.picks: list[Callable[[list[Any]], tuple[Any, ...]]] = []  # of each launch, out of ``values``

    def values(self, addresses: Sequence[int]) -> list[Any]:
        """All there are. Args: addresses of the operands, then of the scratch."""
        values: list[Any] = [*addresses]
        values += [values[base] + offset for base, offset in self.views]
        values += self.constants
        return values


def arguments_of(launches: Sequence[Launch], operands: Operands) -> Arguments | None:
    """What hangs on the operands' addresses, and what does not.

    Args:
        launches: their tensors are operands, views of operands, or declared as scratch.
        operands: the op's; launches may hang on the values of integers.
    Returns:
        None if it cannot be told where a tensor would lie next time.
    """
    scratch = [t for launch in launches for t in launch.scratch]
    bases = [*operands, *scratch]
    made = Arguments()
    made.scratch = [(t.shape, t.dtype) for t in scratch]
    for launch in launches:
        places = [_place(value, bases) if isinstance(value, Tensor) else (-1, value) for value in launch.bound]
        if None in places:
            return None
        made.places.append([place for place in places if place is not None])
    made.views = [*dict.fromkeys(place for row in made.places for place in row if place[0] >= 0 and place[1])]
    made.constants = [value for row in made.places for base, value in row if base < 0]
    first_view, at = len(bases), len(bases) + len(made.views)
    for row in made.places:
        index = []
        for base, value in row:
            if base < 0:
                index.append(at)
                at += 1
            else:
                index.append(first_view + made.views.index((base, value)) if value else base)
        made.picks.append(itemgetter(*index))
    return made


def _place(tensor: Tensor, bases: Operands) -> tuple[int, Any] | None:
    """Whose memory the tensor is, and bytes from there. None: it may hang on several operands, or on none."""
    for i, base in enumerate(bases):
        if base is tensor:
            return i, 0
    memory = tensor.untyped_storage().data_ptr()
    owners = [(i, t) for i, t in enumerate(bases) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() == memory]
    at_start = [(i, t) for i, t in owners if t.data_ptr() == tensor.data_ptr()]
    for found in (at_start, owners):
        if len(found) == 1:
            return found[0][0], tensor.data_ptr() - found[0][1].data_ptr()
    return None


class Prepared:
    """Launches that were made, to be made again on operands that differ in their addresses alone.

    Args:
        launches: what was made.
        kernels: Triton's compiled kernel of each.
        arguments: of the launches.
        device: of the operands.
    """

    __slots__ = ("arguments", "device", "steps")

    def __init__(
        self, launches: Sequence[Launch], kernels: Sequence[Any], arguments: Arguments, device: torch.device
    ) -> None:
        self.arguments, self.device, self.steps = arguments, device, []
        for launch, kernel, pick in zip(launches, kernels, arguments.picks, strict=True):
            start = kernel.run  # loads the kernel, so that there is a function
            self.steps.append((start, (*launch.grid, 1, 1)[:3], kernel.function, kernel.packed_metadata, pick))

    def __call__(self, addresses: tuple[int, ...]) -> bool:
        """Launch on operands that lie there; False, and nothing done, if Triton's own way has to."""
        if hooked():
            return False
        if torch._C._cuda_getDevice() == self.device.index:
            self._launch(addresses)
        else:
            with torch.cuda.device(self.device):
                self._launch(addresses)
        return True

    def _launch(self, addresses: tuple[int, ...]) -> None:
        arguments, device = self.arguments, self.device
        scratch = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in arguments.scratch]
        values = arguments.values([*addresses, *[t.data_ptr() for t in scratch]])
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for start, grid, function, metadata, pick in self.steps:
            start(*grid, stream, function, metadata, None, None, None, *pick(values))


def prepare(
    launches: Sequence[Launch], kernels: Sequence[Any], operands: Operands
) -> Prepared | _cpu.DirectLaunches | None:
    """What makes these launches again, or None where Triton's own way is the only one: in the interpreter, and for
    versions of Triton that this does not know."""
    device = next(t.device for t in operands if isinstance(t, Tensor))
    if not _KNOWS_LAUNCHER or device.type != "cuda" or any(kernel is None for kernel in kernels):
        return None
    arguments = arguments_of(launches, operands)
    if arguments is None:
        return None
    made = Prepared(launches, kernels, arguments, device)
    return direct_launches(made, launches, kernels, hooked) if DIRECT else made


def run(launches: Sequence[Launch], operands: Operands, ready: dict[bytes, Any]) -> None:
    """Launch in order, on the device of the operands, and put what makes the launches again into ``ready``."""
    device, forgotten = next(t.device for t in operands if isinstance(t, Tensor)), _forgotten
    with on_device(device):
        kernels = [launch.run() for launch in launches]
        key = _cpu.operand_key(tuple(operands))
        made = None if key is None else prepare(launches, kernels, operands)
    if key is not None and made is not None and forgotten == _forgotten:
        if len(ready) >= _MOST_PREPARED:
            ready.clear()
        _kept[id(ready)] = ready
        ready[key] = made


def forget() -> None:
    """Nothing is launched as it was before: the next call plans anew."""
    global _forgotten
    _forgotten += 1
    for ready in list(_kept.values()):
        ready.clear()


def pitch(rows: Tensor) -> int:
    """From one row to the next. A lone row's stride is never used, and callers' views give it any value."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def hooked() -> bool:
    """Whether somebody wants to see launches: a profiler."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
