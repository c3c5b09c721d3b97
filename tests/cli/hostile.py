"""What others might put into a config or a file of weights: calls that each would leave a file behind, a canary."""

import importlib
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

Arguments = list[Any]
# CANARY stands for the canary's path, SCRIPT for a script that makes it, PICKLE for a pickle that does.
WRITE = "open('CANARY', 'w').close()"
CANARIES: dict[str, Arguments] = {
    "os.system": ["touch CANARY"],
    "posix.system": ["touch CANARY"],
    "os.popen": ["touch CANARY"],
    "os.mkdir": ["CANARY"],
    "os.makedirs": ["CANARY"],
    "os.mkfifo": ["CANARY"],
    "os.mknod": ["CANARY"],
    "os.open": ["CANARY", 65],
    "os.symlink": ["/nowhere", "CANARY"],
    "os.link": ["SCRIPT", "CANARY"],
    "os.spawnv": [0, "/bin/touch", ["touch", "CANARY"]],
    "os.posix_spawn": ["/bin/touch", ["touch", "CANARY"], {}],
    "pty.spawn": [["touch", "CANARY"]],
    "subprocess.run": [["touch", "CANARY"]],
    "subprocess.call": [["touch", "CANARY"]],
    "subprocess.check_call": [["touch", "CANARY"]],
    "subprocess.check_output": [["touch", "CANARY"]],
    "subprocess.Popen": [["touch", "CANARY"]],
    "subprocess.getoutput": ["touch CANARY"],
    "subprocess.getstatusoutput": ["touch CANARY"],
    "builtins.exec": [WRITE],
    "builtins.eval": [WRITE],
    "builtins.open": ["CANARY", "w"],
    "io.open": ["CANARY", "w"],
    "codecs.open": ["CANARY", "w"],
    "gzip.open": ["CANARY", "w"],
    "bz2.open": ["CANARY", "w"],
    "lzma.open": ["CANARY", "w"],
    "zipfile.ZipFile": ["CANARY", "w"],
    "tarfile.open": ["CANARY", "w"],
    "shelve.open": ["CANARY", "n"],
    "tempfile.mkdtemp": ["", "canary", "FOLDER"],
    "tempfile.mkstemp": ["", "canary", "FOLDER"],
    "shutil.copyfile": ["SCRIPT", "CANARY"],
    "shutil.copy": ["SCRIPT", "CANARY"],
    "shutil.copy2": ["SCRIPT", "CANARY"],
    "shutil.copytree": ["FOLDER/tree", "CANARY"],
    "shutil.make_archive": ["CANARY", "tar", "FOLDER/tree"],
    "pydoc.pipepager": ["words", "tee CANARY > /dev/null"],
    "py_compile.compile": ["SCRIPT", "CANARY"],
    "runpy.run_path": ["SCRIPT"],
    "timeit.timeit": [WRITE, "pass"],
    "cProfile.run": [WRITE, "/dev/null"],
    "logging.FileHandler": ["CANARY"],
    "logging.config.dictConfig": [
        {"version": 1, "handlers": {"x": {"class": "logging.FileHandler", "filename": "CANARY"}}}
    ],
    "urllib.request.urlretrieve": ["file://SCRIPT", "CANARY"],
    "yaml.unsafe_load": ["!!python/object/apply:os.system ['touch CANARY']"],
    "joblib.load": ["PICKLE"],
    "numpy.load": ["PICKLE", None, True],
    "numpy.savetxt": ["CANARY", [1]],
    "numpy.lib.format.open_memmap": ["CANARY", "w+", "u1", [1]],
    "torch.save": [{}, "CANARY"],
    "torch.hub.download_url_to_file": ["file://SCRIPT", "CANARY", None, False],
    "sympy.parsing.sympy_parser.eval_expr": [WRITE, {}, {}],
}


