"""Weights from files into modules, with nothing lost in silence."""

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontasks.contracts import Backbone, UsageError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL = "module."  # what DataParallel puts before every name
_BACKBONE = "backbone."  # where every task keeps its backbone
_NET = "net."  # where our adapters keep the published network
_COUNTER = "num_batches_tracked"
_SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Receipt:
    """What a strict load did, name by name; `missing` can only hold the batch counters that old files lack."""

    source: str
    arrived: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    reshaped: tuple[str, ...]
    share: float  # of the module's parameters, counted as numbers, that arrived

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.arrived)} tensors arrived ({self.share:.1%} of the parameters), "
            f"{_count(self.reshaped)} reshaped, {_count(self.missing)} missing, {_count(self.left_over)} left over"
        )


def load_backbone(
    backbone: Backbone, weights: str | Path | Mapping[str, Tensor], *, source: str | None = None
) -> Receipt:
    """Loads a run folder, a checkpoint, a weights file or a state dict into a backbone, strictly.

    Names may be the published network's or the backbone's own. Only the published classifier may be left over.

    Raises:
        UsageError: as read_state_dict and load_strictly do.
    """
    state = weights if isinstance(weights, Mapping) else read_state_dict(weights)
    classifier: Collection[str] = getattr(backbone, "classifier_names", ())
    aliases: Mapping[str, str] = getattr(backbone, "aliases", {})
    own = set(backbone.state_dict())

    def ours(name: str) -> str:
        name = aliases.get(name, name)
        return name if name in own or name in classifier or _NET + name not in own else _NET + name

    renamed = {ours(name): tensor for name, tensor in state.items()}
    return load_strictly(backbone, renamed, source=source or str(weights), expected_left_over=classifier)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, expected_left_over: Collection[str] = ()
) -> Receipt:
    """Loads every tensor of a module from a state dict, or none.

    Two differences are mended and reported: the first convolution is adapted from 3 to another number of image
    channels, and the batch counters (num_batches_tracked) that files from before torch 0.4.1 lack keep their values,
    which no batch norm with a momentum uses.

    Args:
        source: where the state comes from, for messages.
        expected_left_over: names that the module has no use for, such as the published classifier's.

    Raises:
        UsageError: if anything is missing, of another shape, or left over unexpectedly; the module is then untouched.
    """
    own = module.state_dict()
    adapted = _adapt_first_convolution(module, state)
    state = {**state, **adapted}
    missing = [name for name in own if name not in state]
    lacking = [name for name in missing if not name.endswith(_COUNTER)]
    misshaped = [name for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    left_over = [name for name in state if name not in own]
    unexpected = sorted(set(left_over) - set(expected_left_over))
    if lacking or misshaped or unexpected:
        match = len(own) - len(missing) - len(misshaped)
        raise UsageError(
            f"{source} does not fit this {_describe(module)}: {match} of its {len(own)} tensors match, "
            f"{_faults(lacking, misshaped, unexpected)}: name the backbone that they belong to, or give others."
        )
    arrived = [name for name in own if name in state]
    own.update({name: state[name] for name in arrived})
    module.load_state_dict(own)
    return Receipt(
        source=source,
        arrived=tuple(arrived),
        missing=tuple(missing),
        left_over=tuple(left_over),
        reshaped=tuple(adapted),
        share=_share(module, arrived),
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a weights file, or of the backbone in a checkpoint or a run folder, by name.

    Takes .safetensors, whatever torch.load opens with weights_only=True (bare, or under "state_dict" or "model"), a
    Lightning checkpoint (its `backbone.` part), or a run folder (checkpoints/best.ckpt, else last.ckpt). Half precision
    becomes float32, and the `module.` of DataParallel goes.

    Raises:
        UsageError: if there is no such file, or it holds no tensors by name; the message names the file.
    """
    file = _weights_file(Path(path))
    payload = _read(file)
    state = _unwrap(payload)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors or len(tensors) < len(state):
        raise UsageError(
            f"{file} holds no state dict (tensors by name): give a file that torch.save(model.state_dict()) wrote."
        )
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = _below(_PARALLEL, tensors)
    if "pytorch-lightning_version" in payload:
        tensors = _below(_BACKBONE, tensors)
        if not tensors:
            raise UsageError(f"{file} holds no tensors under `{_BACKBONE}`: give a checkpoint that visiontasks wrote.")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"weights={path} is no file and no run folder: give null, imagenet, or a path that exists.")
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise UsageError(
        f"weights={path} has no checkpoints/best.ckpt or last.ckpt: give the folder of a run that saved one."
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        payload = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        pickled = isinstance(error, pickle.UnpicklingError)
        reason = "not tensors alone" if pickled else str(error).split("\n", maxsplit=1)[0]
        raise UsageError(
            f"{file} cannot be read as weights ({reason}): give a .pth, .safetensors or .ckpt file."
        ) from error
    return payload if isinstance(payload, dict) else {}


def _unwrap(payload: dict[str, Any]) -> dict[str, Any]:
    wrapped = next((payload[name] for name in _WRAPPERS if isinstance(payload.get(name), dict)), payload)
    return dict(wrapped)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _adapt_first_convolution(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    name, weight = next(((name, p) for name, p in module.named_parameters() if p.ndim == 4), ("", torch.empty(0)))
    published = state.get(name)
    if published is None or published.shape == weight.shape:
        return {}
    if published.ndim != 4 or published.shape[1] != 3 or published[:, :1].shape != weight[:, :1].shape:
        return {}
    from timm.models import adapt_input_conv  # takes seconds, and is rarely needed

    return {name: adapt_input_conv(weight.shape[1], published)}


def _share(module: nn.Module, arrived: Collection[str]) -> float:
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return sum(sizes.get(name, 0) for name in arrived) / max(1, sum(sizes.values()))


def _count(names: Collection[str]) -> str:
    return str(len(names)) if names else "none"


def _faults(lacking: list[str], misshaped: list[str], unexpected: list[str]) -> str:
    parts = {"missing": lacking, "of another shape": misshaped, "left over": unexpected}
    return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts.items() if names)


def _describe(module: nn.Module) -> str:
    name = getattr(module, "name", "")
    return f"{type(module).__name__} {name}".rstrip()


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
