"""The flags of the machine that a run is on."""

from __future__ import annotations

from dataclasses import dataclass

from diffattack.common.flags import count, flag


@dataclass
class MachineOptions:
    title = "machine"

    device: str = flag(
        "auto", "auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps or cpu", "DEVICE", identifies_run=False
    )
    dtype: str = flag(
        "auto",
        "precision of the diffusion model; auto: bf16 on a GPU that has it, else fp32. Losses and optimisers "
        "are fp32",
        choices=("auto", "fp32", "bf16"),
    )
    batch_size: int | None = count(
        "images at once (default: on a GPU found from its free memory, else 1; 1 in the learnable modes)",
        "B",
        identifies_run=False,
    )
    processes: int | None = count(
        "processes that share out the images (default: on a CPU one for each core that memory allows, unless "
        "OMP_NUM_THREADS is set; else 1, and 1 in mode learnable)",
        "P",
        identifies_run=False,
    )
    compile: bool = flag(
        False,
        "let torch.compile make iterations quicker, which takes minutes at first: for runs of many images",
        identifies_run=False,
    )
    shard: str = flag(
        "0/1",
        "attack the K-th of N equal parts of the images, K from 0, as on the K-th of N machines; the last "
        "of them adds up",
        "K/N",
        identifies_run=False,
    )
    merge: bool = flag(
        False,
        "attack nothing: judge what is not judged yet, and add up the images that are finished",
        identifies_run=False,
    )
