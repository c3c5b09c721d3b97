"""Offers what a checkpoint holds to Hydra as the config choice `stored`, so that evaluation starts from it alone."""

from visiontasks.errors import UsageError


def offer_checkpoint(arguments: list[str]) -> None:
    """Registers the checkpoint named by run=PATH; raises UsageError where the argument or the checkpoint is missing."""
    path = next((argument.partition("=")[2] for argument in arguments if argument.startswith("run=")), "")
    if not path:
        raise UsageError("No run was named: type run=PATH with a run folder of train.py or one of its checkpoints.")
    from hydra.core.config_store import ConfigStore

    from visiontasks.cli.build import find_checkpoint, read_checkpoint

    checkpoint = find_checkpoint(path.strip("'\""))
    config = read_checkpoint(checkpoint)["config"]
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    store = ConfigStore.instance()
    facts = {"path": str(checkpoint), "folder": str(folder), "seed": config["seed"]}
    store.store(group="checkpoint", name="stored", node=facts)
    store.store(group="task", name="stored", node=config["task"])
    store.store(group="data", name="stored", node=config["data"])
    store.store(group="augment", name="stored", node=config["augment"])
