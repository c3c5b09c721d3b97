"""From a composed config to the objects that train."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from omegaconf import DictConfig, OmegaConf

from visiontasks.callbacks.agreement import Agreement
from visiontasks.callbacks.checkpoints import DurableCheckpoints
from visiontasks.callbacks.unfreezing import Unfreezing
from visiontasks.cli.process import prepare_process
from visiontasks.cli.ranks import trained_together
from visiontasks.cli.trusted import check_stored, check_targets
from visiontasks.contracts import Backbone, UsageError
from visiontasks.data.module import DataModule
from visiontasks.durable import verify
from visiontasks.layers.batch_norm import ProcessBatchNorms
from visiontasks.layers.freezing import cut_stages
from visiontasks.layers.sharding import Sharded
from visiontasks.pickled import read_pickled
from visiontasks.tasks.base import Task
from visiontasks.tasks.optimisation import Pace
from visiontasks.transfer import Auto, freeze_for_good
from visiontasks.weights import Receipt, load_backbone

Config = dict[str, Any]  # a composed config as plain containers, every interpolation resolved
PARTS = (
    *("task", "backbone", "transfer", "head", "loss", "data", "augment", "optimizer", "scheduler"),
    *("channels_last", "seed"),
)
STORED = ("task", "backbone", "head", "data", "augment", "optimizer", "scheduler")  # those that every run has
_STEPPING = {"accumulate_grad_batches": 1, "gradient_clip_val": None}  # what Lightning leaves to a task that steps
LIBRARIES = {
    "torchvision": "visiontasks.backbones.TorchvisionBackbone",
    "timm": "visiontasks.backbones.TimmBackbone",
}


def plain(config: DictConfig) -> Config:
    """The config as dicts, lists, strings and numbers; raises UsageError where a _target_ is not from a conf folder."""
    container: Any = OmegaConf.to_container(config, resolve=True)
    check_targets(container)
    return container  # type: ignore[no-any-return]


def build_data(config: Config) -> DataModule:
    """The data module, with its transforms; reads no data yet."""
    data: DataModule = instantiate(config["data"], _convert_="all")
    return data


def build_task(config: Config, *, classes: tuple[str, ...]) -> Task:
    """The task with its backbone, head, optimiser and schedule, knowing the config that it was built from."""
    backbone: Backbone = instantiate(config["backbone"], _convert_="all")
    keep = (config.get("transfer") or {}).get("keep")
    if keep is not None:
        cut_stages(backbone, keep)
    head = instantiate(config["head"], _convert_="all")
    check_head(config, head)
    losses = {"losses": instantiate(config["loss"], _convert_="all")} if config.get("loss") else {}
    named = config["task"].get("extractor")
    extractor = {} if named is None else {"extractor": partial(build_extractor, named)}
    channels_last = config["channels_last"]
    make: Callable[..., Task] = partial(task_of(config), **instantiate(config["task"], _convert_="all").keywords)
    task = make(
        backbone=backbone,
        classes=classes,
        head=head,
        optimizer=instantiate(config["optimizer"], _convert_="all"),
        scheduler=instantiate(config["scheduler"], _convert_="all"),
        channels_last=native_bfloat16() if channels_last == "auto" else channels_last,
        **losses,
        **extractor,
    )
    task.config = {key: config[key] for key in PARTS if key in config}
    return task.to(memory_format=task.memory_format)


def start_backbone(task: Task, config: Config) -> Receipt | None:
    """Loads what init_from names into the backbone, and says what arrived, then or when the backbone was made."""
    source, allowed = config["init_from"], config["init_allow_missing"]
    if source is None:
        return getattr(task.backbone, "receipt", None)
    library, _, name = str(source).partition(":")
    if source != "imagenet" and library not in LIBRARIES:
        return load_backbone(task.backbone, source, allow_missing=allowed)
    known = {"_target_": LIBRARIES[library], "name": name} if name else config["backbone"]
    published = instantiate(known | {"weights": "imagenet"}, _convert_="all")
    return load_backbone(task.backbone, published.state_dict(), source=source, allow_missing=allowed)


def build_extractor(named: str) -> Any:
    """The network in whose features images are compared, see visiontasks.cli.extractor."""
    from visiontasks.cli.extractor import extractor  # imports the task of classification, for which not every run waits

    return extractor(named)


def begin_transfer(task: Task, data: DataModule, config: Config) -> tuple[list[Callback], str]:
    """Freezes what never learns and sets the learning rates; gives what lets stages learn later, and a choice's reason.

    Raises UsageError where stages are to stay as they came and came from nowhere.
    """
    transfer, why = instantiate(config["transfer"]), ""
    source = config["init_from"] or config["backbone"].get("weights")
    if isinstance(transfer, Auto):
        sizes, levels = data.sizes(), len(task.backbone.levels)
        transfer, why = transfer.choose(images=sizes["train"], stages=levels, other_data=_other_data(config))
    if source is None and transfer.needs_source:
        raise UsageError(
            "This transfer keeps stages as they came, and they come from nowhere: type init_from=PATH or imagenet, "
            "transfer=full to train them, or backbone.frozen_stages=N if they are to stay random."
        )
    stages = transfer.stages(task.backbone, epochs=config["trainer"]["max_epochs"] or -1)
    freeze_for_good(task.backbone, stages)
    task.pace = {f"backbone.{name}": Pace(each.start or 0, each.rate) for each in stages for name in each.parameters}
    usual = all(stage.start == 0 and stage.rate == 1 for stage in stages)
    return [] if usual else [Unfreezing(stages)], why


def _other_data(config: Config) -> bool:
    """Whether the backbone is known to come from a run of ours on another data set."""
    try:
        learnt = read_checkpoint(find_checkpoint(config["init_from"] or config["backbone"].get("weights") or ""))
    except UsageError:  # published weights, or somebody else's
        return False
    return bool(learnt["config"]["data"]["_target_"] != config["data"]["_target_"])


def task_of(config: Config) -> type[Task]:
    """The class of the task, which its head may have a say in."""
    task: type[Task] = get_class(config["task"]["_target_"])
    return task.under(get_class(config["head"]["_target_"])) if config.get("head") else task


def check_head(config: Config, head: Any) -> None:
    """Raises UsageError where the head says that it serves another task."""
    task: type[Task] = get_class(config["task"]["_target_"])
    serves = getattr(getattr(head, "func", head), "serves", None)
    if serves is not None and serves not in {base.__name__.lower() for base in task.__mro__}:
        name, wanted = config["head"]["_target_"].rpartition(".")[2], task.__name__.lower()
        raise UsageError(f"The head {name} serves task={serves} and the task is {wanted}: type another head=, or none.")


def build_trainer(config: Config, *, folder: Path, callbacks: Sequence[Callback] = ()) -> Trainer:
    """The trainer with its callbacks and loggers, writing to a run folder."""
    prepare_process()
    task, asked = task_of(config), config["trainer"]["sync_batchnorm"]
    precision = resolved_precision(config["trainer"]["precision"], full=task.full_precision)
    together = task.sees_all if asked == "auto" else asked
    accelerator = resolved_accelerator(config["trainer"]["accelerator"])
    options = config["trainer"] | {"accelerator": accelerator, "precision": precision, "sync_batchnorm": together}
    options |= {key: value for key, value in _STEPPING.items() if task.steps_itself}
    timeout = options.pop("timeout")
    plugins = [DurableCheckpoints(), *([ProcessBatchNorms()] if together else [])]
    trainer: Trainer = instantiate(
        options,
        callbacks=[Agreement(config, timeout=timeout), *build_callbacks(config.get("callbacks") or {}), *callbacks],
        logger=[instantiate(logger, _convert_="all") for logger in (config.get("logger") or {}).values()],
        default_root_dir=str(folder),
        _convert_="all",
        plugins=plugins,
    )
    check_sharding(trainer, config, together=together)
    return trained_together(trainer, timeout=timeout)


def check_sharding(trainer: Trainer, config: Config, *, together: bool) -> None:
    """Raises UsageError where trainer=fsdp is joined with what it does not do."""
    if not isinstance(trainer.strategy, Sharded):
        return
    task, head = (get_class(config[part]["_target_"]) if config.get(part) else None for part in ("task", "head"))
    averaged = any(isinstance(each, (WeightAveraging, StochasticWeightAveraging)) for each in trainer.callbacks)  # type: ignore[attr-defined]
    refused = {
        f"the task {getattr(task, '__name__', '')}": not getattr(task, "shards", True),
        f"the head {getattr(head, '__name__', '')}": not getattr(head, "shards", True),
        "trainer.sync_batchnorm=true": together,
        "callbacks.ema or callbacks.swa": averaged,
    }
    found = [name for name, here in refused.items() if here]
    if found:
        raise UsageError(f"trainer=fsdp does not do {' or '.join(found)}: type trainer=ddp.")


def build_callbacks(config: Config) -> list[Callback]:
    """The callbacks that are switched on: an entry may make one, several or, while it is off, none."""
    made = [instantiate(entry, _convert_="all") for entry in config.values() if entry is not None]
    lists = [entry if isinstance(entry, list) else [entry] for entry in made if entry is not None]
    return [callback for entries in lists for callback in entries]


def resolved_accelerator(accelerator: Any) -> Any:
    """What to compute on: where it is "auto" and Lightning would take Apple's GPU, the CPU.

    That GPU has no float64, in which noise, gauges and many figures are computed.
    """
    return "cpu" if accelerator == "auto" and torch.backends.mps.is_available() else accelerator


def native_bfloat16() -> bool:
    """Whether the accelerator that Lightning would choose multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def resolved_precision(precision: Any, *, full: bool = False) -> Any:
    """The precision to train in: where it is "auto", bf16-mixed if the accelerator has bfloat16 natively, else 32.

    full is whether "auto" is 32 in any case.
    """
    if precision != "auto":
        return precision
    return "bf16-mixed" if native_bfloat16() and not full else "32-true"


