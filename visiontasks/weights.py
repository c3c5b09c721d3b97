"""Weights from files into modules, with nothing lost in silence."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontasks.contracts import Backbone, UsageError
from visiontasks.durable import verify
from visiontasks.pickled import read_pickled

_STATE = "state_dict."  # where most checkpoints keep the weights
_PARALLEL = "module."  # what DataParallel puts before every name
_NET = "net."  # where our adapters keep the published network
_COUNTER = "num_batches_tracked"
_SECOND_CHOICE = ("encoder_k", "momentum", "student", "target", "ema")  # copies that lag behind, and DINO's student
_SHOWN = 4  # names in a message
_LONGEST = 1000  # letters of a name
_IDLE = (  # what published checkpoints hold beside tensors; none of it is ever called
    "argparse.Namespace",
    "collections.defaultdict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "_codecs.encode",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.PosixPath",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
)


@dataclass(frozen=True)
class Receipt:
    """What a strict load did, name by name.

    `missing` holds what was expected to be missing, and the batch counters that old files lack. `left_over` names what
    else lies in the file as the file does, the others are the module's names.
    """

    source: str
    arrived: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    reshaped: tuple[str, ...]
    share: float  # of the module's parameters, counted as numbers, that arrived

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.arrived)} tensors arrived ({self.share:.1%} of the parameters), "
            f"{_count(self.reshaped)} reshaped, {_count(self.missing)} missing, {_parts(self.left_over)} left over"
        )


def load_backbone(
    backbone: Backbone,
    weights: str | Path | Mapping[str, Tensor],
    *,
    source: str | None = None,
    allow_missing: Collection[str] = (),
) -> Receipt:
    """Loads a backbone from whatever holds one, strictly, wherever in the file it lies.

    Names may be the published network's, the backbone's own, or positions in a Sequential of the network's children,
    below any prefix. A prefix is taken only if all of the backbone lies below it, and nothing else in the places of its
    parts, such as a fifth block where it has four; the published classifier and what lies elsewhere is left over.

    Args:
        allow_missing: names, or their beginnings up to a dot, of what need not arrive.

    Raises:
        UsageError: as read_tensors and load_strictly do.
    """
    tensors = weights if isinstance(weights, Mapping) else read_tensors(weights)
    found = _find(backbone, tensors, allow_missing)
    classifier: Collection[str] = getattr(backbone, "classifier_names", ())
    elsewhere = [name for name in tensors if name not in found.names and not found.intrudes(name, classifier)]
    return load_strictly(
        backbone,
        {found.names.get(name, name): tensor for name, tensor in tensors.items()},
        source=source or str(weights),
        expected_left_over=elsewhere,
        allow_missing=allow_missing,
    )


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    expected_left_over: Collection[str] = (),
    allow_missing: Collection[str] = (),
) -> Receipt:
    """Loads every tensor of a module from a state dict, or none.

    Two differences are mended and reported: the first convolution is adapted from 3 to another number of image
    channels, and the batch counters (num_batches_tracked) that files from before torch 0.4.1 lack keep their values,
    which no batch norm with a momentum uses.

    Args:
        source: where the state comes from, for messages.
        expected_left_over: names that the module has no use for, such as the published classifier's.
        allow_missing: names, or their beginnings up to a dot, that may be missing or of another shape.

    Raises:
        UsageError: if anything is missing, of another shape, or left over unexpectedly; the module is then untouched.
    """
    own = module.state_dict()
    adapted = _adapt_first_convolution(module, state)
    state = {**state, **adapted}
    misshaped = [name for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    missing = [name for name in own if name not in state or name in misshaped]
    faults = {
        "missing": _not_allowed([name for name in missing if name not in misshaped], allow_missing),
        "of another shape": _not_allowed(misshaped, allow_missing),
        "left over": sorted(set(state) - set(own) - set(expected_left_over)),
    }
    if any(faults.values()):
        faults["left over"] = sorted(set(state) - set(own))
        raise UsageError(_misfit(module, source, len(own) - len(missing), faults))
    arrived = [name for name in own if name not in missing]
    own.update({name: state[name] for name in arrived})
    module.load_state_dict(own)
    return Receipt(
        source=source,
        arrived=tuple(arrived),
        missing=tuple(missing),
        left_over=tuple(name for name in state if name not in own),
        reshaped=tuple(adapted),
        share=_share(module, arrived),
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads all tensors of a file by name, `a.b` being b in the dict a; half precision becomes float32.

    Takes .safetensors, whatever torch.load opens with weights_only=True (see read_pickled), or a run folder
    (checkpoints/best.ckpt, else last.ckpt). Settings that were pickled beside the tensors (argparse's, omegaconf's) are
    skipped, and never called.

    Raises:
        UsageError: if there is no such file, it is damaged, or it holds no tensors by name; the message names the file.
    """
    file = _weights_file(Path(path))
    verify(file, foreign=True)
    payload = _read(file)
    tensors = dict(_flattened(payload)) if isinstance(payload, dict) else {}
    if not tensors or max(map(len, tensors)) > _LONGEST:
        raise UsageError(
            f"{file} holds no state dict (tensors by name): give a file that torch.save(model.state_dict()) wrote."
        )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