class Trap:
    """Pickled, it is a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def prepared(folder: Path) -> Path:
    """The path of the canary, in a folder that has what the calls above want to find."""
    canary = folder / "canary"
    (folder / "tree").mkdir(exist_ok=True)
    (folder / "tree" / "leaf").touch()
    (folder / "script.py").write_text(WRITE.replace("CANARY", str(canary)))
    (folder / "evil.pkl").write_bytes(pickle.dumps(trap(canary)))
    return canary


def trap(canary: Path) -> Trap:
    return Trap(exec, WRITE.replace("CANARY", str(canary)))


def filled(value: Any, canary: Path) -> Any:
    """The arguments with the paths in their places."""
    if isinstance(value, dict):
        return {key: filled(entry, canary) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, canary) for entry in value]
    if not isinstance(value, str):
        return value
    words = {"CANARY": canary, "SCRIPT": canary.parent / "script.py", "PICKLE": canary.parent / "evil.pkl"}
    for word, path in {**words, "FOLDER": canary.parent}.items():
        value = value.replace(word, str(path))
    return value


def fired(canary: Path) -> list[Path]:
    """What the calls have left behind."""
    return list(canary.parent.glob("canary*"))


def node(target: Any, canary: Path) -> dict[str, Any]:
    return {"_target_": target, "_args_": filled(CANARIES.get(str(target), ["touch CANARY"]), canary)}


def aliases(deep: int = 3) -> dict[str, str]:
    """Each call by a way through our own modules, where one leads to it: visiontasks.data.source.os.mkdir."""
    level = {name: module for name, module in sorted(sys.modules.items()) if name.startswith("visiontasks.")}
    paths = {id(module): name for name, module in level.items()}
    for _ in range(deep):
        below = {f"{path}.{name}": value for path, module in level.items() for name, value in _inner(module)}
        level = {path: module for path, module in below.items() if id(module) not in paths}
        paths |= {id(module): path for path, module in reversed(level.items())}
        level = {path: module for path, module in level.items() if paths[id(module)] == path}
    places = {target: importlib.import_module(target.rpartition(".")[0]) for target in CANARIES}
    ways = {target: paths.get(id(place)) for target, place in places.items()}
    return {target: f"{way}.{target.rpartition('.')[2]}" for target, way in ways.items() if way}


def _inner(module: ModuleType) -> list[tuple[str, ModuleType]]:
    return [(name, value) for name, value in vars(module).items() if type(value) is ModuleType]


SPELLINGS: dict[str, Callable[[str], Any]] = {
    "a space before": lambda target: f" {target}",
    "a space after": lambda target: f"{target} ",
    "a newline": lambda target: f"{target}\n",
    "a zero byte": lambda target: f"{target}\0",
    "a zero-width space": lambda target: f"{target}\u200b",
    "Greek letters": lambda target: target.replace("o", "\u03bf").replace("a", "\u03b1"),
    "full-width letters": lambda target: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in target),
    "a full-width point": lambda target: target.replace(".", "\uff0e"),
    "two points": lambda target: target.replace(".", ".."),
    "a colon": lambda target: target.replace(".", ":"),
    "a path": lambda target: target.replace(".", "/"),
    "behind our package": lambda target: f"visiontasks.{target}",
    "a list": lambda target: [target],
    "words": lambda target: target.split("."),
    "a dict": lambda target: {"_target_": target},
    "a call": lambda target: f"__import__('{target.partition('.')[0]}').{target.partition('.')[2]}",
}

HELPERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "get_method": lambda target: {"_target_": "hydra.utils.get_method", "path": target},
    "get_class": lambda target: {"_target_": "hydra.utils.get_class", "path": target},
    "call": lambda target: {"_target_": "hydra.utils.call", "_args_": [{"_target_": target}]},
    "instantiate": lambda target: {"_target_": "hydra.utils.instantiate", "config": {"_target_": target}},
    "get_original_cwd": lambda target: {"_target_": "hydra.utils.get_original_cwd", "hidden": target},
    "partial": lambda target: {"_target_": "functools.partial", "_args_": [{"_target_": target, "_partial_": True}]},
}


def places(config: dict[str, Any], hostile: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A config with a hostile node in one place each."""
    data, optimizer = config["data"], config["optimizer"]
    return {
        "optimizer": config | {"optimizer": hostile},
        "backbone": config | {"backbone": hostile},
        "a transform": config | {"data": data | {"train_transform": hostile}},
        "lists": config | {"data": data | {"train_transform": [[hostile]]}},
        "positional": config | {"data": data | {"_args_": [hostile]}},
        "a partial": config | {"optimizer": optimizer | {"betas": hostile | {"_partial_": True}}},
        "not recursive": config | {"scheduler": config["scheduler"] | {"_recursive_": False, "x": hostile}},
        "one that nobody asks for": config | {"unheard_of": {"a": {"b": hostile}}},
    }


