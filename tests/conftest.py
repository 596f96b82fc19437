import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XFORMERS_MORE_DETAILS", "0")

import pytest
import torch

from tomesd.commands import mend_torchvision

mend_torchvision()  # before anything imports torchvision
torch.set_num_threads(1)  # tiny networks: threads cost more than they bring


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
