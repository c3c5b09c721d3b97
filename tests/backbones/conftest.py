import pytest


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """On images this small the threads of several test runs only wait for each other."""
