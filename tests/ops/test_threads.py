"""The process around the kernel: one OpenMP runtime, torch's thread count, forks, new threads, instruction sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from cases import make_pool
from forks import NEEDS_FORK, QUIET, check_use_fork_use

from lora_fuse import _cpu
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def big_call() -> torch.Tensor:
    """Large enough for a team of threads."""
    torch.manual_seed(0)
    pool = make_pool(4, 16, 512, 512, torch.float32)
    return multi_lora(torch.randn(256, 512), pool, Routing.from_slots(torch.arange(256) % 4, 4))


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@LINUX
@pytest.mark.parametrize("first", ["import torch", "import lora_fuse"])
def test_one_openmp_runtime(first):
    code = f"""
{first}
import torch, lora_fuse, pathlib, re
print(len(set(re.findall(r"/\\S*/lib[gi]omp\\S*", pathlib.Path("/proc/self/maps").read_text()))))
"""
    done = python(code)
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


@LINUX
def test_torch_set_num_threads_is_obeyed():
    code = """
import os, torch
torch.set_num_threads(1)
import sys; sys.path.insert(0, "tests/ops")
from test_threads import big_call
tasks = lambda: len(os.listdir("/proc/self/task"))
big_call()
before = tasks()
big_call()
assert tasks() == before, "one thread asked for, a team started"
torch.set_num_threads(3)
big_call()
assert tasks() >= before + 2, "three threads asked for"
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("two_threads")
@NEEDS_FORK
@QUIET
def test_use_fork_use():
    pool = make_pool(4, 16, 512, 512, torch.float32)
    x, routing = torch.randn(256, 512), Routing.from_slots(torch.arange(256) % 4, 4)
    check_use_fork_use(lambda out: multi_lora(x, pool, routing, out))


class UsesTheKernel(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return big_call()


@pytest.mark.usefixtures("two_threads")
@QUIET
def test_data_loader_workers():
    want = big_call()
    for batch in torch.utils.data.DataLoader(UsesTheKernel(), num_workers=2, batch_size=1, timeout=60):
        assert torch.equal(batch[0], want)


@pytest.mark.usefixtures("two_threads")
def test_new_python_threads_at_once():
    want, wrong = big_call(), []

    def work() -> None:
        for _ in range(10):
            if not torch.equal(big_call_of(pool, x, routing), want):
                wrong.append(1)

    torch.manual_seed(0)
    pool = make_pool(4, 16, 512, 512, torch.float32)
    x, routing = torch.randn(256, 512), Routing.from_slots(torch.arange(256) % 4, 4)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert not wrong


def big_call_of(pool, x, routing) -> torch.Tensor:
    return multi_lora(x, pool, routing)


@pytest.mark.parametrize("name", _cpu.available_isas())
def test_instruction_set_can_be_forced(name):
    done = python("import lora_fuse; from lora_fuse import _cpu; print(_cpu.isa())", LORA_FUSE_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_unknown_instruction_set_is_refused():
    done = python("import lora_fuse", LORA_FUSE_ISA="avx1024")
    assert done.returncode != 0
    assert re.search(r"LORA_FUSE_ISA: 'avx1024' is not an instruction set .*; there are: baseline", done.stderr)


def test_tensors_are_read_without_the_exchange_api_too():
    """torch builds without it go through data_ptr() and attributes; the results are the same bits."""
    want = big_call()
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    assert _cpu.use_exchange_api(None) is False
    try:
        assert torch.equal(big_call(), want)
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
            _cpu.multi_lora(1, 2, (1, 2, 3, 4), (1, 2, 3, 4, 5), 1)
    finally:
        assert _cpu.use_exchange_api(api) is (api is not None)


def test_import_is_light():
    heavy = ("peft", "transformers", "huggingface_hub", "matplotlib", "rich", "click")
    code = f"import sys, lora_fuse; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"
