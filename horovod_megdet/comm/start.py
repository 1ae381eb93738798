"""Starting and ending Horovod, under any launcher or alone, and what it was built and started with."""

import contextlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import horovod.torch as hvd

from horovod_megdet import launched
from horovod_megdet.comm.bare_mpi import BareMPI
from horovod_megdet.comm.collectives import size, waiting_for
from horovod_megdet.comm.defaults import launch_defaults, set_launch_defaults
from horovod_megdet.errors import UserError

GLOO_TIMEOUT = 10
"""Seconds without an answer after which Gloo considers a rank lost. A rank does not answer while it computes.
Horovod's default, 30, is for ranks that start late; :func:`init` waits for those itself."""

TIMEOUT_TO_STOP = 10.0
"""Seconds that ranks which have to stop wait for others that start: there may not be much time for a checkpoint."""

STORE_TIMEOUT = 10.0
"""Seconds for an answer of horovodrun's store."""

_NOT_IN_STORE = (OSError, http.client.HTTPException, ValueError)

_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Meeting = Literal["complete", "incomplete", "stopped"]
"""How it ended that ranks waited for each other: all came; some did not; some did not, and the job is to stop."""


def init(deterministic: bool = False, groups: bool = False) -> None:
    """Starts Horovod, under any launcher or alone; :func:`prepare` explains the arguments.

    Where Horovod runs already, it stays as it is; raises :class:`UserError` if it runs without what is asked for.
    """
    if hvd.is_initialized():
        _check_running(deterministic, groups)
        return
    prepare(deterministic, _any_rank_needs(groups))
    hvd.init()


def _any_rank_needs(groups: bool) -> bool:
    """Whether groups are needed on any rank; waits for all of them.

    Ranks that start Horovod with and without groups wait for each other forever. Those whose configuration differs, or
    cannot be read, have to start it, too, so that all can say so.
    """
    if launched.by_horovodrun():
        store = RendezvousStore()
        store.write(f"groups.{launched.rank()}", groups)
        meet()
        if launched.rank() == 0:
            store.write("groups", any(store.wait_for(f"groups.{rank}") for rank in range(launched.size())))
        return bool(store.wait_for("groups"))
    if launched.by_mpi() and launched.size() > 1 and hvd.mpi_built():
        return BareMPI().largest(float(groups)) > 0
    return groups


def prepare(deterministic: bool, groups: bool) -> None:
    """Sets the environment variables that Horovod reads when it starts.

    ``groups`` makes :func:`split_world` possible. It costs every negotiation another round of messages, so that it is
    off where all ranks share their statistics.

    ``deterministic`` turns off fusion: each tensor is then summed on its own, in an order that depends on nothing but
    its size and the number of ranks, and not on what else happened to be ready.
    """
    set_launch_defaults()
    if deterministic:
        os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    if groups:
        # Groups are made after the configuration is known; Horovod allows that only if it is told so at the start.
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    if not launched.by_launcher():
        # A process that no launcher started is alone. MPI could start that way too, but only with its daemon beside it.
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    if launched.by_horovodrun():
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(gloo_timeout(launched.size())))