def interpolated(config: dict[str, Any], canary: Path) -> dict[str, dict[str, Any]]:
    """Configs whose hostile node appears when they are resolved, or resolved once more."""
    call = f"{{_target_: os.system, _args_: [touch {canary}]}}"
    texts = {
        "create": f"${{oc.create:{call}}}",
        "decode": f'${{oc.decode:"{call}"}}',
        "create of decode": f'${{oc.create:${{oc.decode:"{call}"}}}}',
        "escaped": f"\\${{oc.create:{call}}}",
        "the environment": "${oc.env:HOME}",
        "a key": "${scheduler}",
        "a part": "x${oc.env:HOME}y",
    }
    data = config["data"]
    return {name: config | {"data": data | {"train_transform": text}} for name, text in texts.items()}


def opcodes(canary: Path) -> dict[str, bytes]:
    """Raw pickles that call through each of the opcodes that can."""
    text = f"touch {canary}".encode()
    string = b"X" + struct.pack("<I", len(text)) + text
    return {
        "REDUCE": b"\x80\x02cos\nsystem\n" + string + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + string + b"\x85R.",
        "INST": b"(" + string + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + string + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + string + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93" + string + b"\x85}\x92.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb" + string + b"b.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID": b"\x80\x02" + string + b"Q.",
        "GLOBAL": b"\x80\x02cbuiltins\neval\n.",
        "protocol 0": b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
    }


GADGETS = (
    *("builtins.getattr", "builtins.__import__", "builtins.compile", "builtins.setattr", "operator.attrgetter"),
    *("functools.partial", "importlib.import_module", "pickle.loads", "torch.load", "torch.hub.load", "numpy.load"),
    *("torch.serialization.load", "torch.storage._load_from_bytes", "torch.jit._serialization.load", "runpy._run_code"),
)


def hostile_files(folder: Path, canary: Path, stored: dict[str, Any]) -> dict[str, Path]:
    """More than sixty files that pretend to hold weights or a run, by what they try."""
    files: dict[str, Path] = {}

    def put(name: str, suffix: str = ".ckpt") -> Path:
        files[name] = folder / f"{len(files):03d}{suffix}"
        return files[name]

    for name, data in opcodes(canary).items():
        put(f"{name} alone").write_bytes(data)
        _with_pickle(put(f"{name} in an archive"), data)
    for gadget in GADGETS:
        place, _, function = gadget.rpartition(".")
        put(gadget).write_bytes(b"\x80\x02c" + f"{place}\n{function}\n".encode() + b"X\x01\x00\x00\x00x\x85R.")
    for field in ("config", "classes", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "new"):
        torch.save(stored | {field: trap(canary)}, put(f"a call in {field}"))
    torch.save(stored | {"state_dict": {"a": trap(canary)}}, put("a call among the weights"))
    torch.save({trap(canary): 1}, put("a call as a key"))
    torch.save(stored | {"loops": trap(canary)}, put("old format"), _use_new_zipfile_serialization=False)
    for protocol in (1, 3, 4, 5):
        put(f"protocol {protocol}").write_bytes(pickle.dumps({"state_dict": trap(canary)}, protocol))
    _archives(put, canary)
    _safetensors(put)
    _shapes(put, stored)
    return files


