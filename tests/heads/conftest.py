"""The same weights and inputs in every test, and one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)
