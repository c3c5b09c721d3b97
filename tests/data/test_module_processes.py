"""Two gloo processes count their bad files together, and stop together or not at all."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.data.test_module import NoiseData
from visiontasks.contracts import UsageError

CASES: dict[str, dict[str, Any]] = {
    "each has one, and one of 24 is allowed": {"bad": frozenset({1, 2}), "max_bad_fraction": 0.05},
    "within bounds": {"bad": frozenset({10, 11}), "max_bad_fraction": 0.1},
    "alone in the last batch of a validation": {"bad": frozenset({4}), "max_bad_fraction": 0.1, "batch_size": 2},
    "alone in a batch of training": {"bad": frozenset({3}), "max_bad_fraction": 0.5, "batch_size": 1},
}
End = tuple[str, dict[str, str]]  # what stopped a process, and the bad files that it names


def ended(rank: int, options: dict[str, Any]) -> End:
    """Hands the batches of an epoch and a validation over as Lightning does."""
    data = NoiseData(**options)
    trainer: Any = SimpleNamespace(world_size=2, global_rank=rank, training=True, lightning_module=None)
    data.trainer = trainer
    try:
        for batch in data.train_dataloader():
            data.on_before_batch_transfer(batch, 0)
        trainer.training = False
        for batch in data.val_dataloader():
            data.on_before_batch_transfer(batch, 0)
        data.teardown()
    except UsageError as error:
        return str(error), data.bad_files
    return "", data.bad_files


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ends = {name: ended(rank, options) for name, options in CASES.items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(ends))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[End, End]]:
    """How each case ends in the first process and in the second."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_two, args=(str(folder),), nprocs=2)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return {name: (first[name], second[name]) for name in CASES}


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("each has one, and one of 24 is allowed", "2 of 24 train files are bad: noise/"),
        ("within bounds", ""),
        ("alone in the last batch of a validation", "1 of 5 val files are bad: noise/4 is bad."),
        ("alone in a batch of training", "All 1 files of a batch are bad, among them noise/3 is bad"),
    ],
)
def test_both_stop_for_the_bad_files_of_both(ends: dict[str, tuple[End, End]], case: str, sentence: str) -> None:
    first, second = ends[case]
    assert first == second
    assert first[0][: len(sentence)] == sentence
    assert bool(first[0]) == bool(sentence)
    assert set(first[1]) == {f"noise/{index}" for index in CASES[case]["bad"]}
