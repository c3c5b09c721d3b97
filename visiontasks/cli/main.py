"""visiontasks train|evaluate|predict|generate|convert|doctor: the entry points, from any folder."""

import importlib
import sys

COMMANDS = ("train", "evaluate", "predict", "generate", "convert", "doctor")


def main() -> None:
    """Runs the entry point that the first argument names with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        print(f"usage: visiontasks {'|'.join(COMMANDS)} [arguments]; each answers --help")
        sys.exit(0 if name in {"--help", "-h"} else 2)
    module = importlib.import_module(f"visiontasks.cli.{name}")
    sys.argv = [str(module.__file__), *sys.argv[2:]]  # a script that further processes can be started with
    module.main()


if __name__ == "__main__":
    main()
