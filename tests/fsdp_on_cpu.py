"""``dslm`` under FSDP2 on CPUs, which accelerate turns on for GPUs only; it says how many modules were cut up."""

from __future__ import annotations

import os
import sys

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}

import torch.distributed.fsdp
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from dslm.cli.main import run

_begin, _known = AcceleratorState.__init__, []
_cut, _modules = torch.distributed.fsdp.fully_shard, []


def _sharded(state, *arguments, fsdp_plugin=None, **options):
    _known.extend([fsdp_plugin] if fsdp_plugin else [])
    _begin(state, *arguments, **options)
    if _known:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, _known[-1]


def _counted(module, *arguments, **options):
    _modules.append(type(module).__name__)
    return _cut(module, *arguments, **options)


if __name__ == "__main__":
    AcceleratorState.__init__ = _sharded
    torch.distributed.fsdp.fully_shard = _counted
    code = run(sys.argv[1:])
    print(f"cut up: {' '.join(_modules)}", file=sys.stderr)
    sys.exit(code)
