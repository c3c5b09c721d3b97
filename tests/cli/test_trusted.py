"""Configs, run folders and checkpoints of others execute nothing: no canary is ever there."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tests.cli.conftest import TINY
from tests.cli.hostile import (
    CANARIES,
    GADGETS,
    HELPERS,
    SPELLINGS,
    aliases,
    filled,
    fired,
    hostile_files,
    interpolated,
    node,
    places,
    prepared,
    trap,
)
from visiontasks.backbones import CifarResNet
from visiontasks.cli.build import PARTS, build_task, load_task, plain
from visiontasks.cli.command_line import CONF, UsageError, check_overrides
from visiontasks.cli.train import begin_folder, resumed
from visiontasks.cli.trusted import check_environment, check_targets, declared_targets
from visiontasks.weights import load_backbone, read_tensors

FEW = ("os.system", "builtins.eval", "torch.save", "yaml.unsafe_load")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """A checkpoint as train.py writes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["backbone=resnet20", "data.image_size=32", "seed=0", "channels_last=false"])
    parts = {part: composed[part] for part in PARTS if part in composed}
    config = {
        part: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for part, v in parts.items()
    }
    task = build_task(config, classes=("a", "b"))
    return {"config": task.config, "classes": ["a", "b"], "state_dict": task.state_dict()}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return prepared(tmp_path)


def refused(config: Any, stored: dict[str, Any], canary: Path) -> None:
    """Neither a command line nor a checkpoint gets through with it."""
    with pytest.raises(UsageError) as sentence:
        plain(OmegaConf.create({"config": config}))
    assert len(str(sentence.value).splitlines()) <= 2  # a name of its own may hold a newline
    torch.save(stored | {"config": config, "state_dict": {}}, canary.parent / "hostile.ckpt")
    with pytest.raises(UsageError):
        load_task(canary.parent / "hostile.ckpt")
    assert not fired(canary)


def test_a_checkpoint_of_ours_is_taken(stored: dict[str, Any], tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "own.ckpt")
    assert load_task(tmp_path / "own.ckpt").classes == ("a", "b")
    assert len(CANARIES) == 54
    assert not declared_targets() & CANARIES.keys()


@pytest.mark.parametrize("number", range(len(CANARIES)))
def test_no_call_is_made_from_a_config(number: int, stored: dict[str, Any], canary: Path) -> None:
    ways = list(places(stored["config"], node(list(CANARIES)[number], canary)).values())
    refused(ways[number % len(ways)], stored, canary)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", CANARIES)
def test_no_call_is_made_from_anywhere_in_a_config(target: str, stored: dict[str, Any], canary: Path) -> None:
    for config in places(stored["config"], node(target, canary)).values():
        refused(config, stored, canary)


def test_nor_by_another_way_to_the_same_function(stored: dict[str, Any], canary: Path) -> None:
    ways = aliases()
    assert len(ways) >= 40, ways.keys()
    assert any(way.startswith("visiontasks.") and way.endswith(".os.system") for way in ways.values())
    for target, way in ways.items():
        refused(stored["config"] | {"optimizer": node(target, canary) | {"_target_": way}}, stored, canary)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_nor_under_another_spelling(spelling: str, stored: dict[str, Any], canary: Path) -> None:
    for target in ("os.system", "torch.optim.AdamW"):
        config = stored["config"] | {"optimizer": node("os.system", canary) | {"_target_": SPELLINGS[spelling](target)}}
        refused(config, stored, canary)


@pytest.mark.parametrize("helper", HELPERS)
def test_nor_through_what_hydra_offers(helper: str, stored: dict[str, Any], canary: Path) -> None:
    for target in FEW:
        refused(stored["config"] | {"optimizer": HELPERS[helper](target)}, stored, canary)


def test_nor_from_what_is_resolved_later(stored: dict[str, Any], canary: Path) -> None:
    for name, config in interpolated(stored["config"], canary).items():
        torch.save(stored | {"config": config, "state_dict": {}}, canary.parent / "hostile.ckpt")
        with pytest.raises(UsageError, match="still to be resolved"):
            load_task(canary.parent / "hostile.ckpt")
        if "create" in name or name == "escaped":
            with pytest.raises(UsageError):
                plain(OmegaConf.create(config))
    assert not fired(canary)


