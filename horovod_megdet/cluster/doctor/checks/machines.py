"""Whether the hosts have what the ranks need: devices, cores, memory, disks."""

from collections import Counter

from horovod_megdet.cluster.doctor.examination import Examination, Finding
from horovod_megdet.cluster.doctor.facts import Facts
from horovod_megdet.cluster.doctor.naming import differing, grouped, where
from horovod_megdet.wording import count, size, some

GIB = 2**30

MINIMUM_MEMORY = 2 * GIB
"""Available for each rank; torch, Horovod and a detector take about one."""

MINIMUM_OPEN_FILES = 1024
MINIMUM_FREE_FILES = 1000
MINIMUM_TEMPORARY = GIB


def check_ranks(examination: Examination) -> list[Finding]:
    """Whether the ranks have found each other, and stand evenly on hosts that can be told apart."""
    ranks = examination.ranks
    launched, found = ranks[0].launched, ranks[0].place.size
    if launched not in (None, found):
        sentence = f"the launcher started {launched} processes, but each takes itself for one of {found}"
        remedy = (
            "It is not the launcher of the MPI that Horovod was built with: take the environment's mpirun, by its "
            "absolute path or with `megdet launch`; with srun, --mpi=pmix."
        )
        return [Finding("ranks", "error", sentence, remedy)]
    if namesakes := _namesakes(ranks):
        return namesakes
    counts = Counter(facts.place.host for facts in ranks)
    if len(set(counts.values())) > 1:
        per_host = grouped((facts, counts[facts.place.host]) for facts in ranks)
        text = ", ".join(f"{number} on {where(who, ranks)}" for number, who in per_host.items())
        remedy = (
            "Give all hosts the same slots= in the host file: the fullest host sets the pace, and groups of cross-GPU "
            "batch normalisation reach over hosts."
        )
        return [Finding("ranks", "warning", f"the hosts have unequal numbers of ranks: {text}", remedy)]
    each = f", {ranks[0].place.local_size} on each" if len(counts) > 1 else ""
    return [Finding("ranks", "ok", f"{count(len(ranks), 'rank')} on {count(len(counts), 'host')}{each}")]


def check_gpus(examination: Examination) -> list[Finding]:
    """Whether each rank has the device that the configuration asks for."""
    ranks = examination.ranks
    wanting = [
        facts for facts in ranks if facts.gpus is not None and not (facts.config and facts.config.device == "cpu")
    ]
    without = [facts for facts in wanting if not facts.gpus]
    forced = [facts for facts in without if facts.config and facts.config.device == "cuda"]
    names = [(facts, facts.gpus[0]) for facts in wanting if facts.gpus]
    findings = []
    if forced:
        sentence = f"there is no GPU on {where(forced, ranks)}, and runtime.device is cuda"
        remedy = "Look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES there, or set runtime.device: auto."
        findings.append(Finding("GPUs", "error", sentence, remedy))
    elif without and names:
        sentence = f"there is no GPU on {where(without, ranks)}, while other ranks have one"
        remedy = "Look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES there: that rank would train on its CPU."
        findings.append(Finding("GPUs", "error", sentence, remedy))
    if short := [facts for facts in wanting if facts.gpus and facts.place.local_rank >= len(facts.gpus)]:
        sentence = f"there are more ranks than GPUs: none is left for {where(short, ranks)}"
        remedy = "Start one rank for each GPU (slots= in the host file), or set runtime.device: cpu."
        findings.append(Finding("GPUs", "error", sentence, remedy))
    if difference := differing(names):
        remedy = "Give a run GPUs of one kind: all ranks wait for the slowest."
        findings.append(Finding("GPUs", "warning", f"the GPUs differ: {difference}", remedy))
    if findings or not wanting:
        return findings
    return [Finding("GPUs", "ok", f"every rank has a {names[0][1]}" if names else "none: training runs on the CPU")]


