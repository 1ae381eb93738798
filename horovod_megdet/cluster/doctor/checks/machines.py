"""Whether the hosts have what the ranks need: devices, cores, memory, disks."""

from collections import Counter

from horovod_megdet.cluster.doctor.examination import Examination, Finding, error, ok, warning
from horovod_megdet.cluster.doctor.facts import Disk, Facts
from horovod_megdet.cluster.doctor.naming import differing, grouped, where
from horovod_megdet.wording import count, size, some

GIB = 2**30

MINIMUM_MEMORY = 2 * GIB
"""Available to each rank; torch, Horovod and a detector take about half of it."""

MINIMUM_OPEN_FILES = 1024
MINIMUM_FREE_INODES = 1000
MINIMUM_TEMPORARY = GIB


def check_ranks(examination: Examination) -> list[Finding]:
    """Whether the ranks have found each other and are spread evenly over hosts that can be told apart."""
    ranks = examination.ranks
    each = f", {ranks[0].place.local_size} on each" if len(examination.hosts) > 1 else ""
    healthy = ok(f"{examination.ranks_on_hosts}{each}")
    return _isolated_ranks(ranks) or _hosts_of_one_name(ranks) or _uneven_hosts(ranks) or [healthy]


def check_gpus(examination: Examination) -> list[Finding]:
    """Whether each rank has the device that the configuration asks for."""
    ranks = examination.ranks
    known = [facts for facts in ranks if facts.gpus is not None and facts.may_use_gpu]
    without = [facts for facts in known if not facts.gpus]
    must_have = [facts for facts in without if facts.config and facts.config.device == "cuda"]
    names = [(facts, facts.gpus[0]) for facts in known if facts.gpus]
    look = "Check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES there"
    findings = []
    if must_have:
        sentence = f"there is no GPU on {where(must_have, ranks)}, but runtime.device is cuda"
        findings.append(error(sentence, f"{look}, or set runtime.device: auto."))
    elif without and names:
        sentence = f"there is no GPU on {where(without, ranks)}, while other ranks have one"
        findings.append(error(sentence, f"{look}: training would run on the CPU."))
    if short := [facts for facts in known if facts.gpus and facts.place.local_rank >= len(facts.gpus)]:
        sentence = f"there are more ranks than GPUs: none is left for {where(short, ranks)}"
        remedy = "Start one rank per GPU (slots= in the host file), or set runtime.device: cpu."
        findings.append(error(sentence, remedy))
    if failed := grouped((facts, facts.gpu_failure) for facts in known if facts.gpu_failure):
        remedy = "Check nvidia-smi there: another process may hold the GPU (compute mode), or it needs a reset."
        findings += [
            error(f"the GPU cannot be used on {where(who, ranks)}: {why}", remedy) for why, who in failed.items()
        ]
    if difference := differing(names):
        remedy = "Use GPUs of one kind in a run: all ranks wait for the slowest."
        findings.append(warning(f"the GPUs differ: {difference}", remedy))
    if findings or not known:
        return findings
    return [ok(f"{names[0][1]} on every rank" if names else "none: training runs on the CPU")]


def check_processors(examination: Examination) -> list[Finding]:
    """Whether there is a core for every thread of a host's ranks."""
    ranks = examination.ranks
    crowded: list[tuple[Facts, str]] = []
    for who in grouped((facts, facts.place.host) for facts in ranks).values():
        threads, cores = _threads_and_cores(who)
        if threads > cores:
            text = f"{count(threads, 'thread')} of {count(len(who), 'rank')} share {count(cores, 'core')}"
            crowded += [(facts, text) for facts in who]
    remedy = "Start fewer ranks there, lower runtime.threads_per_rank, or let ranks use all cores (--bind-to none)."
    findings = [warning(f"{text} on {where(who, ranks)}", remedy) for text, who in grouped(crowded).items()]
    if confined := [facts for facts in ranks if _has_one_core(facts)]:
        sentence = f"{where(confined, ranks)} may use only one core for training and its loader workers together"
        remedy = (
            "Start mpirun with --bind-to none, as `megdet launch` does, or raise Slurm's --cpus-per-task or the CPU "
            "limit of the container."
        )
        findings.append(warning(sentence, remedy))
    known = sorted({facts.threads for facts in ranks if facts.threads is not None})
    if findings or not known:
        return findings
    return [ok(f"threads per rank: {' or '.join(map(str, known))}, with a core for each")]


