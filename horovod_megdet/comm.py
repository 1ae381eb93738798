"""Everything that leaves a rank goes through here: the only module that imports Horovod or mpi4py.

All functions except :func:`init` and :func:`abort` are collective where they communicate: every rank of the group has
to call them in the same order.
"""

import contextlib
import ctypes
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import horovod.torch as hvd
import mpi4py
import numpy as np
import torch
from horovod.runner.http import http_client
from torch import Tensor, nn

from horovod_megdet import activity, launched
from horovod_megdet.errors import EXIT_USER_ERROR, UserError

T = TypeVar("T")

LostRankError = hvd.HorovodInternalError

LAUNCH_DEFAULTS = {
    # Without yielding, an idle rank's busy wait steals the core that another rank or Horovod's own thread needs.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Milliseconds between two negotiations. Horovod's 1 ms suits a few large messages; CGBN sends many small ones.
    "HOROVOD_CYCLE_TIME": "0.02",
}
"""Environment variables that :func:`init` sets where the user did not."""

GLOO_TIMEOUT = "10"
"""Seconds after which Gloo takes a rank for lost that does not answer, which a rank does also while it computes.
Horovod's default, 30, is for ranks that start late; :func:`init` waits for those by itself."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate among themselves: the world, or a Horovod process set."""

    ranks: tuple[int, ...]
    process_set: Any

    @property
    def size(self) -> int:
        return len(self.ranks)


class BareMPI:
    """Collectives without Horovod: what a message costs at least.

    To be made before :func:`init`, whose background thread would talk in between, and only if ``launched.by_mpi()``.
    """

    def __init__(self) -> None:
        _set_launch_defaults()
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI

        if not MPI.Is_initialized():
            # By a foreign call, which lets other threads run: if a rank is missing, this one waits here for ever.
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


def init(deterministic: bool = False, groups: bool = False) -> None:
    """Starts Horovod, under any launcher or alone.

    ``groups`` makes :func:`split_world` possible. It costs every negotiation another round of messages, so that it is
    off where all ranks share their statistics.

    ``deterministic`` turns off fusion: each tensor is then summed on its own, in an order that depends on nothing but
    its size and the number of ranks, and not on what else happened to be ready.
    """
    _set_launch_defaults()
    if deterministic:
        os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    if groups:
        # Groups are made after the configuration is known; Horovod allows that only if it is told so at the start.
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    if not launched.by_launcher():
        # A process that no launcher started is alone. MPI could start that way too, but only with its daemon beside it.
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    if launched.by_horovodrun():
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", GLOO_TIMEOUT)
        with _waiting_for("start"):
            _wait_for_late_ranks()
    hvd.init()


def _wait_for_late_ranks() -> None:
    """Returns when all ranks that horovodrun has started have called this.

    One host may take a minute longer than another to import torch from a cold disk, and Gloo would give up. The ranks
    meet at horovodrun's own store of keys and values.
    """
    store = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"], "megdet_start"

    def wait_for(key: str) -> None:
        while True:
            with contextlib.suppress(RuntimeError):  # not there yet
                http_client.read_data_from_kvstore(*store, key)
                return
            time.sleep(0.2)

    if launched.rank() == 0:
        for other in range(1, launched.size()):
            wait_for(str(other))
        http_client.put_data_into_kvstore(*store, "all", True)
    else:
        http_client.put_data_into_kvstore(*store, str(launched.rank()), True)
        wait_for("all")


def _set_launch_defaults() -> None:
    for name, value in LAUNCH_DEFAULTS.items():
        os.environ.setdefault(name, value)


def rank() -> int:
    """This rank, 0 to size() - 1; before :func:`init` the one that the launcher gave it."""
    return hvd.rank() if hvd.is_initialized() else launched.rank()


def size() -> int:
    """Number of ranks; 1 before :func:`init`, so that models can be built without a launcher."""
    return hvd.size() if hvd.is_initialized() else 1


def local_rank() -> int:
    """This rank among those of its host: the GPU it uses."""
    return hvd.local_rank() if hvd.is_initialized() else 0