def check_processors(examination: Examination) -> list[Finding]:
    """Whether the threads of a host's ranks find cores."""
    ranks = examination.ranks
    crowded: list[tuple[Facts, str]] = []
    for _, who in grouped((facts, facts.place.host) for facts in ranks).items():
        threads, cores = _threads_and_cores(who)
        if threads > cores:
            text = f"{count(threads, 'thread')} of {count(len(who), 'rank')} share {count(cores, 'core')}"
            crowded += [(facts, text) for facts in who]
    findings = [
        Finding(
            "processors",
            "warning",
            f"{text} on {where(who, ranks)}",
            "Start fewer ranks there, lower runtime.threads_per_rank, or let ranks use all cores (--bind-to none).",
        )
        for text, who in grouped(crowded).items()
    ]
    if narrow := [facts for facts in ranks if _is_narrow(facts)]:
        sentence = f"{where(narrow, ranks)} may use one core only, for training and the loader workers"
        remedy = (
            "Start mpirun with --bind-to none, as `megdet launch` does, or raise --cpus-per-task of Slurm or the CPU "
            "limit of the container."
        )
        findings.append(Finding("processors", "warning", sentence, remedy))
    known = sorted({facts.threads for facts in ranks if facts.threads is not None})
    if findings or not known:
        return findings
    return [Finding("processors", "ok", f"threads per rank: {' or '.join(map(str, known))}, with a core for each")]


def check_memory(examination: Examination) -> list[Finding]:
    """Whether the ranks of a host find memory."""
    ranks = examination.ranks
    known = [(facts, facts.memory.available / facts.place.local_size) for facts in ranks if facts.memory]
    if not known:
        return []
    least = size(min(available for _, available in known))
    short = [facts for facts, available in known if available < MINIMUM_MEMORY]
    if not short:
        return [Finding("memory", "ok", f"at least {least} available per rank")]
    sentence = f"only {least} of memory are available per rank on {where(short, ranks)}"
    remedy = "Start fewer ranks there, lower data.workers, or raise the limit of the container or job."
    return [Finding("memory", "warning", sentence, remedy)]


def check_limits(examination: Examination) -> list[Finding]:
    """Whether the limits of the shell, or of the launcher's daemon, are high enough."""
    ranks = examination.ranks
    known = [(facts, facts.limits) for facts in ranks if facts.limits]
    findings = []
    if few := [(facts, limits) for facts, limits in known if 0 <= limits.open_files < MINIMUM_OPEN_FILES]:
        least = min(limits.open_files for _, limits in few)
        sentence = f"{where([facts for facts, _ in few], ranks)} may have {least} files open at a time, which is few"
        remedy = "Raise it: ulimit -n 65536, or LimitNOFILE= of the service that starts ranks (sshd, slurmd)."
        findings.append(Finding("limits", "warning", sentence, remedy))
    if locked := [facts for facts, limits in known if limits.infiniband and limits.locked_memory >= 0]:
        sentence = f"{where(locked, ranks)} may not lock all of its memory, which InfiniBand needs"
        remedy = "Raise it: ulimit -l unlimited, or LimitMEMLOCK=infinity of the service that starts ranks."
        findings.append(Finding("limits", "warning", sentence, remedy))
    if findings or not known:
        return findings
    return [Finding("limits", "ok", "open files and locked memory are allowed in plenty")]


