"""``megdet launch``: runs a command on all ranks of a host file, with the installed launcher.

    megdet launch --hostfile hostfiles/16x8 -- python train.py --config configs/coco/megdet_r50_fpn_256.yaml

It fills in the options that a launcher needs for many hosts, which differ between launchers; ``--dry-run`` shows them.
"""

import argparse
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

from horovod_megdet.arguments import positive
from horovod_megdet.cluster.launch import reach
from horovod_megdet.cluster.launch.hostfile import Host, parse_hostfile, write_hostfile
from horovod_megdet.cluster.launch.job import Command, Elastic, Job, horovodrun_command, mpirun_command, place_ranks
from horovod_megdet.cluster.launch.launcher import Family, Mpirun, find_mpirun, find_program
from horovod_megdet.cluster.launch.process import run_horovodrun, run_mpirun
from horovod_megdet.errors import UserError

FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
FORWARDED_PREFIXES = ("HOROVOD_", "NCCL_", "MLFLOW_", "WANDB_")
"""Environment variables that are passed on to the ranks, if they are set."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST = re.compile(r"[A-Za-z0-9_.-]+:[1-9][0-9]{0,5}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
# The launchers pass paths through the shell of another host, and not all of them quote.
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./+@=-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``megdet launch``."""
    parser.add_argument("--hostfile", metavar="FILE", help="the hosts; without it, all --ranks run on this machine")
    parser.add_argument("--ranks", "-np", type=positive, metavar="N", help="number of ranks (default: all slots)")
    parser.add_argument(
        "--controller",
        choices=("mpi", "gloo"),
        help="how ranks communicate: mpi (started by mpirun) or gloo (by horovodrun) (default: mpi; in an elastic job "
        "gloo)",
    )
    parser.add_argument(
        "--min-ranks",
        type=positive,
        metavar="N",
        help="makes the job elastic: it goes on when ranks are lost; with fewer than N it waits for hosts, for 10 "
        "minutes at most",
    )
    parser.add_argument("--max-ranks", type=positive, metavar="N", help="most ranks of an elastic job")
    parser.add_argument(
        "--discover",
        metavar="FILE",
        help="in place of --hostfile, for an elastic job: a program that prints the hosts that work now, one per line, "
        "such as node01:8; it is asked every second",
    )
    parser.add_argument("--interface", metavar="NAME", help="network interface to use on all hosts, such as eth0")
    parser.add_argument(
        "--env",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="environment variable for the ranks, in addition to "
        + ", ".join([*FORWARDED, *(f"{prefix}*" for prefix in FORWARDED_PREFIXES)])
        + "; may be repeated",
    )
    parser.add_argument(
        "--bind-to",
        choices=("none", "numa", "socket", "core"),
        default="none",
        help="cores to which a rank is bound, with its loader workers (default: %(default)s, all cores of the host)",
    )
    parser.add_argument("--ssh-port", type=_port, metavar="PORT", help="port of the ssh servers on the other hosts")
    parser.add_argument("--ssh-identity-file", metavar="FILE", help="private key for the other hosts")
    parser.add_argument("--mpirun", metavar="FILE", help="mpirun to use (default: from the environment, else PATH)")
    parser.add_argument("--prefix", metavar="FOLDER", help="where the other hosts have Open MPI (default: as here)")
    parser.add_argument(
        "--launcher-args", metavar="TEXT", default="", help="more options for mpirun or horovodrun, in one string"
    )
    parser.add_argument("--no-check", action="store_true", help="start without checking the other hosts first")
    parser.add_argument("--dry-run", action="store_true", help="print the command, ready to be copied, and exit")
    parser.add_argument(
        "--expand", metavar="FILE", help="write the hosts to a plain host file, for launching by hand, and exit"
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="-- PROGRAM ...",
        help="what each rank runs: -- python train.py ...",
    )


def run_launch(arguments: argparse.Namespace) -> int:
    """What ``megdet launch`` does; returns the exit code of the job. Raises :class:`UserError` for bad arguments."""
    elastic = _elastic(arguments)
    hosts = _hosts(arguments)
    if arguments.expand:
        write_hostfile(hosts, arguments.expand)
        return 0
    job = _job(arguments, hosts, elastic)
    controller = arguments.controller or ("gloo" if elastic else "mpi")
    mpirun = find_mpirun(arguments.mpirun) if controller == "mpi" else None
    command = _mpi_command(job, mpirun) if mpirun else _gloo_command(job, arguments)
    if arguments.dry_run:
        print(command)
        return 0
    _check_machine(job)
    if not arguments.no_check:
        _check_others(job, mpirun, arguments.hostfile or arguments.discover)
    return run_mpirun(command) if mpirun else run_horovodrun(command)


