"""Turns what is known into findings: pure functions, one subject each.

A check that finds nothing wrong says so in one *ok* finding; a check that knows nothing says nothing.
"""

from collections.abc import Callable
from dataclasses import replace

from horovod_megdet.cluster.doctor.checks import machines, network, software
from horovod_megdet.cluster.doctor.examination import Examination, Finding, warning

CHECKS: dict[str, Callable[[Examination], list[Finding]]] = {
    "ranks": machines.check_ranks,
    "configuration": software.check_config,
    "versions": software.check_versions,
    "build": software.check_build,
    "GPUs": machines.check_gpus,
    "processors": machines.check_processors,
    "memory": machines.check_memory,
    "limits": machines.check_limits,
    "interfaces": network.check_interfaces,
    "names": network.check_names,
    "clocks": network.check_clocks,
    "data": software.check_data,
    "run directory": network.check_run_directory,
    "disks": machines.check_disks,
    "allreduce": network.check_allreduce,
}


def examine(examination: Examination) -> list[Finding]:
    """All findings. A check that crashes is a finding itself, and the others still run."""
    findings = [
        replace(warning(f"could not determine {subject}: {reason}", "Please report this."), check="doctor")
        for subject, reason in _failures(examination).items()
    ]
    for name, check in CHECKS.items():
        try:
            found = check(examination)
        except Exception as error:
            found = [warning(f"the check itself failed: {type(error).__name__}: {error}", "Please report this.")]
        findings += [replace(finding, check=name) for finding in found]
    return findings


def _failures(examination: Examination) -> dict[str, str]:
    """What could not be determined, and why, on the first rank where that happened."""
    failures = dict(examination.failures)
    for facts in examination.ranks:
        for part, reason in facts.failures.items():
            failures.setdefault(part.replace("_", " "), f"{reason} ({facts.name})")
    return failures
