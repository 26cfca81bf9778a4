"""lora_fuse: one base model, many fine-tunes."""

import sys
from types import ModuleType

from lora_fuse import functional
from lora_fuse.adapters.joint_adapter import JointAdapter
from lora_fuse.adapters.load import load_adapter
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.compress.extract import extract
from lora_fuse.compress.joint import JointBank, joint_compress
from lora_fuse.compress.joint_files import load_joint
from lora_fuse.compress.peru_fft import Peru, peru_fft
from lora_fuse.compress.peru_files import load_peru
from lora_fuse.compress.peru_lora import peru_lora
from lora_fuse.merging.combine import merge
from lora_fuse.merging.compose import learn_composition
from lora_fuse.merging.composition import Composition
from lora_fuse.merging.fuse import fuse, unfuse
from lora_fuse.merging.grams import collect_grams
from lora_fuse.merging.lorahub import lorahub
from lora_fuse.nn.attach import add_adapter, attach, detach, remove_adapter, swap_adapter
from lora_fuse.nn.select import adapter_slots, adapters, check, head_sizes, set_adapters, use_adapters
from lora_fuse.nn.switch import switch_task
from lora_fuse.nn.warmup import warmup
from lora_fuse.ops.plans import override_plans
from lora_fuse.sparse import SparseMatrix

__all__ = [
    "AdapterPool",
    "Composition",
    "JointAdapter",
    "JointBank",
    "LoraAdapter",
    "LoraLayer",
    "Peru",
    "Routing",
    "SparseAdapter",
    "SparseMatrix",
    "SparsePool",
    "adapter_slots",
    "adapters",
    "add_adapter",
    "attach",
    "check",
    "collect_grams",
    "detach",
    "extract",
    "functional",
    "fuse",
    "head_sizes",
    "joint_compress",
    "learn_composition",
    "load_adapter",
    "load_joint",
    "load_peru",
    "lorahub",
    "merge",
    "override_plans",
    "peru_fft",
    "peru_lora",
    "remove_adapter",
    "set_adapters",
    "swap_adapter",
    "switch_task",
    "unfuse",
    "use_adapters",
    "warmup",
]
__version__ = "0.1.0"

# ``adapters`` is a function here and a subpackage on disk. ``import lora_fuse.adapters.pool as pool`` and
# ``lora_fuse.adapters.pool`` walk attributes, so the function leads on to the subpackage's modules.
vars(adapters).update(
    {name: module for name, module in vars(sys.modules[f"{__name__}.adapters"]).items() if type(module) is ModuleType}
)