def _elastic(arguments: argparse.Namespace) -> Elastic | None:
    """The limits of an elastic job; None if the job is not elastic."""
    minimum, maximum = arguments.min_ranks, arguments.max_ranks
    if minimum is None:
        for option in ("max_ranks", "discover"):
            if getattr(arguments, option):
                raise UserError(f"--{option.replace('_', '-')} is for elastic jobs: give --min-ranks, too.")
        return None
    if arguments.controller == "mpi":
        raise UserError("--min-ranks: MPI jobs cannot be elastic; omit --controller mpi.")
    if arguments.ranks:
        raise UserError("--ranks: an elastic job has between --min-ranks and --max-ranks of them.")
    if maximum is not None and maximum < minimum:
        raise UserError(f"--max-ranks {maximum} is less than --min-ranks {minimum}.")
    if bool(arguments.hostfile) == bool(arguments.discover):
        raise UserError("an elastic job needs its hosts from either --hostfile or --discover.")
    discover = _safe(Path(arguments.discover).absolute(), "--discover") if arguments.discover else None
    return Elastic(minimum, maximum, discover)


def _discovered(program: Path) -> list[Host]:
    """The hosts that a discovery program prints now."""
    try:
        answer = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--discover {program}: cannot be run: {error}. Is it executable (chmod +x)?") from None
    if answer.returncode:
        raise UserError(f"--discover {program}: ended with {answer.returncode}: {answer.stderr.strip()}")
    hosts = []
    for line in answer.stdout.split():
        name, _, slots = line.partition(":")
        if not _HOST.fullmatch(line):
            raise UserError(f"--discover {program}: it printed {line!r}; print one host per line, such as node01:8.")
        hosts.append(Host(name, int(slots), int(slots)))
    return hosts


def _hosts(arguments: argparse.Namespace) -> list[Host]:
    if arguments.discover:
        return _discovered(Path(arguments.discover).absolute())
    if arguments.hostfile:
        return parse_hostfile(arguments.hostfile)
    if arguments.ranks:
        return [Host("localhost", arguments.ranks, arguments.ranks)]
    raise UserError("say on which hosts to run (--hostfile hostfiles/2x8) or how many ranks on this one (--ranks 2).")


def _job(arguments: argparse.Namespace, hosts: list[Host], elastic: Elastic | None) -> Job:
    for host in hosts:
        if ":" in host.name:
            raise UserError(
                f"{arguments.hostfile}: launchers do not accept the IPv6 address {host.name}; give the host a name in "
                "/etc/hosts and write that name."
            )
    if arguments.interface and not _INTERFACE.fullmatch(arguments.interface):
        raise UserError(f"--interface {arguments.interface}: not the name of a network interface, such as eth0.")
    if elastic and not elastic.discover:
        _check_fixed_hosts(elastic, hosts, arguments.hostfile)
    variables = _variables(arguments)
    identity = arguments.ssh_identity_file and Path(arguments.ssh_identity_file).expanduser().absolute()
    return Job(
        placement=place_ranks(hosts, arguments.ranks),
        program=_program(arguments.program),
        forward=_forward(arguments, variables),
        variables=variables,
        interface=arguments.interface,
        ssh_port=arguments.ssh_port,
        ssh_identity_file=_safe(identity, "--ssh-identity-file") if identity else None,
        bind_to=arguments.bind_to,
        prefix=Path(arguments.prefix) if arguments.prefix else None,
        elastic=elastic,
        launcher_args=_split(arguments.launcher_args),
    )


def _check_fixed_hosts(elastic: Elastic, hosts: list[Host], hostfile: str) -> None:
    slots = sum(host.slots for host in hosts)
    if len(hosts) < 2:
        raise UserError(f"{hostfile}: an elastic job needs at least two hosts: a host that loses a rank is dropped.")
    if slots < elastic.min_ranks:
        raise UserError(f"--min-ranks {elastic.min_ranks}: {hostfile} has slots for {slots}.")


