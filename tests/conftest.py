"""Settings of every test: one thread, no deadline on a shared machine, the same examples on every run in CI."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
# Hundreds of short runs start here; those that are about the forge ask for it.
os.environ["ESPER_FORGE"] = "off"
settings.register_profile("local", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
