"""A pytest plugin: every test starts from seeded generators, DIPKERNELS_TEST_SEED, 0 by default."""

import os
import random

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("DIPKERNELS_TEST_SEED", "0"))


def seed_all():
    torch.manual_seed(SEED)
    np.random.seed(SEED % 2**32)
    random.seed(SEED)


seed_all()  # parameters of tests may be drawn at import


@pytest.fixture(autouse=True)
def seeded():
    seed_all()