@pytest.mark.parametrize("kind", [tuple, set])
def test_nor_from_containers_that_are_no_lists(kind: Any, stored: dict[str, Any], canary: Path) -> None:
    inside = kind([("_target_", "os.system")]) if kind is set else kind([node("os.system", canary)])
    data = stored["config"]["data"] | {"train_transform": inside}
    torch.save(stored | {"config": stored["config"] | {"data": data}}, canary.parent / "hostile.ckpt")
    with pytest.raises(UsageError):
        load_task(canary.parent / "hostile.ckpt")
    assert not fired(canary)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", CANARIES)
def test_each_of_them_would_have_left_a_canary(target: str, canary: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_call, args=(target, canary))
    process.start()
    process.join(60)
    assert fired(canary)


def _call(target: str, canary: Path) -> None:
    import importlib

    place, _, name = target.rpartition(".")
    result = getattr(importlib.import_module(place), name)(*filled(CANARIES[target], canary))
    for end in ("communicate", "close"):
        getattr(result, end, int)()


WORDS = (
    *("hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x={_target_:os.system}", "++hydra.job.chdir=true"),
    *("~hydra.job_logging", "hydra/launcher=joblib", "hydra.searchpath=[file:///x]", "hydra.run.dir.x=1"),
    *("hydra.sweep.dir=/x", "data@hydra.job_logging=digits", "--config-dir", "--config-dir=/x", "-cn", "-m"),
    *("--config-path=/x", "--hydra-help", " hydra.verbose=true", "\thydra.verbose=true", "'hydra.verbose'=true"),
    *("experiment=../../x", "experiment=/x", "+experiment='../x'", "data=[/x]", "", "=1", "os.system('x')", "data\n=x"),
)


@pytest.mark.parametrize("word", WORDS)
def test_a_run_folder_gives_no_orders_to_hydra(word: str, tmp_path: Path) -> None:
    import shlex

    (tmp_path / "command.txt").write_text(shlex.join(["python", "train.py", "backbone=resnet20", word]))
    with pytest.raises(UsageError, match="type the whole command yourself"):
        resumed([f"resume={tmp_path}"])


def test_but_what_we_write_ourselves(tmp_path: Path) -> None:
    words = [*TINY, "experiment=camvid", "init_from=/a/b", "init_from='../x y'", "+trainer.overfit_batches=1"]
    words += ["data.root=/a/../hydra", "optimizer.betas=[0.9,0.99]", "loss=null", "~callbacks.ema"]
    check_overrides(words, of=tmp_path)


def test_half_a_command_is_a_sentence(tmp_path: Path, call: Callable[..., None], capsys: Any) -> None:
    (tmp_path / "command.txt").write_text("python train.py 'data.root=x")
    with pytest.raises(SystemExit):
        call("train", f"resume={tmp_path}")
    assert "is no command" in capsys.readouterr().err


def into_a_backbone(path: Path) -> None:
    load_backbone(CifarResNet(depth=20), path)


READERS: tuple[Callable[[Path], Any], ...] = (read_tensors, into_a_backbone, load_task)


def sentence_of(read: Callable[[Path], Any], path: Path) -> str:
    """Why a file is not taken; nothing where it is."""
    try:
        read(path)
    except UsageError as error:
        return str(error)
    return ""


def test_no_file_of_weights_calls_anything(stored: dict[str, Any], canary: Path) -> None:
    files = hostile_files(canary.parent, canary, stored)
    assert len(files) >= 60
    taken = []
    for name, path in files.items():
        sentences = [sentence_of(read, path) for read in READERS]
        taken += [(name, read.__name__) for read, said in zip(READERS, sentences, strict=True) if not said]
        assert all(len(said.splitlines()) <= 1 and len(said) < 1500 for said in sentences), name
        assert not fired(canary), name
    assert {name for name, reader in taken if reader == "load_task"} == set()
    good = ("without c", "config is", "classes is", "defaults", "hydra")  # weights of ours, below what no run writes
    assert all(name.startswith(good) for name, reader in taken if reader == "into_a_backbone"), taken
    dangerous = ("call", "safetensors", "zip", "tar", "protocol", "np", "TorchScript", *GADGETS)
    assert not [name for name, _ in taken if any(word in name for word in dangerous)], taken


def test_hydra_composes_nothing_from_a_checkpoint(
    stored: dict[str, Any], canary: Path, call: Callable[..., None], capsys: Any
) -> None:
    handler = {"()": "os.system", "command": f"touch {canary}"}
    data = {"version": 1, "handlers": {"x": handler}, "root": {"handlers": ["x"]}}
    task = {"defaults": [{"/data@hydra.job_logging": "stored"}, "_self_"]} | stored["config"]["task"]
    torch.save(stored | {"config": stored["config"] | {"task": task, "data": data}}, canary.parent / "hostile.ckpt")
    for script in ("evaluate", "predict"):
        with pytest.raises(SystemExit) as stop:
            call(script, f"run={canary.parent / 'hostile.ckpt'}", f"input={canary.parent}")
        assert stop.value.code == 2
    assert not fired(canary)