def _with_pickle(path: Path, data: bytes) -> None:
    """An archive as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def _archives(put: Callable[..., Path], canary: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(str(put("TorchScript")))
    for name, place in (("above", "../canary"), ("absolute", str(canary)), ("linked", "link/canary")):
        with tarfile.open(put(f"tar, {name}"), "w") as tar:
            if name == "linked":
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(canary.parent)
                tar.addfile(link)
            entry = tarfile.TarInfo(place)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        with zipfile.ZipFile(put(f"zip, {name}"), "w") as archive:
            archive.writestr(place, "x")
    with zipfile.ZipFile(put("zip in zip"), "w") as archive:
        archive.writestr("archive/data.pkl", b"PK\x05\x06" + bytes(18))
    with zipfile.ZipFile(put("zip bomb"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(5_000_000))
    put("half a zip").write_bytes(b"PK\x03\x04" + bytes(100))
    objects = np.array([trap(canary)], dtype=object)
    with put("npz of objects").open("wb") as file:
        np.savez(file, state_dict=objects)
    with put("npy of objects").open("wb") as file:
        np.save(file, objects, allow_pickle=True)
    put("nothing").write_bytes(b"")
    put("a page").write_text("<!DOCTYPE html><html>404</html>")
    put("yaml").write_text("!!python/object/apply:os.system ['touch x']")


def _safetensors(put: Callable[..., Path]) -> None:
    def write(name: str, header: Any, *, length: int | None = None, data: bytes = bytes(8)) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        put(f"safetensors, {name}", ".safetensors").write_bytes(struct.pack("<Q", size) + text + data)

    def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
        return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}

    write("header beyond the file", tensor([2], 0, 8), length=2**62)
    write("header of no length", b"", length=0)
    write("no JSON", b"{'a': os.system}")
    write("a list", [1, 2])
    write("offsets beyond the file", tensor([2**40], 0, 2**42))
    write("offsets that wrap around", tensor([2**62, 4], 0, 8))
    write("offsets backwards", tensor([2], 8, 0))
    write("a negative shape", tensor([-2], 0, 8))
    write("overlapping", {**tensor([2], 0, 8), "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    write("unknown type", {"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}})


def _shapes(put: Callable[..., Path], stored: dict[str, Any]) -> None:
    """Data alone, of a kind that would take all memory, time or stack, or that is no run's."""
    config = stored["config"]
    endless: list[Any] = []
    endless.append(endless)
    laughs: list[Any] = []
    for _ in range(12):
        laughs = [laughs] * 10
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    for name, value in {"endless": endless, "laughing": laughs, "deep": deep}.items():
        torch.save({"state_dict": value}, put(f"{name} weights"))
        torch.save(stored | {"config": config | {"task": config["task"] | {"x": value}}}, put(f"{name} config"))
    torch.save({"a": torch.zeros(1, dtype=torch.half).expand(2**40)}, put("a terabyte of one number"))
    torch.save({"a": torch.empty(2**40, device="meta")}, put("a terabyte of nothing"))
    torch.save({"a": torch.zeros(3, 3).to_sparse()}, put("sparse"))
    torch.save({"a" * 5000: torch.zeros(1)}, put("a long name"))
    names = ("__class__", "__dict__", "forward.__globals__", "training", "_parameters.x", "")
    torch.save({name: torch.zeros(1) for name in names}, put("names of Python's own"))
    for field in ("config", "classes", "state_dict"):
        torch.save({key: value for key, value in stored.items() if key != field}, put(f"without {field}"))
        torch.save(stored | {field: 7}, put(f"{field} is a number"))
    torch.save(
        stored | {"config": config | {"data": config["data"] | {"defaults": [{"/hydra": "x"}]}}}, put("defaults")
    )
    torch.save(stored | {"config": config | {"hydra": {"callbacks": {}}}}, put("hydra"))
    torch.save(torch.zeros(3), put("one tensor"))