def check_disks(examination: Examination) -> list[Finding]:
    """Whether there is room for checkpoints and temporary files."""
    findings = []
    main, hosts = examination.ranks[0], examination.host_ranks
    disk = main.run_disk
    if disk and disk.total:  # not so for /proc and the like
        kept = (main.config.keep_checkpoints if main.config else 1) + 2  # the best, and the one being written
        one = examination.checkpoint_bytes
        all_kept = f"the {kept} checkpoints that a run keeps take about {size(kept * one)}"
        remedy = "Make room, or choose another run directory with --run-dir."
        if disk.free < one or 0 <= disk.free_files < MINIMUM_FREE_FILES:
            files = "" if disk.free < one else f" for {disk.free_files} files"
            sentence = f"the disk of the run directory, {disk.folder}, is full: {size(disk.free)} are free{files}"
            findings.append(Finding("disks", "error", f"{sentence}, one checkpoint takes about {size(one)}", remedy))
        elif disk.free < kept * one:
            sentence = f"the disk of the run directory, {disk.folder}, has {size(disk.free)} free; {all_kept}"
            findings.append(Finding("disks", "warning", sentence, remedy))
    known = [(facts, facts.temporary_disk) for facts in hosts if facts.temporary_disk]
    if full := [(facts, disk) for facts, disk in known if disk.free < MINIMUM_TEMPORARY]:
        least = min((disk for _, disk in full), key=lambda disk: disk.free)
        who = where([facts for facts, _ in full], hosts)
        remedy = "Make room, or set TMPDIR: launchers and loader workers keep files and sockets there."
        findings.append(Finding("disks", "warning", f"{least.folder} has {size(least.free)} free on {who}", remedy))
    if findings or not main.run_disk:
        return findings
    room = f"{size(main.run_disk.free)} free for the run directory"
    return [Finding("disks", "ok", f"{room}; a checkpoint takes about {size(examination.checkpoint_bytes)}")]


def check_shared_memory(examination: Examination) -> list[Finding]:
    """Whether the batches that loader workers hand over fit into /dev/shm: a worker that finds it full is killed."""
    hosts = examination.host_ranks
    short: list[tuple[Facts, str]] = []
    known = [(facts, facts.shared_memory, facts.config) for facts in hosts]
    for facts, disk, config in known:
        if disk and config:
            needed = facts.place.local_size * config.workers * config.batch_bytes
            if disk.free < needed:
                short.append(
                    (facts, f"{size(disk.free)} are free of {size(disk.total)}, and {size(needed)} are needed")
                )
    remedy = "Enlarge it (docker run --shm-size=16g; mount -o remount,size=16g /dev/shm), or lower data.workers."
    findings = [
        Finding("shared memory", "error", f"/dev/shm is too small on {where(who, hosts)}: {text}", remedy)
        for text, who in grouped(short).items()
    ]
    free = [disk.free for _, disk, _ in known if disk]
    if findings or not free:
        return findings
    return [Finding("shared memory", "ok", f"{size(min(free))} free in /dev/shm for the loader workers")]


def _namesakes(ranks: list[Facts]) -> list[Finding]:
    """Hosts that have one name."""
    findings = []
    machines = [(facts, (facts.machine.boot, *facts.machine.addresses)) for facts in ranks if facts.machine]
    for host, who in grouped((facts, facts.place.host) for facts, _ in machines).items():
        different = {machine for facts, machine in machines if facts in who}
        if len(different) > 1:
            addresses = some(" ".join(addresses) or "no address" for _, *addresses in sorted(different))
            remedy = (
                "Give each a name of its own (hostnamectl set-hostname, --hostname of a container): launchers and "
                "Horovod tell hosts apart by name."
            )
            sentence = f"{len(different)} hosts have the name {host}: {addresses}"
            findings.append(Finding("ranks", "error", sentence, remedy))
    return findings


def _threads_and_cores(who: list[Facts]) -> tuple[int, int]:
    """Threads of the ranks of a host, and the cores that they may use together."""
    threads = sum(facts.threads or 0 for facts in who)
    processors = [facts.processor for facts in who if facts.processor]
    cores = len({core for processor in processors for core in processor.usable})
    quotas = [max(1, int(processor.quota)) for processor in processors if processor.quota]
    return threads, min([cores, *quotas]) if processors else threads


def _is_narrow(facts: Facts) -> bool:
    workers = facts.config.workers if facts.config else 0
    return bool(workers and facts.processor and len(facts.processor.usable) == 1 < facts.processor.cores)
