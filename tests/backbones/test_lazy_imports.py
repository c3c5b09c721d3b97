"""Nobody waits for a library that the run does not use."""

import subprocess
import sys

import pytest

import visiontasks.backbones


def test_the_cifar_network_imports_neither_timm_nor_torchvision() -> None:
    script = (
        "import sys; from visiontasks.backbones import CifarResNet; print({'timm', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ResNet'"):
        visiontasks.backbones.ResNet  # noqa: B018
