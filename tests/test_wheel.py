"""The wheel carries conf/ and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from visiontasks.cli.command_line import CONF

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_config_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    carried = {path.relative_to(tmp_path / "installed/visiontasks/conf") for path in tmp_path.rglob("conf/**/*.yaml")}
    assert carried == {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    command = [sys.executable, "-m", "visiontasks.cli.main", "train", "--cfg", "job", "backbone=vgg16"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert "name: vgg16" in shown
