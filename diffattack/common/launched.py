"""What a launcher such as torchrun, accelerate launch or Slurm says in the environment: which of how many
processes this one is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


class LauncherError(ValueError):
    """What a launcher said does not fit together; the message says what, and what to do, in one line."""


@dataclass(frozen=True)
class Launched:
    """One process of several on one or more machines; or the only one."""

    process: int = 0
    processes: int = 1
    on_its_machine: int = 0  # which of those on its machine it is

    @property
    def is_alone(self) -> bool:
        return self.processes == 1


def launched() -> Launched:
    """By RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        LauncherError: they do not fit together.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not given:
        return Launched()
    shown = ", ".join(f"{name}={text}" for name, text in given.items())
    advice = "start it by torchrun or accelerate launch, which set both, or unset RANK and WORLD_SIZE"
    if len(given) == 1 and given.get("WORLD_SIZE") != "1":
        missing = "WORLD_SIZE" if "RANK" in given else "RANK"
        raise LauncherError(f"the environment has {shown} but no {missing}; {advice}")
    if not all(text.isdecimal() for text in given.values()):
        raise LauncherError(f"the environment has {shown}, which are no numbers of processes; {advice}")
    local = os.environ.get("LOCAL_RANK") or "0"
    if not local.isdecimal():
        raise LauncherError(f"the environment has LOCAL_RANK={local}, which is no number; {advice}")
    found = Launched(int(given.get("RANK", 0)), int(given["WORLD_SIZE"]), int(local))
    if found.process >= found.processes:
        raise LauncherError(
            f"the environment has {shown}, but processes count from 0 to WORLD_SIZE - 1; {advice}"
        )
    return found


# of how many processes, by what starts them without setting RANK
OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def check_alone() -> None:
    """Raises LauncherError where others started several processes, each of which takes itself for the only
    one.
    """
    for name, starter in OTHERS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise LauncherError(
                f"{starter} has started {count} processes ({name}), each of which would attack all images; "
                f"give each its --shard K/{count}, start them by accelerate launch, or unset {name}"
            )


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    try:
        return launched().process == 0
    except LauncherError:
        return True  # who else would say it
