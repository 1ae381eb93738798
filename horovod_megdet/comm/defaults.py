"""Environment variables with which the ranks talk faster."""

import os
from pathlib import Path

from horovod_megdet import launched

LAUNCH_DEFAULTS = {
    # Without yielding, an idle rank's busy wait steals the core that another rank or Horovod's own thread needs.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Milliseconds between two negotiations. Horovod's 1 ms suits a few large messages; CGBN sends many small ones.
    "HOROVOD_CYCLE_TIME": "0.02",
    # On GPUs a message ends when it is in the GPU's queue, so that the host of a CGBN layer goes on.
    "HOROVOD_ENABLE_ASYNC_COMPLETION": "1",
}
"""Set where the user did not."""

ELASTIC_DEFAULTS = {
    # A message may not count as arrived while it is in the GPU's queue: what follows from it is kept as a whole step.
    "HOROVOD_ENABLE_ASYNC_COMPLETION": "0",
}
"""Take their place in an elastic job."""

RULES_OF_ALLREDUCE = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(Path(__file__).with_name("open_mpi_allreduce.rules")),
}
"""Likewise: Open MPI sums large messages, the gradients, in a ring; the file says from which size on, and why."""


def launch_defaults() -> dict[str, str]:
    """Those of this job."""
    return LAUNCH_DEFAULTS | (ELASTIC_DEFAULTS if launched.elastic() else {})


def set_launch_defaults() -> None:
    """Sets them for MPI and Horovod, which read them when they start."""
    for name, value in launch_defaults().items():
        os.environ.setdefault(name, value)
    if not RULES_OF_ALLREDUCE.keys() & os.environ.keys():
        os.environ.update(RULES_OF_ALLREDUCE)
