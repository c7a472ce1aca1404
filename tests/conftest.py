"""What every test starts from."""

from __future__ import annotations

import os

import torch

# The matrices of these tests are small: on a busy machine a second thread costs LAPACK more than it brings. Set before
# anything computes, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
