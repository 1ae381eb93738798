"""Collectives without Horovod: before it starts, and as the least that a message can cost."""

import ctypes

import numpy as np

from horovod_megdet.comm.defaults import set_launch_defaults


class BareMPI:
    """Collectives of MPI itself.

    To be made before :func:`init`, whose background thread would talk in between, and only if ``launched.by_mpi()``.
    """

    def __init__(self) -> None:
        set_launch_defaults()
        import mpi4py  # an environment without MPI does not have it

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI

        if not MPI.Is_initialized():
            # By a foreign call, which lets other threads run: if a rank is missing, this one waits here forever.
            library = ctypes.CDLL(MPI.__file__)
            library.MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
        self._mpi = MPI

    @property
    def size(self) -> int:
        return self._mpi.COMM_WORLD.size

    def sum_(self, values: np.ndarray) -> None:
        """Replaces ``values`` by their sum over all ranks."""
        self._mpi.COMM_WORLD.Allreduce(self._mpi.IN_PLACE, values)

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        return self._mpi.COMM_WORLD.allreduce(value, self._mpi.MAX)
