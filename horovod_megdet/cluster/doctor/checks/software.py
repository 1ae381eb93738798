"""Whether all ranks have the same configuration, software and data."""

from horovod_megdet.cluster.doctor.examination import Examination, Finding
from horovod_megdet.cluster.doctor.facts import MISSING, Facts, Readable
from horovod_megdet.cluster.doctor.naming import differing, grouped, where


def check_config(examination: Examination) -> list[Finding]:
    """Whether all ranks have one and the same configuration."""
    ranks = examination.ranks
    findings = [
        Finding("configuration", "error", f"{text} ({where(who, ranks)})", "Correct the file or the command line.")
        for text, who in grouped((facts, facts.config_error) for facts in ranks if facts.config_error).items()
    ]
    fingerprints = [(facts, facts.config.fingerprint[:12]) for facts in ranks if facts.config]
    if difference := differing(fingerprints):
        remedy = "Give all ranks the same file, base file and --set options; a checkout that all hosts share does it."
        findings.append(Finding("configuration", "error", f"the configuration differs: {difference}", remedy))
    if findings or not fingerprints:
        return findings
    return [Finding("configuration", "ok", "all ranks have the same configuration")]


def check_versions(examination: Examination) -> list[Finding]:
    """Whether all ranks run the same software."""
    ranks = examination.ranks
    known = [(facts, facts.software) for facts in ranks if facts.software]
    findings = []
    names = list(dict.fromkeys(name for _, software in known for name in software.versions))
    for name in names:
        versions = [(facts, software.versions.get(name, MISSING)) for facts, software in known]
        remedy = "Install the versions of requirements.lock on every host, or use one environment that all share."
        if difference := differing(versions):
            findings.append(Finding("versions", "error", f"{name} differs: {difference}", remedy))
        elif versions[0][1] == MISSING:
            findings.append(Finding("versions", "error", f"{name} is not installed", remedy))
    sources = [(facts, f"{software.source[:12]} ({software.folder})") for facts, software in known]
    if len({software.source for _, software in known}) > 1:
        sentence = f"the code of horovod_megdet differs: {differing(sources)}"
        findings.append(Finding("versions", "error", sentence, "Check out the same commit on every host."))
    if findings or not known:
        return findings
    return [Finding("versions", "ok", f"Python, {len(names) - 1} packages and the project's code are the same")]


def check_build(examination: Examination) -> list[Finding]:
    """Whether the ranks talk through the same libraries, and these can do what is needed."""
    ranks = examination.ranks
    known = [(facts, facts.build) for facts in ranks if facts.build]
    if not known:
        return []
    findings = []
    if difference := differing([(facts, build.mpi_library) for facts, build in known]):
        remedy = "Take mpirun and MPI from one environment that all hosts share."
        findings.append(Finding("build", "error", f"the MPI library differs: {difference}", remedy))
    if difference := differing([(facts, _built(build.features)) for facts, build in known]):
        remedy = "Install the same Horovod wheel on every host."
        findings.append(Finding("build", "error", f"Horovod is built differently: {difference}", remedy))
    findings += _gpu_findings(ranks)
    if findings:
        return findings
    build = known[0][1]
    library = f"{build.mpi_library}, " if build.mpi_library else ""
    return [Finding("build", "ok", f"{library}controller {build.controller}, Horovod with {_built(build.features)}")]


def check_data(examination: Examination) -> list[Finding]:
    """Whether every host can read the data and the starting weights, and they are the same."""
    seen: dict[str, list[tuple[Facts, Readable]]] = {}
    for facts in examination.ranks:
        weights = {"starting weights": facts.weights} if facts.weights else {}
        for subject, readable in {**(facts.data or {}), **weights}.items():
            seen.setdefault(subject, []).append((facts, readable))
    findings, good = [], []
    for subject, found in seen.items():
        wrong = _data_findings(subject, found)
        findings += wrong
        if not wrong:
            good.append(f"{subject} {found[0][1].description}")
    if good:
        findings.append(Finding("data", "ok", f"readable and the same everywhere: {'; '.join(good)}"))
    return findings


def _data_findings(subject: str, found: list[tuple[Facts, Readable]]) -> list[Finding]:
    hosts = [facts for facts, _ in found]
    remedy = "Correct data.root and the paths, or copy what is missing: every host reads all of it."
    if subject == "starting weights":
        remedy = "Correct model.weights, or put the file there on every host."
    findings = [
        Finding("data", "error", f"the {subject} cannot be used on {where(who, hosts)}: {text}", remedy)
        for text, who in grouped((facts, readable.error) for facts, readable in found if readable.error).items()
    ]
    fingerprints = [(facts, readable.fingerprint[:12]) for facts, readable in found if not readable.error]
    if difference := differing(fingerprints):
        remedy = "Copy it anew to all hosts from one place."
        findings.append(Finding("data", "error", f"the {subject} differs: {difference}", remedy))
    return findings


def _gpu_findings(ranks: list[Facts]) -> list[Finding]:
    """What Horovod lacks for the GPUs that are to be used."""
    findings = []
    known = [
        facts for facts in ranks if facts.build and facts.gpus and not (facts.config and facts.config.device == "cpu")
    ]
    remedy = "Build it with NCCL, `make setup GPU=1`, in an environment of its own."
    if lacking := [facts for facts in known if facts.build and not facts.build.features["cuda"]]:
        sentence = f"Horovod was built without CUDA on {where(lacking, ranks)}: it cannot sum tensors of a GPU"
        findings.append(Finding("build", "error", sentence, remedy))
    elif lacking := [facts for facts in known if facts.build and not facts.build.features["nccl"]]:
        sentence = f"Horovod was built without NCCL on {where(lacking, ranks)}: gradients go through the hosts' memory"
        findings.append(Finding("build", "warning", sentence, remedy))
    return findings


def _built(features: dict[str, bool]) -> str:
    return ", ".join(name for name, there in features.items() if there)