def check_memory(examination: Examination) -> list[Finding]:
    """Whether there is enough memory for the ranks of a host and the batches that their loader workers prepare."""
    ranks = examination.ranks
    known = [(facts, facts.memory.available / facts.place.local_size) for facts in ranks if facts.memory]
    if not known:
        return []
    least = size(min(available for _, available in known))
    if short := [facts for facts, available in known if available < _needed_memory(facts)]:
        remedy = "Start fewer ranks there, lower data.workers, or raise the memory limit of the container or job."
        needed = size(max(_needed_memory(facts) for facts in short))
        sentence = f"only {least} of memory per rank is available on {where(short, ranks)}, and {needed} are needed"
        return [warning(sentence, remedy)]
    return [ok(f"at least {least} available per rank")]


def check_limits(examination: Examination) -> list[Finding]:
    """Whether the limits of the shell, or of the service that starts ranks, are high enough."""
    ranks = examination.ranks
    known = [(facts, facts.limits) for facts in ranks if facts.limits]
    if not known:
        return []
    findings = []
    if few := [(facts, limits.open_files) for facts, limits in known if 0 <= limits.open_files < MINIMUM_OPEN_FILES]:
        who = where([facts for facts, _ in few], ranks)
        sentence = f"{who} may open only {min(files for _, files in few)} files at a time"
        remedy = "Raise the limit: ulimit -n 65536, or LimitNOFILE= of the service that starts ranks (sshd, slurmd)."
        findings.append(warning(sentence, remedy))
    if locked := [facts for facts, limits in known if limits.infiniband and limits.locked_memory >= 0]:
        sentence = f"locked memory is limited on {where(locked, ranks)}, but InfiniBand needs it unlimited"
        remedy = "Raise the limit: ulimit -l unlimited, or LimitMEMLOCK=infinity of the service that starts ranks."
        findings.append(warning(sentence, remedy))
    return findings or [ok("the limits on open files and locked memory are high enough")]


def check_disks(examination: Examination) -> list[Finding]:
    """Whether there is room for checkpoints and temporary files."""
    disk = examination.ranks[0].run_disk
    findings = _run_disk_faults(examination) + _temporary_disk_faults(examination.host_ranks)
    if findings or not disk:
        return findings
    checkpoint = size(examination.checkpoint_bytes)
    return [ok(f"{size(disk.free)} free for the run directory; a checkpoint takes about {checkpoint}")]


def _needed_memory(facts: Facts) -> int:
    """Bytes for a rank and its loader workers, at least."""
    return MINIMUM_MEMORY + (facts.config.workers * facts.config.batch_bytes if facts.config else 0)


def _isolated_ranks(ranks: list[Facts]) -> list[Finding]:
    """Processes that do not know of each other, because launcher and Horovod do not belong together."""
    launched, found, build = ranks[0].launched_ranks, ranks[0].place.size, ranks[0].build
    if launched in (None, found):
        return []
    sentence = f"the launcher started {launched} processes, but each believes it is one of {found}"
    if build and not build.features["mpi"]:
        remedy = "Horovod was built without MPI: use `megdet launch --controller gloo`, or horovodrun --gloo."
    else:
        remedy = (
            "This is not the launcher of the MPI that Horovod was built with: use the environment's mpirun, by its "
            "absolute path or with `megdet launch`; with srun, add --mpi=pmix."
        )
    return [error(sentence, remedy)]


