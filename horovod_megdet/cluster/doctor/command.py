"""``megdet doctor``: on every rank, under any launcher.

    mpirun -np 2 megdet doctor --config configs/demo.yaml
    megdet launch --hostfile hostfiles/16x8 -- megdet doctor --config configs/coco/megdet_r50_fpn_256.yaml

Every rank finds out what it can on its own, the ranks measure together what lies between them, and rank 0 reports what
is wrong. No fault that is found keeps the doctor from looking for others.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from horovod_megdet import comm
from horovod_megdet.arguments import config_of
from horovod_megdet.cluster.doctor import inputs, measurements, probes, report
from horovod_megdet.cluster.doctor.checks import examine
from horovod_megdet.cluster.doctor.checks.network import check_interfaces, usable_interfaces
from horovod_megdet.cluster.doctor.examination import Examination
from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.run_directory import try_run_directory
from horovod_megdet.cluster.doctor.timeout import time_limit
from horovod_megdet.config import Config
from horovod_megdet.engine import checkpoint, hardware
from horovod_megdet.errors import EXIT_CRASHED, UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.models.detector import COCO_CLASSES, build_detector
from horovod_megdet.printing import say
from horovod_megdet.report.tables import console
from horovod_megdet.solver.optimizer import state_bytes
from horovod_megdet.wording import some

START_LIMIT = 180
"""Seconds within which the ranks must find each other; large jobs start their hosts a minute apart."""


def run_doctor(arguments: argparse.Namespace) -> int:
    """What ``megdet doctor`` does on each rank; returns the exit code: 1 if training would fail, else 0."""
    config, config_error = read_config(arguments)
    examination = Examination([probes.probe_process(config, config_error)])
    _warn_about_interfaces(examination)
    bare_mpi = _start(examination, config, min(START_LIMIT, arguments.timeout))
    late = (
        f"some rank did not answer within {arguments.timeout} s (reading a large data set takes longer: raise "
        "--timeout, or add --no-data)"
    )
    try:
        with time_limit(arguments.timeout, lambda: _give_up(examination, late)):
            _measure(examination, config, bare_mpi, with_data=not arguments.no_data)
            with comm.agreement("doctor.report"):
                exit_code = _report(examination, arguments)
    except UserError as error:  # a file of the report cannot be written
        if comm.is_main():
            say(f"error: {error}")
        exit_code = error.exit_code
    except comm.LostRankError as error:
        _give_up(examination, f"messages between the ranks fail: {error}")
        comm.abort(EXIT_CRASHED)
    comm.shutdown()
    return exit_code


def read_config(arguments: argparse.Namespace) -> tuple[Config | None, str]:
    """The configuration, and what is wrong with it."""
    config = None
    try:
        config = config_of(arguments)
        state_bytes(nn.Module(), config.solver)  # is the optimizer installed?
    except UserError as error:
        return config, str(error)
    return config, ""


def _warn_about_interfaces(examination: Examination) -> None:
    """Reports before the start what may make it hang."""
    if examination.ranks[0].place.local_rank == 0:
        for finding in check_interfaces(examination):
            if finding.severity == "error":
                say(f"megdet doctor: {finding.sentence}. {finding.remedy}")


def _start(examination: Examination, config: Config | None, limit: int) -> dict[int, float]:
    """Starts MPI and Horovod and returns the times of bare MPI; ends this rank if that fails or takes too long."""
    with time_limit(limit, lambda: _give_up(examination, f"the ranks did not find each other within {limit} s")):
        try:
            bare_mpi = measurements.time_bare_mpi()
            comm.init(deterministic=config is not None and config.runtime.deterministic)
        except Exception as error:  # MPI and Horovod raise all kinds
            _give_up(examination, f"MPI or Horovod cannot start: {error}")
            comm.abort(EXIT_CRASHED)
    return bare_mpi


def _measure(examination: Examination, config: Config | None, bare_mpi: dict[int, float], with_data: bool) -> None:
    """Fills in the examination bit by bit, so that a measurement that hangs does not hide the results before it.

    Collective: every rank makes the same calls, whatever it finds out.
    """
    mine = dataclasses.replace(examination.ranks[0], place=probes.place_by_horovod(), settings=comm.launch_settings())
    masks = hardware.core_masks()
    mine = _probe_more(mine, config, masks)
    if with_data:
        mine = _probe_inputs(mine, config)
    examination.ranks = comm.gather_objects(mine, "doctor.facts")
    if config:
        sizes, examination.failures = probes.run_probes({"size of the detector": lambda: _sizes(config)})
        examination.gradient_bytes, examination.checkpoint_bytes = sizes.get("size of the detector", (0, 0))
    examination.run_directory = try_run_directory(Path(config.output.run_dir) if config else None)
    examination.clocks = measurements.compare_clocks()
    horovod = measurements.time_horovod(_gradient_device(examination, config))
    examination.timings = [measurements.Timing(size, seconds, bare_mpi.get(size)) for size, seconds in horovod.items()]


def _probe_more(mine: Facts, config: Config | None, masks: hardware.Masks) -> Facts:
    """Adds what needs Horovod. One rank of each host looks at what belongs to the host."""
    wanted: dict[str, Callable[[], object]] = {"build": probes.build}
    if config:
        threads = config.runtime.threads_per_rank or hardware.threads_per_rank(masks, comm.rank())
        mine = dataclasses.replace(mine, threads=threads)
    if mine.place.local_rank == 0:
        hosts = list(dict.fromkeys(host for host, _ in masks))
        wanted["resolved"] = lambda: probes.resolve(hosts)
    return _with_probes(mine, wanted)


def _probe_inputs(mine: Facts, config: Config | None) -> Facts:
    """Adds what training reads, as one rank of each host sees it. Collective.

    The first host goes ahead: where all share a file system, the others find what it has kept.
    """
    for turn in (True, False):
        if config and mine.place.local_rank == 0 and comm.is_main() == turn:
            data, weights = partial(inputs.data_sets, config), partial(inputs.starting_weights, config)
            mine = _with_probes(mine, {"data": data, "weights": weights})
        comm.barrier()
    return mine


def _with_probes(mine: Facts, wanted: dict[str, Callable[[], object]]) -> Facts:
    found, failures = probes.run_probes(wanted)
    return dataclasses.replace(mine, **found, failures=mine.failures | failures)


def _sizes(config: Config) -> tuple[int, int]:
    """Bytes of the gradients and of a checkpoint."""
    with torch.device("meta"):
        detector = build_detector(config.model, config.batch_norm, COCO_CLASSES, group=comm.world())
    gradients = sum(parameter.nbytes for parameter in detector.parameters() if parameter.requires_grad)
    return gradients, checkpoint.expected_bytes(detector, config.solver)


def _gradient_device(examination: Examination, config: Config | None) -> torch.device:
    """Where the gradients are; the CPU if some rank cannot use a GPU, which the examination then says. Collective."""
    device, failure = torch.device("cpu"), ""
    if config:
        try:
            device = hardware.set_up_device(config.runtime)
        except UserError:
            pass  # this rank has no GPU, which check_gpus says
        except Exception as error:  # CUDA raises all kinds
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    answers = comm.gather_objects((device.type, failure), "doctor.device")
    examination.ranks = [
        dataclasses.replace(facts, gpu_failure=reason)
        for facts, (_, reason) in zip(examination.ranks, answers, strict=True)
    ]
    return device if all(kind == device.type for kind, _ in answers) else torch.device("cpu")


def _report(examination: Examination, arguments: argparse.Namespace) -> int:
    """Reports on rank 0 what was found; returns the exit code on every rank."""
    findings = examine(examination)
    # Ranks that have not found each other are all rank 0 to Horovod.
    if comm.is_main() and probes.place_by_launcher().rank == 0:
        out = Console(stderr=True, width=120, highlight=False) if arguments.json == "-" else console()
        data = json.dumps(report.as_json(examination, findings), indent=1) if arguments.json else ""
        if arguments.json == "-":
            print(data, flush=True)
        elif arguments.json:
            with atomic_write(arguments.json) as file:
                file.write(data.encode() + b"\n")
        report.print_report(examination, findings, out)
        if arguments.plot and examination.timings:
            title = f"{examination.ranks_on_hosts}, controller {comm.controller()}"
            report.write_plot(examination.timings, len(examination.ranks), title, arguments.plot)
            out.print(f"Plot: {arguments.plot}", markup=False)
        elif arguments.plot:
            out.print("There is no plot: a single rank sends no messages.")
    sys.stdout.flush()
    return EXIT_CRASHED if report.would_fail(findings) else 0


def _give_up(examination: Examination, reason: str) -> None:
    """Reports what is known so far: rank 0 for all, or each host for itself if the ranks have not found each other."""
    gathered = len(examination.ranks) > 1
    mine = examination.ranks[comm.rank() if gathered else 0]
    if mine.place.local_rank:
        return
    lines = [f"megdet doctor: {mine.name}: {reason}. Training would fail."]
    if not gathered or mine.place.rank == 0:
        for finding in examine(examination):
            if finding.severity != "ok":
                lines.append(f"  {finding.severity}: {finding.check}: {finding.sentence}\n    -> {finding.remedy}")
    if mine.network and mine.place.size > mine.place.local_size:
        names = some(interface.name for interface in usable_interfaces(mine.network.interfaces)) or "none"
        lines.append(
            f"  Interfaces that may lead to other hosts: {names}. Check that all hosts have them, and that no firewall "
            "blocks connections between the ranks."
        )
    say("\n".join(lines))
