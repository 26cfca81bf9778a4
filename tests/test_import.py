"""What ``import lora_fuse`` offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import lora_fuse as lf


def test_public_names_exist_and_are_documented() -> None:
    for name in lf.__all__:
        assert getattr(lf, name).__doc__, name


def test_the_function_adapters_does_not_hide_the_subpackage() -> None:
    import lora_fuse.adapters.lora as by_attribute
    from lora_fuse.adapters.lora import LoraAdapter

    assert by_attribute.LoraAdapter is LoraAdapter is lf.LoraAdapter
    assert callable(lf.adapters)
    package = importlib.import_module("lora_fuse.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        assert getattr(lf.adapters, module.name) is importlib.import_module(f"lora_fuse.adapters.{module.name}")


def test_import_is_light() -> None:
    """Nothing that only the command line, files of other tools or the hub need."""
    code = "import sys, lora_fuse; print(*{name.partition('.')[0] for name in sys.modules}, *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "lora_fuse.compress.peru_fft" in loaded
    heavy = {"click", "rich", "peft", "transformers", "huggingface_hub", "matplotlib", "lora_fuse.checkpoints"}
    heavy |= {"triton", "lora_fuse.kernels", "torch._dynamo"}  # a second of the two that importing takes
    assert heavy.isdisjoint(loaded)
