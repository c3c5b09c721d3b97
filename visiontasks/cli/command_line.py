"""What all entry points share: help without heavy imports, the user's own conf/ folder, mistakes as one sentence."""

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visiontasks.cli.meeting import at_one_time
from visiontasks.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # in the wheel, in a checkout
PATHS = (  # quoted for Hydra
    *("run", "input", "output", "init_from", "resume"),
    *("data.root", "backbone.weights", "task.extractor"),
)
_OVERRIDE = re.compile(r"[+~]{0,2}(?P<key>[A-Za-z_][\w./@:-]*)(=(?P<value>.*))?", flags=re.DOTALL)


def run(
    job: Callable[..., object],
    *,
    config: str,
    usage: str,
    arguments: list[str],
    before: Callable[[list[str]], object] | None = None,
) -> None:
    """Composes conf/<config>.yaml with the arguments and calls the job with it; exits 2 with a sentence on a mistake.

    usage is printed, with every choice of every group that the config names, where the arguments ask for help.
    before is called with the arguments ahead of the composition.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_text(usage, groups(config)))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the handler below explains
    with one_sentence(debug="debug=true" in arguments, config=config, arguments=arguments):
        import hydra

        if before is not None:
            before(arguments)
        sys.argv[1:] = with_user_conf(sweep_first(at_one_time([quoted(argument) for argument in arguments], config)))
        failures: list[Exception] = []
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(_kept_quiet(job, failures))()
        if failures:
            raise failures[0]


def _kept_quiet(job: Callable[..., object], failures: list[Exception]) -> Callable[..., object]:
    """The job with its ranks, its exception put aside: Hydra would print a line of its own before passing it on."""
    home = os.getpid()

    @functools.wraps(job)
    def quiet(composed: Any) -> object:
        from visiontasks.cli.ranks import one_job

        try:
            with one_job(composed):
                return job(composed)
        except Exception as error:
            if os.getpid() != home:  # a launcher runs it in a process of its own
                raise
            failures.append(error)
            return None

    return quiet


def conf_folders() -> list[Path]:
    """Our conf/ and, where the working directory has another one, the user's own."""
    own = Path.cwd() / "conf"
    return [CONF, own] if own.is_dir() and own.resolve() != CONF.resolve() else [CONF]


def sweep_first(arguments: list[str]) -> list[str]:
    """The arguments with -m ahead of the overrides: Hydra refuses those on both sides of it."""
    return sorted(arguments, key=lambda argument: argument not in {"-m", "--multirun"})


def with_user_conf(arguments: list[str]) -> list[str]:
    """The arguments with the user's conf/ folder added to Hydra's search path, and his code to Python's."""
    folders = conf_folders()
    if len(folders) == 1 or "--config-dir" in arguments:
        return arguments
    sys.path.insert(0, str(Path.cwd()))
    return ["--config-dir", str(folders[1]), *arguments]


def quoted(argument: str) -> str:
    """An override whose value is a path, quoted so that Hydra takes spaces, commas and brackets as they are."""
    key, equals, value = argument.partition("=")
    plain = re.fullmatch(r"[\w./\\:+-]*", value) or value[:1] in {"'", '"', "$"}
    if key.lstrip("+") not in PATHS or not equals or plain:
        return argument
    escaped = value.replace("'", r"\'")
    return f"{key}='{escaped}'"


def choices(group: str) -> list[str]:
    """The names that a config group offers, ours and the user's, sorted."""
    files = (file for folder in conf_folders() for file in (folder / group).glob("*.yaml"))
    return sorted({file.stem for file in files if not file.stem.startswith("_")})


def groups(config: str) -> list[str]:
    """The config groups that a primary config chooses from."""
    text = (CONF / f"{config}.yaml").read_text()
    listed = re.findall(r"^  - (?:optional )?(\w+):", text.partition("defaults:")[2], flags=re.MULTILINE)
    return [group for group in listed if any((folder / group).is_dir() for folder in conf_folders())]


def help_text(usage: str, names: list[str]) -> str:
    """The usage and every choice of every group."""
    width = max(map(len, names), default=0)
    lines = [f"  {name:<{width}}  {' | '.join(choices(name))}" for name in names]
    return "\n".join([usage.strip(), "", "Choices:", *lines])


@contextmanager
def one_sentence(*, debug: bool, config: str, arguments: list[str]) -> Iterator[None]:
    """Turns a user's mistake into a sentence and exit code 2; other exceptions, and all of them in debug, pass."""
    try:
        yield
    except Exception as error:
        sentence = explained(error, config, arguments)
        if debug or sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def explained(error: BaseException, config: str, arguments: list[str]) -> str | None:
    """The sentence for a user's mistake, None for what is not known to be one."""
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, UsageError):
            return " ".join(str(cause).split())
    import hydra.errors
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, hydra.errors.MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, hydra.errors.ConfigCompositionException) and "override" in str(error):
        return _unknown_key(str(error), config, arguments)
    if isinstance(error, hydra.errors.InstantiationException):
        return f"{' '.join(str(chain[-1]).split())} (debug=true shows where)."
    if isinstance(error, hydra.errors.HydraException | OmegaConfBaseException):
        return " ".join(str(chain[-1]).split())
    return None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _unknown_choice(error: BaseException) -> str:
    missing = str(getattr(error, "missing_cfg_file", "") or "")
    group, _, name = missing.rpartition("/")
    if not group:
        return " ".join(str(error).split())
    return f"{group}={name} is not a choice: {_nearest(name, choices(group), prefix=f'{group}=')}."


def _unknown_key(message: str, config: str, arguments: list[str]) -> str:
    found = re.search(r"[Cc]ould not (?:override|append|delete) '([^']+)'", message)
    if found is None:
        return " ".join(message.split())
    key = found[1].split("@")[0]
    parent, _, name = key.rpartition(".")
    options = _options(parent, key, config, arguments)
    prefix = f"{parent}." if parent else ""
    return f"{key} is not an option: {_nearest(name, options, prefix=prefix)}."


def _options(parent: str, key: str, config: str, arguments: list[str]) -> list[str]:
    """The keys beside a mistyped one, from a composition without it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig, OmegaConf

    others = [a for a in arguments if "=" in a and not a.startswith("-") and a.partition("=")[0].strip("+~") != key]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.select(compose(config, others), parent) if parent else compose(config, others)
    if not isinstance(node, DictConfig):
        return []
    return sorted(str(name) for name in node if not str(name).startswith("_"))


def _nearest(name: str, options: list[str], *, prefix: str) -> str:
    if not options:
        return "nothing of that name can be set; python train.py --help lists the choices"
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    meant = f"did you mean {prefix}{close[0]}? " if close else ""
    listed = ", ".join(options)
    return f"{meant}{'The' if meant else 'the'} choices are {listed}"


def command(script: str, overrides: list[str]) -> str:
    """The exact command to type again."""
    return shlex.join(["python", script, *overrides])


def check_overrides(words: Sequence[str], *, of: Path) -> None:
    """Refuses words that train.py does not write to command.txt: options of Hydra, and choices outside of conf/."""
    for word in words:
        found = _OVERRIDE.fullmatch(word)
        key, value = (found["key"], found["value"] or "") if found else ("hydra", "")
        outside = ".." in value or value.lstrip("'\"[ ").startswith("/")
        if "hydra" in key or ("." not in key and outside and key not in PATHS):
            raise UsageError(f"{of} holds {word[:99]!r}, which train.py never writes: type the whole command yourself.")
