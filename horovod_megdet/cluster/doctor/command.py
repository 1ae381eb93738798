"""``megdet doctor``: on every rank, under any launcher.

    mpirun -np 2 megdet doctor --config configs/demo.yaml
    megdet launch --hostfile hostfiles/16x8 -- megdet doctor --config configs/coco/megdet_r50_fpn_256.yaml

Every rank finds out what it can alone, the ranks measure together what lies between them, and rank 0 says what is
wrong. Nothing stops at the first thing that is.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from horovod_megdet import comm, launched
from horovod_megdet.arguments import config_of
from horovod_megdet.cluster.doctor import facts as find
from horovod_megdet.cluster.doctor import network, report, shared
from horovod_megdet.cluster.doctor.checks import examine
from horovod_megdet.cluster.doctor.checks.network import check_interfaces, usable_interfaces
from horovod_megdet.cluster.doctor.examination import Examination
from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.patience import patience
from horovod_megdet.config import Config
from horovod_megdet.engine import hardware
from horovod_megdet.errors import EXIT_CRASHED, UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.models.detector import build_detector
from horovod_megdet.printing import say
from horovod_megdet.report.tables import console
from horovod_megdet.wording import some

START_LIMIT = 60
"""Seconds within which the ranks have to find each other."""

COCO_CLASSES = 80
"""Stands for the number of classes, of which the size of a detector hardly depends."""


def run_doctor(arguments: argparse.Namespace) -> int:
    """What ``megdet doctor`` does on each rank; returns the exit code: 1 if training would fail, else 0."""
    config, config_error = _config(arguments)
    known = Examination([find.of_process(config, config_error)])
    _warn_of_interfaces(known)
    bare_mpi = _start(known, config, min(START_LIMIT, arguments.timeout))
    late = f"no answer from some rank within {arguments.timeout} s (reading a large data set takes longer: --timeout)"
    try:
        with patience(arguments.timeout, lambda: _give_up(known, late)):
            for more in _together(known.ranks[0], config, bare_mpi, with_data=not arguments.no_data):
                known = more
            with comm.agreement("doctor.report"):
                exit_code = _tell(known, arguments)
    except UserError as error:  # of a file to write
        if comm.is_main():
            say(f"error: {error}")
        exit_code = error.exit_code
    except comm.LostRankError as error:
        _give_up(known, f"messages between ranks fail: {error}")
        comm.abort(EXIT_CRASHED)
    comm.shutdown()
    return exit_code


def _start(known: Examination, config: Config | None, limit: int) -> dict[int, float]:
    """Starts MPI and Horovod, and returns the times of bare MPI; ends this rank if that is not done in time."""
    with patience(limit, lambda: _give_up(known, f"the ranks have not found each other within {limit} s")):
        try:
            bare_mpi = network.bare_mpi_times()
            comm.init(deterministic=config is not None and config.runtime.deterministic)
        except Exception as error:  # MPI and Horovod raise all kinds
            _give_up(known, f"MPI or Horovod cannot start: {error}")
            comm.abort(EXIT_CRASHED)
    return bare_mpi


def _config(arguments: argparse.Namespace) -> tuple[Config | None, str]:
    try:
        return config_of(arguments), ""
    except UserError as error:
        return None, str(error)


def _warn_of_interfaces(known: Examination) -> None:
    """Says before the start what may keep it from coming to an end."""
    if known.ranks[0].place.local_rank == 0:
        for finding in check_interfaces(known):
            if finding.severity == "error":
                say(f"megdet doctor: {finding.sentence}. {finding.remedy}")


def _together(mine: Facts, config: Config | None, bare_mpi: dict[int, float], with_data: bool) -> Iterator[Examination]:
    """Yields more and more of what is known, so that a measurement that fails does not hide what came before it.

    Collective: every rank makes the same calls, whatever it finds out.
    """
    mine = dataclasses.replace(mine, place=find.place_by_horovod(), settings=comm.launch_settings())
    hosts = list(dict.fromkeys(comm.gather_objects(launched.host(), "doctor.hosts")))
    known = Examination(comm.gather_objects(_look(mine, config, hosts, with_data), "doctor.facts"))
    yield known
    sizes = find.collect({"size of the detector": lambda: _parameter_bytes(config) if config else 0})
    parameters = sizes.get("size of the detector", 0)
    weights_and_momentum = 2 * parameters
    known = dataclasses.replace(
        known, gradient_bytes=parameters, checkpoint_bytes=weights_and_momentum, failures=sizes["failures"]
    )
    yield known
    known = dataclasses.replace(known, shared=shared.try_run_directory(Path(config.output.run_dir) if config else None))
    yield known
    known = dataclasses.replace(known, clocks=network.clocks())
    yield known
    horovod = network.allreduce_times(_device(config))
    timings = [network.Timing(size, seconds, bare_mpi.get(size)) for size, seconds in horovod.items()]
    yield dataclasses.replace(known, timings=timings)


def _look(mine: Facts, config: Config | None, hosts: list[str], with_data: bool) -> Facts:
    """Adds what needs Horovod, or time. What belongs to a host is looked at by one of its ranks."""
    parts: dict[str, Callable[[], object]] = {"build": find.build}
    if config:
        parts["threads"] = lambda: find.threads(config)
    if mine.place.local_rank == 0:
        parts["resolved"] = lambda: find.resolve(hosts)
        if config and with_data:
            parts["data"] = lambda: find.data(config)
            parts["weights"] = lambda: find.starting_weights(config)
    found = find.collect(parts)
    failures = mine.failures | found.pop("failures")
    return dataclasses.replace(mine, **found, failures=failures)


def _device(config: Config | None) -> torch.device:
    """Where gradients will be; the CPU if a rank has no GPU, which is a finding elsewhere. Collective."""
    chosen = torch.device("cpu")
    if config:
        with contextlib.suppress(UserError):
            chosen = hardware.choose(config.runtime)
    everywhere = all(kind == chosen.type for kind in comm.gather_objects(chosen.type, "doctor.device"))
    return chosen if everywhere else torch.device("cpu")


def _parameter_bytes(config: Config) -> int:
    with torch.device("meta"):
        detector = build_detector(config.model, config.batch_norm, COCO_CLASSES, group=comm.world())
    return 4 * sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)


def _tell(examination: Examination, arguments: argparse.Namespace) -> int:
    """Says on rank 0 what was found, and returns the exit code on every rank."""
    # Ranks that do not know of each other are all rank 0.
    speaks = comm.is_main() and find.place_by_launcher().rank == 0
    findings = examine(examination)
    if speaks and arguments.json:
        _write_json(json.dumps(report.as_data(examination, findings), indent=1), arguments.json)
    if speaks:
        out = Console(stderr=True, width=120, highlight=False) if arguments.json == "-" else console()
        report.show(examination, findings, out)
        if arguments.plot and examination.timings:
            title = f"{report.crowd(examination)}, controller {comm.controller()}"
            report.write_plot(examination.timings, len(examination.ranks), title, arguments.plot)
            out.print(f"Plot: {arguments.plot}", markup=False)
        elif arguments.plot:
            out.print("There is no plot: one rank has nobody to talk to.")
    sys.stdout.flush()
    return EXIT_CRASHED if report.failed(findings) else 0


def _write_json(text: str, target: str) -> None:
    if target == "-":
        print(text, flush=True)
        return
    with atomic_write(target) as file:
        file.write(text.encode() + b"\n")


def _give_up(known: Examination, reason: str) -> None:
    """Says what is known so far, each host for itself if that is only what it knows of itself."""
    together = len(known.ranks) > 1
    mine = known.ranks[comm.rank()] if together else known.ranks[0]
    if mine.place.local_rank:
        return
    lines = [f"megdet doctor: {mine.where}: {reason}. Training would fail."]
    if not together or mine.place.rank == 0:
        for finding in examine(known):
            if finding.severity != "ok":
                lines.append(f"  {finding.severity}: {finding.check}: {finding.sentence}\n    -> {finding.remedy}")
    if mine.network and mine.place.size > mine.place.local_size:
        names = some(entry.name for entry in usable_interfaces(mine.network.interfaces)) or "none"
        lines.append(
            f"  Its interfaces to other hosts: {names}. Do all hosts have these, and do firewalls let ranks talk?"
        )
    say("\n".join(lines))
