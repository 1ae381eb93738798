"""What the launcher told this process through environment variables, known before it communicates.

Imports nothing that starts MPI or Horovod.
"""

import os
import socket

from horovod_megdet.errors import UserError

PLACE_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)
"""Variables for rank, number of ranks, and both on the host: of Open MPI, horovodrun --gloo, MPICH and its relatives,
and srun with PMIx."""


def by_launcher() -> bool:
    """Whether a launcher started this process, even as the only rank."""
    return _variables() is not None


def by_horovodrun() -> bool:
    """Whether horovodrun itself started it, with the Gloo controller; with the MPI controller, mpirun does."""
    return "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ


def elastic() -> bool:
    """Whether horovodrun started it with its elastic driver: ranks may come and go."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def set_place(rank: int, size: int, local_rank: int, local_size: int, cross_rank: int, cross_size: int) -> None:
    """Notes the new place of this process in an elastic job, for Horovod, too."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    numbers = (rank, size, local_rank, local_size, cross_rank, cross_size)
    os.environ.update({f"HOROVOD_{name}": str(number) for name, number in zip(names, numbers, strict=True)})


def by_mpi() -> bool:
    """Whether an MPI launcher started this process and Horovod will use MPI."""
    others = (names[0] for names in PLACE_VARIABLES if names[0] != "HOROVOD_RANK")
    return any(name in os.environ for name in others) and os.environ.get("HOROVOD_CONTROLLER", "mpi") == "mpi"


def rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    names = _variables()
    return int(os.environ[names[0]]) if names else 0


def size() -> int:
    """The number of ranks that the launcher started; 1 without a launcher."""
    names = _variables()
    return int(os.environ.get(names[1], "1")) if names else 1


def host() -> str:
    """Name of this host."""
    return socket.gethostname()


def check_srun() -> None:
    """Raises :class:`UserError` where srun started several processes without telling them how to find each other.

    Each would believe that it is alone, and all would train the same in the same run directory. A shell in a batch job,
    also one that srun opened, is one process, and an mpirun in it tells its ranks.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and not by_launcher():
        raise UserError(
            f"srun started {tasks} processes that do not know about each other: add --mpi=pmix to srun (see slurm/"
            "megdet_srun.sbatch), or start the ranks with mpirun (see slurm/megdet.sbatch)."
        )


def _variables() -> tuple[str, ...] | None:
    return next((names for names in PLACE_VARIABLES if names[0] in os.environ), None)
