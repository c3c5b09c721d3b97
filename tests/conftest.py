"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and weights, from VISIONTASKS_SHARED_DATA or beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VISIONTASKS_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set VISIONTASKS_SHARED_DATA")
    return folder
