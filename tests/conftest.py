"""What holds for every test: two threads, no network, settings from nowhere but the test, repeatable examples.

The environment is set before anything imports PyTorch, so tests that need no model never load it.
"""

from __future__ import annotations

import os

from hypothesis import settings

from penstock.config import EngineConfig

NUM_THREADS = str(min(2, os.cpu_count() or 1))

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, NUM_THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns whenever a test starts a process
for name in EngineConfig.model_fields:
    os.environ.pop(f"PENSTOCK_{name.upper()}", None)

# ci draws the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones, many more of them.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
