"""Processes that others start, as torchrun and SLURM do, agree on the time in the names of their folders."""

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from visiontasks.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_NOW = re.compile(r"\$\{now:([^}]*)\}")
_PATIENCE = 300  # seconds in which all processes are to start
_KEPT: "list[TCPStore]" = []  # torch's own meeting on the same port goes on with the same server


def at_one_time(arguments: list[str], config: str) -> list[str]:
    """The arguments, with the time at which the first of several processes started in the place of each ${now:...}.

    Those that name the folders are added from conf. Where there is one process nothing changes.
    """
    place = meeting_place()
    if place is None:
        return arguments
    started = time.localtime(float(first_told(*place, str(time.time()))))
    named = {argument.partition("=")[0] for argument in arguments}
    own = [f"{key}={value}" for key, value in _folders(config).items() if key not in named]
    return [_NOW.sub(lambda found: time.strftime(found[1], started), argument) for argument in [*arguments, *own]]


def meeting_place() -> tuple[str, int, bool] | None:
    """Host, port and whether this process is the host, where processes were started by torchrun, SLURM or by hand."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return _address(host=not agent and os.environ["RANK"] == "0")
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return _of_slurm()
    by_hand = {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ
    return _address(host=os.environ["NODE_RANK"] == "0") if by_hand else None


def _address(*, host: bool) -> tuple[str, int, bool]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), host


def _of_slurm() -> tuple[str, int, bool] | None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive shell within an allocation
        return None
    slurm = SLURMEnvironment()
    return slurm.main_address, slurm.main_port, slurm.global_rank() == 0


def first_told(address: str, port: int, host: bool, value: str) -> str:
    """What the first process to come here told; raises UsageError where the host does not answer."""
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        patience = timedelta(seconds=_PATIENCE)
        store = TCPStore(address, port, None, host, patience, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        raise UsageError(f"No process answers at {address}:{port} (MASTER_ADDR, MASTER_PORT): {error}") from error
    _KEPT.append(store)
    return store.compare_set("visiontasks/started", "", value).decode()


def _folders(config: str) -> dict[str, str]:
    import yaml

    from visiontasks.cli.command_line import CONF

    hydra = yaml.safe_load((Path(CONF) / f"{config}.yaml").read_text())["hydra"]
    return {key: hydra[kind]["dir"] for key in FOLDERS if (kind := key.split(".")[1]) in hydra}
