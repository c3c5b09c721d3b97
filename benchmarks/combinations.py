"""Writes docs/combinations.md: every backbone of conf/, what it is made of, and the heads that fit it.

python benchmarks/combinations.py > docs/combinations.md     each cell is a test in tests/test_combinations.py
"""

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from visiontasks.cli.command_line import CONF, choices
from visiontasks.contracts import Backbone, UsageError

CHOSEN = {name: OmegaConf.load(CONF / "head" / f"{name}.yaml") for name in choices("head")}
OTHERS = {"pretraining", "generation"}  # whose heads docs/pretraining.md and docs/generation.md list
HEADS = [  # but for aliases
    name
    for name, chosen in CHOSEN.items()
    if "_target_" in chosen and get_class(chosen["_target_"]).serves not in OTHERS
]


def backbone(name: str) -> Backbone:
    """The network of a choice, untrained."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"backbone={name}"])
    made: Backbone = instantiate(config.backbone, _convert_="all")
    return made


def row(name: str) -> str:
    """One line of the table."""
    made = backbone(name)
    millions = sum(parameter.numel() for parameter in made.parameters()) / 1e6
    levels = ", ".join(f"{level.channels} at {level.stride}" for level in made.levels)
    return f"| {name} | {millions:.2f} | {levels} | " + " | ".join(scores(made, head) for head in HEADS) + " |"


def scores(made: Backbone, head: str) -> str:
    """'yes' once the head has answered two images through the network, 'no' where it refuses the network's strides."""
    try:
        module = instantiate(CHOSEN[head])(levels=made.levels, num_classes=3)
    except UsageError:
        return "no"
    module.eval()(made.eval()(torch.rand(2, 3, 64, 64)))
    return "yes"


def main() -> None:
    print("# Backbones and heads\n")
    print("Each cell takes a training step in `tests/test_combinations.py` (all of them with `pytest -m exhaustive`).")
    print("Written by `python benchmarks/combinations.py`.\n")
    print("| backbone | M parameters | levels: channels at stride | " + " | ".join(HEADS) + " |")
    print("|---|---|---|" + "---|" * len(HEADS))
    for name in choices("backbone"):
        print(row(name))


if __name__ == "__main__":
    main()
