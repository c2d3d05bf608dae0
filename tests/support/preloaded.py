"""What the server of tests.support.forked imports before it forks: what most processes of tests would import anew.

Of these, the compiler and the Trainer (which imports datasets and pandas) take two seconds of a core each.
"""

# ruff: noqa: F401
from __future__ import annotations

import gc
import signal

import torch._dynamo
import torch._inductor.compile_fx
import torch._inductor.cpp_builder

import manyicl.cli.app
import manyicl.evaluation.loop
import manyicl.inference.model
import manyicl.report.document
import manyicl.server
import manyicl.service.served
import manyicl.training.run
import tests.trajectory.setting

# Ctrl-C ends what is forked, even if these tests run in a shell's background, which has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A forked process then leaves what it was born with out of its collections, and its memory stays shared.
gc.freeze()