def _hosts_of_one_name(ranks: list[Facts]) -> list[Finding]:
    machines: dict[str, set[tuple[str, ...]]] = {}
    for facts in ranks:
        if facts.machine:
            machines.setdefault(facts.place.host, set()).add((facts.machine.boot_id, *facts.machine.addresses))
    remedy = (
        "Give each host its own name (hostnamectl set-hostname, or --hostname of a container): launchers and Horovod "
        "tell hosts apart by name."
    )
    findings = []
    for host, different in machines.items():
        if len(different) > 1:
            addresses = some(" ".join(addresses) or "no address" for _, *addresses in sorted(different))
            findings.append(error(f"{len(different)} hosts have the name {host}: {addresses}", remedy))
    return findings


def _uneven_hosts(ranks: list[Facts]) -> list[Finding]:
    counts = Counter(facts.place.host for facts in ranks)
    per_host = grouped((facts, counts[facts.place.host]) for facts in ranks)
    if len(per_host) < 2:
        return []
    text = ", ".join(f"{number} on {where(who, ranks)}" for number, who in per_host.items())
    remedy = (
        "Give all hosts the same slots= in the host file: the fullest host sets the pace, and groups of cross-GPU "
        "batch normalization span hosts."
    )
    return [warning(f"the hosts have unequal numbers of ranks: {text}", remedy)]


def _run_disk_faults(examination: Examination) -> list[Finding]:
    """What is wrong with the disk of the run directory, as rank 0 sees it, who writes the checkpoints."""
    main, one = examination.ranks[0], examination.checkpoint_bytes
    disk = main.run_disk
    if not disk or not disk.total:  # /proc and the like have no size
        return []
    kept = (main.config.keep_checkpoints if main.config else 1) + 2  # the best, and the one being written
    remedy = "Make room, or choose another run directory with --run-dir."
    place = f"the disk of the run directory, {disk.folder},"
    if disk.free < one:
        return [error(f"{place} is full: {size(disk.free)} are free, and a checkpoint takes about {size(one)}", remedy)]
    if 0 <= disk.free_inodes < MINIMUM_FREE_INODES:
        return [error(f"{place} is full: it has room for only {count(disk.free_inodes, 'more file')}", remedy)]
    if disk.free < kept * one:
        needed = f"the {kept} checkpoints that a run keeps take about {size(kept * one)}"
        return [warning(f"{place} has {size(disk.free)} free; {needed}", remedy)]
    return []


def _temporary_disk_faults(hosts: list[Facts]) -> list[Finding]:
    full: list[tuple[Facts, Disk]] = [
        (facts, facts.temporary_disk)
        for facts in hosts
        if facts.temporary_disk and facts.temporary_disk.free < MINIMUM_TEMPORARY
    ]
    if not full:
        return []
    fullest = min((disk for _, disk in full), key=lambda disk: disk.free)
    who = where([facts for facts, _ in full], hosts)
    remedy = "Make room, or set TMPDIR: launchers and loader workers keep files and sockets there."
    return [warning(f"{fullest.folder} has only {size(fullest.free)} free on {who}", remedy)]


def _threads_and_cores(ranks: list[Facts]) -> tuple[int, int]:
    """Threads of the ranks of one host, and the cores that these ranks may use together."""
    threads = sum(facts.threads or 0 for facts in ranks)
    processors = [facts.processor for facts in ranks if facts.processor]
    cores = len({core for processor in processors for core in processor.usable})
    quotas = [max(1, int(processor.quota)) for processor in processors if processor.quota]
    return threads, min([cores, *quotas]) if processors else threads


def _has_one_core(facts: Facts) -> bool:
    """Whether a rank and its loader workers are confined to one of several cores."""
    workers = facts.config.workers if facts.config else 0
    return bool(workers and facts.processor and len(facts.processor.usable) == 1 < facts.processor.cores)