def local_size() -> int:
    """Number of ranks on this host."""
    return hvd.local_size() if hvd.is_initialized() else 1


def is_main() -> bool:
    """True on the rank that prints and writes files."""
    return rank() == 0


def host() -> str:
    """Name of this host."""
    return socket.gethostname()


def controller() -> str:
    """``mpi`` or ``gloo``: who moves the messages."""
    return "mpi" if hvd.mpi_enabled() else "gloo"


def built_features() -> dict[str, bool]:
    """What Horovod was built with."""
    names = ("mpi", "gloo", "nccl", "cuda", "rocm")
    return {name: bool(getattr(hvd, f"{name}_built")()) for name in names}


def mpi_library() -> str:
    """The MPI that the ranks talk through, with its version; empty under Gloo."""
    if controller() != "mpi":
        return ""
    from mpi4py import MPI  # importing it initialises MPI, which must not happen under Gloo

    return MPI.Get_library_version().split("\n")[0].partition(",")[0].strip("\0 ")


def launch_settings() -> dict[str, str]:
    """The values in force of :data:`LAUNCH_DEFAULTS`, with who set them."""
    return {
        name: f"{os.environ.get(name)} ({'default' if os.environ.get(name) == default else 'yours'})"
        for name, default in LAUNCH_DEFAULTS.items()
    }


def world() -> Group:
    """All ranks. Raises ``RuntimeError`` if there are several and Horovod has not been started yet."""
    if not hvd.is_initialized() and launched.size() > 1:
        raise RuntimeError(f"{launched.size()} ranks were launched: call comm.init() or hvd.init() first")
    return Group(tuple(range(size())), hvd.global_process_set)


def split_world(ranks_per_group: int) -> Group:
    """Divides the world into groups of consecutive ranks and returns the one that this rank is in.

    Launchers number the ranks host by host, so consecutive ranks are on as few hosts as possible. Collective; needs
    ``init(groups=True)``, or HOROVOD_DYNAMIC_PROCESS_SETS=1 where Horovod is started in another way.
    """
    if size() % ranks_per_group:
        raise ValueError(f"{size()} ranks cannot be divided into groups of {ranks_per_group}")
    if ranks_per_group == size():
        return world()
    mine = None
    for first in range(0, size(), ranks_per_group):
        ranks = list(range(first, first + ranks_per_group))
        process_set = hvd.add_process_set(ranks)
        if rank() in ranks:
            mine = Group(tuple(ranks), process_set)
    assert mine is not None
    return mine


def sum_(tensor: Tensor, name: str, group: Group | None = None) -> Tensor:
    """Replaces ``tensor`` by its sum over the group's ranks, and returns it.

    ``name`` has to be the same on every rank and belong to one shape: Horovod caches what it negotiated per name.
    """
    group = group or world()
    if group.size == 1:
        return tensor
    activity.current.waits_for(name)
    total = hvd.allreduce_(tensor, op=hvd.Sum, name=name, process_set=group.process_set)
    activity.current.has_got()
    return total


def gather(tensor: Tensor, name: str) -> Tensor:
    """Returns the ranks' 1-d float tensors, all of one length, as the rows of a (size, length) tensor."""
    if size() == 1:
        return tensor[None].clone()
    with _waiting_for(name):
        return hvd.allgather(tensor[None].contiguous(), name=name)


def gather_objects(value: T, name: str) -> list[T]:
    """Returns the ranks' values, in rank order, on every rank."""
    if size() == 1:
        return [value]
    with _waiting_for(name):
        return hvd.allgather_object(value, name=name)


def broadcast_object(value: T, name: str, root: int = 0) -> T:
    """Returns the root's value on every rank."""
    if size() == 1:
        return value
    with _waiting_for(name):
        return hvd.broadcast_object(value, root_rank=root, name=name)


def broadcast_(tensor: Tensor, name: str) -> None:
    """Replaces ``tensor`` by rank 0's."""
    if size() > 1:
        hvd.broadcast_(tensor, root_rank=0, name=name)