class _Place(NamedTuple):
    """Where in a file a backbone lies."""

    prefix: str
    names: dict[str, str]  # in the file -> in the backbone

    def intrudes(self, name: str, classifier: Collection[str]) -> bool:
        """Whether a tensor that the backbone does not know lies among its parts."""
        parts = {known.removeprefix(self.prefix).partition(".")[0] for known in self.names}
        rest = name.removeprefix(self.prefix)
        below = name.startswith(self.prefix) and name not in self.names
        return below and rest not in classifier and rest.partition(".")[0] in parts


def _find(backbone: Backbone, tensors: Mapping[str, Tensor], allow_missing: Collection[str]) -> _Place:
    """The prefix below which all of the backbone lies, or where most of it does."""
    own = backbone.state_dict()
    below: dict[str, dict[str, str]] = {"": {}}
    ours = _dictionary(backbone)
    for name in tensors:
        for prefix, rest in _cuts(name):
            if (known := ours(rest)) is not None:
                below.setdefault(prefix, {})[name] = known

    def rank(prefix: str) -> tuple[int, bool, bool, int]:
        fitting = {known for name, known in below[prefix].items() if _fits(tensors[name], own[known])}
        lacking = _not_allowed([name for name in own if name not in fitting], allow_missing)
        second = any(word in prefix for word in _SECOND_CHOICE)
        return -len(fitting) if lacking else -len(own), second, "backbone" not in prefix.split("."), len(prefix)

    best = min(below, key=rank)
    return _Place(best, below[best])


def _dictionary(backbone: Backbone) -> Callable[[str], str | None]:
    """Answers with the backbone's name of a tensor, for its published name or its position; None if it has none."""
    names = {name.removeprefix(_NET): name for name in backbone.state_dict()}
    aliases: Mapping[str, str] = getattr(backbone, "aliases", {})
    children = [name for name, _ in getattr(backbone, "net", nn.Module()).named_children()]

    def ours(name: str) -> str | None:
        name = aliases.get(name, name)
        position, _, rest = name.partition(".")
        child = children[int(position)] if position.isdecimal() and int(position) < len(children) else ""
        return names.get(name) or names.get(f"{child}.{rest}")

    return ours


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A dotted name cut before each of its words."""
    starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
    return ((name[:start], name[start:]) for start in starts)


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape or (given.ndim == own.ndim == 4 and given[:, :1].shape == own[:, :1].shape)


def _not_allowed(names: Iterable[str], allowed: Collection[str]) -> list[str]:
    """The names, without the batch counters, that begin with none of the allowed ones."""
    beginnings = tuple(f"{allowance.removeprefix(_NET)}." for allowance in allowed)
    return [
        name
        for name in names
        if not name.endswith(_COUNTER) and not f"{name.removeprefix(_NET)}.".startswith(beginnings)
    ]


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


class _Idle:
    """Stands for whatever beside tensors a file pickled, and does nothing."""

    def __new__(cls, *_: Any) -> "_Idle":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _read(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return read_pickled(file, idle=[(_Idle, name) for name in _IDLE])
    try:
        return load_file(file)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise UsageError(
            f"{file} cannot be read as weights ({reason}): give a .pth, .safetensors or .ckpt file."
        ) from error


def _flattened(node: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in entries:
        yield from _flattened(value, f"{name}.{key}" if name else str(key))


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


def _parts(names: Collection[str]) -> str:
    """How many, and of which parts of a file: 330 (322 optimizer, 6 projector, 2 classifier)."""
    words = Counter(name.removeprefix(_STATE).removeprefix(_PARALLEL).partition(".")[0] for name in names)
    listed = ", ".join(f"{count} {word}" for word, count in words.most_common(_SHOWN))
    more = ", ..." if len(words) > _SHOWN else ""
    return f"{len(names)} ({listed}{more})" if names else "none"


def _misfit(module: nn.Module, source: str, match: int, faults: Mapping[str, list[str]]) -> str:
    found = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names)
    lacking = [*faults["missing"], *faults["of another shape"]]
    parts = dict.fromkeys(name.removeprefix(_NET).partition(".")[0] for name in lacking)
    few = 0 < len(parts) <= _SHOWN and match
    allow = f", or say what may be missing by init_allow_missing=[{','.join(parts)}]" if few else ""
    return (
        f"{source} does not fit this {_describe(module)}: {match} of its {len(module.state_dict())} tensors match, "
        f"{found}: name the backbone that they belong to, or give others{allow}."
    )


def _describe(module: nn.Module) -> str:
    name = getattr(module, "name", "")
    return f"{type(module).__name__} {name}".rstrip()


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
