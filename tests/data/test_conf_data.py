"""Every file of conf/data composes, and names a data module with options that it takes."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import visiontasks.data as exported

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_one_that_its_data_module_takes(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        node = compose("train", [f"data={name}"]).data
    if OmegaConf.is_missing(node, "root"):
        node.root = "data"
    given = OmegaConf.to_container(node, resolve=True)
    assert isinstance(given, dict)
    module, _, cls = str(given.pop("_target_")).rpartition(".")
    assert module == "visiontasks.data"
    assert cls in exported.__all__
    bases = getattr(exported, cls).__mro__
    taken = {option for base in bases if base is not object for option in inspect.signature(base.__init__).parameters}
    assert given.keys() <= taken
    assert given["train_transform"]["_partial_"] is given["eval_transform"]["_partial_"] is True
    assert given["seed"] == 0


@pytest.mark.parametrize("augment", sorted(path.stem for path in (CONF / "augment").glob("[!_]*.yaml")))
def test_every_augmentation_takes_the_read_only_images_of_the_cache(augment: str) -> None:
    words = [f"augment={augment}", "data.train_size=24", "data.batch_size=24", "data.cache=ram"]
    words += ["head=simclr"] * (augment == "pretraining")  # whose views are the head's
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", words)
    data = instantiate(config.data)
    data.select(frozenset(), frozenset({"label"}))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch.get("image", batch.get("views", [None])[0]).shape == (24, 3, 96, 96)


def test_every_data_module_has_a_file() -> None:
    from visiontasks.data.module import DataModule, conf_name

    things = {name: getattr(exported, name) for name in exported.__all__}
    modules = {name for name, thing in things.items() if isinstance(thing, type) and issubclass(thing, DataModule)}
    assert {conf_name(name) for name in modules - {"DataModule"}} <= set(NAMES)


def test_importing_the_package_imports_little() -> None:
    import subprocess
    import sys

    heavy = "albumentations torch torchvision lightning sklearn"
    code = f"import sys, visiontasks.data; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ImageNet'"):
        exported.ImageNet  # noqa: B018
