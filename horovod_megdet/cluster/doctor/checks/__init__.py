"""From what is known to findings: functions without side effects, one subject each.

A check says one good thing where it finds nothing wrong, and nothing where it knows nothing.
"""

from collections.abc import Callable

from horovod_megdet.cluster.doctor.checks.machines import (
    check_disks,
    check_gpus,
    check_limits,
    check_memory,
    check_processors,
    check_ranks,
    check_shared_memory,
)
from horovod_megdet.cluster.doctor.checks.network import (
    check_allreduce,
    check_clocks,
    check_interfaces,
    check_names,
    check_run_directory,
)
from horovod_megdet.cluster.doctor.checks.software import check_build, check_config, check_data, check_versions
from horovod_megdet.cluster.doctor.examination import Examination, Finding

CHECKS: dict[str, Callable[[Examination], list[Finding]]] = {
    "ranks": check_ranks,
    "configuration": check_config,
    "versions": check_versions,
    "build": check_build,
    "GPUs": check_gpus,
    "processors": check_processors,
    "memory": check_memory,
    "limits": check_limits,
    "interfaces": check_interfaces,
    "names": check_names,
    "clocks": check_clocks,
    "data": check_data,
    "run directory": check_run_directory,
    "disks": check_disks,
    "shared memory": check_shared_memory,
    "allreduce": check_allreduce,
}


def examine(examination: Examination) -> list[Finding]:
    """All findings. A check that fails is a finding itself and does not hide those of the others."""
    findings = [
        Finding("doctor", "warning", f"{subject} could not be found out: {reason}", "Please report this.")
        for subject, reason in _failures(examination).items()
    ]
    for name, check in CHECKS.items():
        try:
            findings += check(examination)
        except Exception as error:
            problem = f"this could not be checked: {type(error).__name__}: {error}"
            findings.append(Finding(name, "warning", problem, "Please report this."))
    return findings


def _failures(examination: Examination) -> dict[str, str]:
    found = dict(examination.failures)
    for facts in examination.ranks:
        for name, reason in facts.failures.items():
            found.setdefault(name.replace("_", " "), f"{reason} (rank {facts.place.rank} on {facts.place.host})")
    return found
