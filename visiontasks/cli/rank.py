"""A further rank of a job: started by the first rank of its node, which hands it the composed config on stdin."""

import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from visiontasks.layers.lifetime import PARENT, die_with_parent


def main() -> None:
    """Does what the first rank does, and ends well only where the first rank says that all have."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf

    from visiontasks.cli.ranks import GOOD

    die_with_parent(int(os.environ[PARENT]))
    faulthandler.register(signal.SIGUSR1)  # the first rank asks where this one hangs
    setup_globals()
    composed, hydra = map(OmegaConf.create, pickle.load(sys.stdin.buffer))
    HydraConfig.instance().cfg = hydra
    os.environ["HYDRA_FULL_ERROR"] = "1"
    name = HydraConfig.get().job.config_name
    job = getattr(importlib.import_module(f"visiontasks.cli.{name}"), name)
    code = _done(job, composed)
    told = sys.stdin.buffer.read(1) if code == 0 else b""
    sys.exit(code or int(told != GOOD))


def _done(job: Callable[[Any], object], composed: Any) -> int:
    """The exit code of the job; what failed here is told to the first rank, and shown where it is no one else's."""
    from visiontasks.cli.ranks import Note, one_job

    try:
        with one_job(composed):
            job(composed)
    except Exception as error:
        note = Note.of(error)
        if not note.lost and note.code != 2:
            traceback.print_exc()
        return note.code
    return 0


if __name__ == "__main__":
    main()
