"""What a config may hold that somebody else wrote: values, and calls that a file of conf/ declares; nothing else."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from visiontasks.cli.command_line import conf_folders
from visiontasks.errors import UsageError
from visiontasks.pickled import values

_FROM_ENVIRONMENT = "__from_the_environment__"


def check_targets(config: Any, *, of: str = "The config") -> None:
    """Refuses a config that could call what no file of our conf/ folder, or of the user's own, declares.

    Every _target_ has to be exactly a name that such a file declares. Everything else has to be a plain value, and no
    string an interpolation: whoever instantiates the config would resolve it, perhaps to another _target_.
    """
    known = declared_targets()
    for name, value in values(config, of=of):
        if not isinstance(value, dict | list | tuple | str | int | float | None):
            raise UsageError(f"{of} holds {name} as {type(value).__name__}: give plain values.")
        if isinstance(value, str) and "${" in value:
            raise UsageError(f"{of} holds {name}={value[:99]}, still to be resolved: give the value itself.")
        if name.rpartition(".")[2] == "_target_" and not (isinstance(value, str) and value in known):
            raise UsageError(
                f"_target_ {value!s:.99} is declared by no file in {' or '.join(map(str, conf_folders()))}: "
                "put it in a yaml file of your own conf/ folder."
            )


def check_stored(stored: Any, parts: Sequence[str], *, of: str) -> None:
    """Refuses a checkpoint that does not hold what train.py writes: a config of such parts, class names and weights.

    Its config may call nothing that check_targets refuses, and compose nothing of its own.
    """
    config = stored.get("config") if isinstance(stored, dict) else None
    if not config:
        raise UsageError(f"{of} holds no config: expected a checkpoint that train.py wrote.")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in parts):
        raise UsageError(f"{of} holds a config without {', '.join(parts)}: expected a checkpoint that train.py wrote.")
    classes, weights = stored.get("classes"), stored.get("state_dict")
    if not isinstance(weights, dict) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UsageError(f"{of} holds no weights or no class names: expected a checkpoint that train.py wrote.")
    check_targets(config, of=of)
    if any(name.rpartition(".")[2] in {"defaults", "hydra"} for name, _ in values(config, of=of)):
        raise UsageError(f"{of} holds a config that composes others: expected a checkpoint that train.py wrote.")


def declared_targets() -> frozenset[str]:
    """The exact names that a config may call."""
    return _declared(tuple(conf_folders()))


@lru_cache
def _declared(folders: tuple[Path, ...]) -> frozenset[str]:
    files = (file for folder in folders for file in sorted(folder.rglob("*.yaml")))
    return frozenset(target for file in files for target in _targets(yaml.safe_load(file.read_text())))


def _targets(node: Any) -> Iterator[str]:
    """The names that a yaml file has under _target_, spelt out."""
    for name, value in values(node, of="A file of conf/"):
        if name.rpartition(".")[2] == "_target_" and isinstance(value, str):
            yield value


def check_environment(config: DictConfig, parts: Sequence[str]) -> None:
    """Refuses a value from the environment in what a checkpoint keeps of a config, however it came there.

    Elsewhere, as in a logger, it may stand: config.yaml keeps the interpolation and not the value.
    """
    for name, value in values(_marked(config), of="The config"):
        if name.partition(".")[0] in parts and isinstance(value, str) and _FROM_ENVIRONMENT in value:
            variable = value.partition(_FROM_ENVIRONMENT)[2]
            raise UsageError(
                f"{name} takes {variable or 'its value'} from the environment, and checkpoints would keep it: type "
                f'{name}="${variable}" if they may.'
            )


def _marked(config: DictConfig) -> Any:
    """The config as plain containers, with a mark in the place of every value from the environment."""
    OmegaConf.register_new_resolver("oc.env", lambda name, *_: f"{_FROM_ENVIRONMENT}{name}", replace=True)
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(
            f"The config chooses by the environment what it holds, and checkpoints would keep it ({error}): "
            "type the value itself."
        ) from error
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