def one_column_wide(task: Task, data: DataModule) -> bool:
    """Whether the coarsest map of a training image is one column wide.

    On a CPU, oneDNN's bfloat16 gradients of strided convolutions are then not finite, or wrong (torch 2.15).
    """
    side = data.image_size
    width = side if isinstance(side, int) else side[1]
    return width <= max(level.stride for level in task.backbone.levels)


def find_checkpoint(path: str) -> Path:
    """The checkpoint meant by a path: itself, or a run folder's best.ckpt, else its last.ckpt."""
    place = Path(path).expanduser()
    candidates = [place, place / "checkpoints" / "best.ckpt", place / "checkpoints" / "last.ckpt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path} holds no checkpoint: expected a .ckpt file, or a run folder with checkpoints/best.ckpt.")


def load_task(checkpoint: Path, settings: Config | None = None) -> Task:
    """Rebuilds a task from its checkpoint alone, in evaluation mode; raises UsageError where it holds no config.

    settings replaces the config's own `task`, for what concerns evaluation, such as windows or thresholds.
    """
    stored = read_checkpoint(checkpoint)
    config = stored["config"] if settings is None else stored["config"] | {"task": settings}
    check_targets(config)
    untrained = config | {"backbone": config["backbone"] | {"weights": None}}
    task = build_task(untrained, classes=tuple(stored["classes"]))
    task.config = config
    task.load_state_dict(stored["state_dict"])
    task.on_load_checkpoint(stored)
    return task.eval()


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint as plain data; raises UsageError where it is damaged, or was not written by a run of train.py."""
    verify(checkpoint)
    stored = read_pickled(checkpoint, mmap=True)
    check_stored(stored, STORED, of=str(checkpoint))
    return stored  # type: ignore[no-any-return]
