"""Which of how many processes this one is, by what torchrun, accelerate launch or Slurm put into the
environment.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from diffattack.common.errors import InputError

# of how many processes, by what starts them without setting RANK
OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
ADVICE = "start it by torchrun or accelerate launch, or unset RANK and WORLD_SIZE"


class Process(NamedTuple):
    """One of several on one or more machines; or the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # which of those on its machine it is


def this_process() -> Process:
    """Raises InputError where RANK, WORLD_SIZE and LOCAL_RANK do not fit together."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given.get("RANK", "0") == "0" and given.get("WORLD_SIZE", "1") == "1":
        return Process()
    numbers = [int(text) for text in given.values() if text.isdecimal()]
    if len(numbers) < len(given) or not given.keys() >= {"RANK", "WORLD_SIZE"} or numbers[0] >= numbers[1]:
        shown = ", ".join(f"{name}={text}" for name, text in given.items())
        raise InputError(f"the environment has {shown}, which do not fit together; {ADVICE}")
    return Process(*numbers)


def check_alone() -> None:
    """Raises InputError where others started several processes that know nothing of each other."""
    for name, starter in OTHERS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise InputError(
                f"{starter} has started {count} processes ({name}), each of which would attack all images; "
                f"give each its --shard K/{count}, start them by accelerate launch, or unset {name}"
            )