@pytest.mark.parametrize("field", ["loops", "callbacks", "optimizer_states"])
def test_going_on_with_a_run_of_others_calls_nothing(
    stored: dict[str, Any], canary: Path, field: str, call: Callable[..., None], capsys: Any
) -> None:
    torch.save(stored | {field: trap(canary)}, canary.parent / "hostile.ckpt")
    with pytest.raises(SystemExit) as stop:
        call("train", *TINY, f"resume={canary.parent / 'hostile.ckpt'}", f"hydra.run.dir={canary.parent / 'run'}")
    assert stop.value.code == 2
    assert "cannot be read as weights" in capsys.readouterr().err
    assert not fired(canary)


ENVIRONMENT = {
    "itself": "${oc.env:SECRET}",
    "a part": "a-${oc.env:SECRET}-b",
    "by another key": "${mine}",
    "decoded": "${oc.decode:${oc.env:SECRET}}",
    "a default": "${oc.env:UNKNOWN,${oc.env:SECRET}}",
    "in a list": ["x", ["${oc.env:SECRET}"]],
    "a key by its name": "${letters.${oc.env:LETTER}}",
}


def with_secret(value: Any) -> DictConfig:
    letters = {"a": "b"}
    return OmegaConf.create({"data": {"root": value}, "mine": "${oc.env:SECRET}", "letters": letters, "seed": 0})


@pytest.mark.parametrize("way", ENVIRONMENT)
def test_the_environment_stays_out_of_checkpoints(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("LETTER", "a")
    config = with_secret(ENVIRONMENT[way])
    with pytest.raises(UsageError, match=r"from the environment|by the environment") as refusal:
        check_environment(config, PARTS)
    assert "hunter2" not in str(refusal.value)
    assert config.mine == "hunter2"  # which is read as before


def test_where_nothing_keeps_it_it_may_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    config = with_secret("photos")
    check_environment(config, PARTS)
    begin_folder(tmp_path, config, ["mine=${oc.env:SECRET}"])
    assert "mine: ${oc.env:SECRET}" in (tmp_path / "config.yaml").read_text()
    assert all("hunter2" not in file.read_text() for file in tmp_path.iterdir())


def test_a_run_is_refused_before_it_would_keep_it(
    tmp_path: Path, call: Callable[..., None], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(SystemExit):
        call("train", *TINY, "data.max_bad_fraction='${oc.env:SECRET}'", f"hydra.run.dir={tmp_path / 'run'}")
    assert 'type data.max_bad_fraction="$SECRET"' in capsys.readouterr().err
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_command_is_kept_as_it_was_typed(
    tmp_path: Path, call: Callable[..., None], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setattr("visiontasks.cli.train.tune", _stop)
    with pytest.raises(SystemExit):
        call("train", *TINY, "+mine='${oc.env:SECRET}'", f"hydra.run.dir={tmp_path}")
    assert "${oc.env:SECRET}" in (tmp_path / "command.txt").read_text()
    assert all("hunter2" not in file.read_text() for file in tmp_path.rglob("*.*") if file.is_file())


def _stop(*_: Any) -> None:
    raise UsageError("far enough")


def test_a_config_of_others_may_be_endless() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(UsageError, match="without end"):
        check_targets(endless)


def test_the_package_unpickles_and_unpacks_nowhere_else() -> None:
    """Every call of a reader that could run code is known by its line's words."""
    known = {
        "pickled.py": ["torch.load(file, map_location"],
        "data/source.py": ["np.load(folder"],
        "data/yolo_txt.py": ["yaml.safe_load("],
        "cli/trusted.py": ["yaml.safe_load("],
    }
    words = (
        "torch.load(",
        "np.load(",
        "pickle.load",
        "yaml.load",
        "safe_load",
        "unpack_archive",
        "extractall",
        "eval(",
        "exec(",
    )
    package = CONF.parent / "visiontasks"
    found: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        for line in file.read_text().splitlines():
            if any(f" {word}" in line.replace("(", " ( ").replace(" ( ", "(").replace("=", " ") for word in words):
                found.setdefault(str(file.relative_to(package)), []).append(line.strip())
    assert found.keys() <= known.keys(), found
    for name, lines in found.items():
        assert all(any(word in line for word in known[name]) for line in lines), (name, lines)
