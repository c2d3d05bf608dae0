"""One of two processes that agree on how many packs each joins; the first alone finds a fault in its model.

Argument: the recipe. Each prints what they agree on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from manyicl.training.memory.choice import WHOLE_GPU
from manyicl.training.preparation import prepare_run
from manyicl.training.ranks import share_packs
from manyicl.training.recipe import load_recipe
from tests.trajectory.setting import end_process

if __name__ == "__main__":
    state = PartialState(cpu=True)
    prepared, fault = prepare_run(load_recipe(Path(sys.argv[1]))), "mixes episodes" if state.is_main_process else ""
    print(share_packs(prepared, device=torch.device("cpu"), fault=fault, known=None, gpu_share=WHOLE_GPU).reason)
    end_process()