def _mpi_command(job: Job, mpirun: Mpirun) -> Command:
    if mpirun.family is Family.HYDRA:
        if job.prefix:
            raise UserError(f"--prefix: {mpirun.path} is {mpirun.family.value} {mpirun.version}, which takes none.")
    elif job.remote:
        _safe(job.prefix or mpirun.prefix, "--prefix")
    return mpirun_command(job, mpirun)


def _gloo_command(job: Job, arguments: argparse.Namespace) -> Command:
    for option in ("mpirun", "prefix"):
        if getattr(arguments, option):
            raise UserError(f"--{option} works with --controller mpi only.")
    if job.bind_to != "none":
        raise UserError("--bind-to works with --controller mpi only.")
    horovodrun = find_program("horovodrun")
    if horovodrun is None:
        raise UserError("horovodrun is not installed here; `make setup` or scripts/setup_env.py installs Horovod.")
    if job.remote:
        _safe(Path.cwd(), "the current folder")
    elif job.elastic and job.elastic.discover and not job.interface:
        raise UserError(
            f"--discover {job.elastic.discover}: it names no host but this machine. Give the network interface for "
            "hosts that come later with --interface, such as eth0, or lo if none will."
        )
    return horovodrun_command(job, horovodrun)


def _variables(arguments: argparse.Namespace) -> dict[str, str]:
    """Environment variables that the options set."""
    variables = {}
    if arguments.interface:
        # The user may have set either to another network on purpose: NCCL need not use that of MPI.
        for name in ("NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE"):
            if name not in os.environ:
                variables[name] = arguments.interface
    for text in arguments.env:
        name, equals, value = text.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UserError(f"--env {text}: write NAME or NAME=VALUE; {name!r} is not the name of a variable.")
        if equals:
            variables[name] = value
        elif name not in os.environ:
            raise UserError(f"--env {name}: {name} is not set here; write --env {name}=VALUE.")
    return variables


def _forward(arguments: argparse.Namespace, variables: dict[str, str]) -> list[str]:
    """Names of the variables for the ranks."""
    names = {name for name in os.environ if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)}
    names |= set(variables) | {text.partition("=")[0] for text in arguments.env}
    return sorted(name for name in names if _VARIABLE.fullmatch(name))


def _program(words: list[str]) -> list[str]:
    """The command for the ranks, with an absolute path: other hosts may have another search path."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise UserError("say what to run, after `--`: megdet launch --ranks 2 -- python train.py.")
    path = find_program(words[0])
    if path is None:
        remedy = f"; write python {words[0]}" if words[0].endswith(".py") else ""
        raise UserError(f"{words[0]}: no such program here{remedy}.")
    return [str(path), *words[1:]]


def _check_machine(job: Job) -> None:
    """Finds what would make the launcher hang, or give up with a cryptic message."""
    if job.interface:
        names = [name for _, name in socket.if_nameindex()]
        if job.interface not in names:
            raise UserError(f"--interface {job.interface}: no such interface; this machine has {', '.join(names)}.")
    if job.ssh_identity_file and not job.ssh_identity_file.is_file():
        raise UserError(f"--ssh-identity-file {job.ssh_identity_file}: no such file.")


def _check_others(job: Job, mpirun: Mpirun | None, hostfile: str) -> None:
    """The same on the other hosts, where the launcher uses ssh."""
    if not job.remote:
        return
    reach.check_names(job.remote, hostfile)
    other_way = {"SLURM_JOB_ID", "OMPI_MCA_plm_rsh_agent", "HYDRA_LAUNCHER"} & os.environ.keys()
    if mpirun and (other_way or any("plm" in word or "launcher" in word for word in job.launcher_args)):
        return
    needs = [reach.folder(Path.cwd()), reach.program(Path(job.program[0]))]
    if mpirun and mpirun.family is Family.OPEN_MPI_4:
        needs.append(reach.program((job.prefix or mpirun.prefix) / "bin" / "orted"))
    if job.interface:
        needs.append(reach.interface(job.interface))
    reach.check_hosts(job.remote, job.ssh_options, needs)


def _safe(path: Path, what: str) -> Path:
    if not _SAFE_PATH.fullmatch(str(path)):
        raise UserError(
            f"{what}: {str(path)!r} has a space or another character that a launcher does not pass to other hosts "
            "safely; use a path of letters, digits and ./_-+@=."
        )
    return path


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher-args {text}: {error}.") from None


def _port(text: str) -> int:
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return number
