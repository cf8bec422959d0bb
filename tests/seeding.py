"""A pytest plugin: every test starts from seeded generators, DIPKERNELS_TEST_SEED, 0 by default."""

import itertools
import os
import random

import numpy as np
import pytest
import torch

from dipkernels.nn import layer

SEED = int(os.environ.get("DIPKERNELS_TEST_SEED", "0"))


def seed_all():
    torch.manual_seed(SEED)
    np.random.seed(SEED % 2**32)
    random.seed(SEED)


def start_again():
    """The streams of layers that are built by hand count on in a process: without this a test's
    noise would be that of the tests before it. Those built at import have numbers below."""
    seed_all()
    layer._NUMBERS = itertools.count(2**15)


seed_all()  # parameters of tests may be drawn at import


@pytest.fixture(autouse=True)
def seeded():
    start_again()