def gloo_timeout(ranks: int) -> int:
    """Seconds that Gloo waits for an answer in a job of so many ranks.

    In the beginning every rank asks horovodrun's server, which answers one after the other, for the addresses of all.
    """
    return max(GLOO_TIMEOUT, ranks // 4)


def _check_running(deterministic: bool, groups: bool) -> None:
    settings = {
        "HOROVOD_FUSION_THRESHOLD": ("0", "runtime.deterministic", deterministic),
        "HOROVOD_DYNAMIC_PROCESS_SETS": ("1", "a batch_norm.bn_size other than world", groups),
    }
    for name, (value, what, is_needed) in settings.items():
        if is_needed and size() > 1 and os.environ.get(name) != value:
            raise UserError(
                f"Horovod runs already, without what {what} needs: set {name}={value} before it is started."
            )


def meet(timeout: float = math.inf, stopping: Callable[[], object] = lambda: False) -> Meeting:
    """Waits until all ranks that horovodrun has started have called this, or rank 0 gives up; the same on all ranks.

    One host may take a minute longer than another to import torch from a cold disk, and Gloo would give up. The ranks
    meet at horovodrun's own store of keys and values. Rank 0 gives up after ``timeout`` seconds, or
    :data:`TIMEOUT_TO_STOP` if any rank is ``stopping()``; the others wait twice as long, in case it does not come.
    """
    store, main = RendezvousStore(), launched.rank() == 0

    def wait_for(key: str) -> Any:
        """The value of a key; None if it does not come."""
        while (value := store.read(key)) is None:
            stop = store.seconds > TIMEOUT_TO_STOP and store.to_stop(stopping)
            if store.seconds > timeout * (1 if main else 2) or (stop and main):
                break
            time.sleep(0.2)
        return value

    with waiting_for("start"):
        if not main:
            store.write(str(launched.rank()), True)
            return wait_for("meeting") or "incomplete"
        complete = all(wait_for(str(other)) for other in range(1, launched.size()))
        meeting: Meeting = "complete" if complete else "stopped" if store.to_stop(stopping) else "incomplete"
        store.write("meeting", meeting)
        return meeting


class RendezvousStore:
    """What ranks tell each other while they wait for others, at horovodrun's own store of keys and values.

    An elastic job's store is emptied when its ranks get new places.
    """

    def __init__(self) -> None:
        address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
        self._url = f"http://{address}:{port}/megdet_start/"
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def read(self, key: str) -> Any:
        """The value of a key; None if it is not there yet.

        Anyone who reaches the store may write to it. So values are JSON, and not pickled as Horovod's own client does.
        """
        with contextlib.suppress(*_NOT_IN_STORE):
            return json.loads(ask_launcher(self._url + key, STORE_TIMEOUT))
        return None

    def wait_for(self, key: str) -> Any:
        """The value of a key that some rank sets without fail."""
        with waiting_for("start"):
            while (value := self.read(key)) is None:
                time.sleep(0.2)
        return value

    def write(self, key: str, value: Any) -> None:
        """Sets the value of a key, something that JSON knows. A launcher that has ended has no use for it."""
        with contextlib.suppress(*_NOT_IN_STORE):
            request = urllib.request.Request(self._url + key, data=json.dumps(value).encode(), method="PUT")
            ask_launcher(request, STORE_TIMEOUT)

    def to_stop(self, stopping: Callable[[], object]) -> bool:
        """Whether any rank is ``stopping()``. One that is tells the others: rank 0 may not have been asked itself."""
        if not stopping():
            return bool(self.read("stopping"))
        self.write("stopping", True)
        return True

    def claim(self, key: str) -> bool:
        """Whether this is the first of the ranks that ask for ``key``, which are some of those that were there before.

        A rank that does not do what the first one is to do calls :meth:`release`.
        """
        mine = launched.rank()
        self.write(f"{key}.{mine}", True)
        time.sleep(1.0)  # for others that come at the same time
        if self.read(f"{key}.first") is not None or any(self.read(f"{key}.{lower}") for lower in range(mine)):
            return False
        self.write(f"{key}.first", mine)
        return True

    def release(self, key: str) -> None:
        """Undoes :meth:`claim`."""
        self.write(f"{key}.first", None)


def ask_launcher(request: str | urllib.request.Request, timeout: float | None) -> bytes:
    """The answer of horovodrun's server, within ``timeout`` seconds.

    Asked directly: a proxy, which the environment may name, does not reach it. Raises what :mod:`urllib` does.
    """
    with _DIRECTLY.open(request, timeout=timeout) as response:
        answer: bytes = response.read()
        return answer


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
    from mpi4py import MPI  # importing it initializes MPI, which must not happen under Gloo

    return MPI.Get_library_version().split("\n")[0].partition(",")[0].strip("\0 ")


def launch_settings() -> dict[str, str]:
    """The values in force of :func:`launch_defaults`, with who set them. Elastic jobs do without some."""
    return {
        name: f"{os.environ[name]} ({'default' if os.environ[name] == default else 'yours'})"
        for name, default in launch_defaults().items()
        if name in os.environ
    }


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
        from mpi4py import MPI  # importing it initializes MPI, which must not happen under Gloo

        MPI.COMM_WORLD.Abort(exit_code)
    os._exit(exit_code)