def broadcast_weights(module: nn.Module) -> None:
    """Copies rank 0's parameters and buffers to all ranks."""
    if size() > 1:
        with _waiting_for("starting weights"):
            hvd.broadcast_parameters(module.state_dict(), root_rank=0)


def barrier() -> None:
    """Waits for all ranks."""
    if size() > 1:
        with _waiting_for("barrier"):
            hvd.barrier()


@contextlib.contextmanager
def _waiting_for(name: str) -> Iterator[None]:
    activity.current.waits_for(name)
    yield
    activity.current.has_got()


def distributed_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, passes_per_step: int, fp16: bool) -> Any:
    """Wraps ``optimizer`` so that gradients are summed over passes and averaged over ranks while backward runs.

    The result has ``synchronize()`` and ``skip_synchronize()`` beside what ``optimizer`` has.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=named,
        compression=hvd.Compression.fp16 if fp16 else hvd.Compression.none,
        backward_passes_per_step=passes_per_step,
        op=hvd.Average,
    )


def synchronize(optimizer: Any) -> None:
    """Waits until the gradients of a distributed optimizer are averaged over the ranks."""
    activity.current.waits_for("gradients")
    optimizer.synchronize()
    activity.current.has_got()


@contextlib.contextmanager
def agreement(name: str) -> Iterator[None]:
    """Runs the block on every rank; a :class:`UserError` on any of them becomes one on all of them.

    The message says which ranks and hosts it happened on unless it happened everywhere. Any other exception passes
    through: a rank that crashes ends the job (see :func:`abort`).
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    message, exit_code = ("", 0) if mine is None else (str(mine), mine.exit_code)
    reports = gather_objects((host(), message, exit_code), f"agreement.{name}")
    sentences: dict[str, list[str]] = {}
    for number, (where, message, _) in enumerate(reports):
        if message:
            sentences.setdefault(message, []).append(f"rank {number} on {where}")
    if not sentences:
        return
    lines = [text if len(who) == size() else f"{text} ({', '.join(who)})" for text, who in sentences.items()]
    raise agreed_error("\n".join(lines), max(code for _, _, code in reports)) from mine


def agreed_error(sentence: str, exit_code: int = EXIT_USER_ERROR) -> UserError:
    """An error that all ranks raise together, so that they can end in an orderly way."""
    error = UserError(sentence)
    error.on_all_ranks = True
    error.exit_code = exit_code
    return error


def check_same(values: dict[str, str], name: str) -> None:
    """Raises a :class:`UserError` on all ranks, naming ranks, hosts and values, where one differs from rank 0's."""
    reports = gather_objects((host(), values), f"check_same.{name}")
    reference_host, reference = reports[0]
    lines = []
    for number, (where, theirs) in enumerate(reports):
        for key, expected in reference.items():
            if theirs.get(key) != expected:
                lines.append(
                    f"{key} differs: {theirs.get(key)} on rank {number} ({where}), "
                    f"{expected} on rank 0 ({reference_host})"
                )
    if lines:
        raise agreed_error("The ranks do not agree, so they cannot train together.\n" + "\n".join(lines))


def say(text: str) -> None:
    """Writes a line to standard error in one system call, so that the lines of many ranks do not tear."""
    sys.stdout.flush()
    os.write(2, (text.rstrip("\n") + "\n").encode())


def shutdown() -> None:
    """Ends Horovod in an orderly way, when all ranks do."""
    if hvd.is_initialized():
        hvd.shutdown()


def abort(exit_code: int) -> NoReturn:
    """Ends this rank at once, and with it the others: they may be waiting for it in a collective.

    Under MPI the job is aborted; under Gloo the launcher ends the other ranks when it sees this one's exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if hvd.is_initialized() and hvd.mpi_enabled() and size() > 1:
        from mpi4py import MPI  # importing it initialises MPI, which must not happen under Gloo

        MPI.COMM_WORLD.Abort(exit_code)
    os._exit(exit_code)
