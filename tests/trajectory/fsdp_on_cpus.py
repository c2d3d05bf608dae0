"""What killed.py does, in one of several processes under accelerate's FSDP2 on CPUs: same arguments.

Accelerate takes FSDP for a matter of GPUs, so the launch is said to be one of GPUs; sharding, gathers, optimizer,
checkpoints and all else is what runs on them, over gloo. What it cannot show is an order of streams. So it holds what
that order hung on: no unit is gathered for a backward pass that it does not have.
"""

from __future__ import annotations

import os

import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from tests.trajectory import killed
from tests.trajectory.setting import ROOT, end_process


def say_launch() -> None:
    """Set the variables that `accelerate launch` would, by recipes/accelerate/fsdp2.yaml."""
    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in settings["fsdp_config"].items():
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    original = PartialState.__init__

    def init(self, *arguments, **options):  # TrainingArguments makes the state anew
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def refuse_needless_gathers() -> None:
    original = FSDPParamGroup.finalize_backward

    def finalize_backward(self):
        assert self._all_gather_result is None, f"{self._module_fqn} was gathered, and has no backward pass"
        original(self)

    FSDPParamGroup.finalize_backward = finalize_backward


if __name__ == "__main__":
    say_launch()
    refuse_needless_gathers()
    killed.main()
    end_process()
