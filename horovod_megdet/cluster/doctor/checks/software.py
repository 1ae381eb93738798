"""Whether all ranks have the same configuration, software and data."""

from horovod_megdet.cluster.doctor.examination import Examination, Finding, error, ok, warning
from horovod_megdet.cluster.doctor.facts import Facts, InputSummary
from horovod_megdet.cluster.doctor.naming import differing, grouped, where
from horovod_megdet.versions import MISSING, OPTIONAL


def check_config(examination: Examination) -> list[Finding]:
    """Whether all ranks can use the configuration, and have the same."""
    ranks = examination.ranks
    wrong = grouped((facts, facts.config_error) for facts in ranks if facts.config_error)
    findings = [
        error(f"{text} ({where(who, ranks)})", "Correct the file or the command line.") for text, who in wrong.items()
    ]
    fingerprints = [(facts, facts.config.fingerprint[:12]) for facts in ranks if facts.config]
    if difference := differing(fingerprints):
        remedy = "Give all ranks the same file, base file and --set options, for example from one shared checkout."
        findings.append(error(f"the configuration differs: {difference}", remedy))
    if findings or not fingerprints:
        return findings
    return [ok("all ranks have the same configuration")]


def check_versions(examination: Examination) -> list[Finding]:
    """Whether all ranks run the same software, and all that they need is installed."""
    known = [(facts, facts.software) for facts in examination.ranks if facts.software]
    if not known:
        return []
    findings = []
    remedy = "Install the versions in requirements.lock on every host, or use one environment that all hosts share."
    packages = list(dict.fromkeys(package for _, software in known for package in software.versions))
    for package in packages:
        versions = [(facts, software.versions.get(package, MISSING)) for facts, software in known]
        if difference := differing(versions):
            findings.append(error(f"{package} differs: {difference}", remedy))
        elif versions[0][1] == MISSING and _is_needed(package, examination.ranks):
            findings.append(error(f"{package} is not installed", remedy))
    if differing([(facts, software.digest) for facts, software in known]):
        code = differing([(facts, f"{software.digest[:12]} ({software.folder})") for facts, software in known])
        findings.append(
            error(f"the code of horovod_megdet differs: {code}", "Check out the same commit on every host.")
        )
    installed = sum(version != MISSING for version in known[0][1].versions.values())
    return findings or [ok(f"all ranks have the same Python, packages ({installed - 1}) and project code")]


def check_build(examination: Examination) -> list[Finding]:
    """Whether all ranks communicate through the same libraries, and these can do what is needed."""
    known = [(facts, facts.build) for facts in examination.ranks if facts.build]
    if not known:
        return []
    findings = []
    if difference := differing([(facts, build.mpi_library) for facts, build in known]):
        remedy = "Take mpirun and MPI from one environment that all hosts share."
        findings.append(error(f"the MPI library differs: {difference}", remedy))
    if difference := differing([(facts, _list_of(build.features)) for facts, build in known]):
        remedy = "Install the same Horovod wheel on every host."
        findings.append(error(f"Horovod was built differently: {difference}", remedy))
    findings += _lacking_for_gpus(examination.ranks)
    build = known[0][1]
    library = f"{build.mpi_library}, " if build.mpi_library else ""
    return findings or [ok(f"{library}controller {build.controller}, Horovod with {_list_of(build.features)}")]


def check_data(examination: Examination) -> list[Finding]:
    """Whether every host can read the data sets and the starting weights, and all hosts have the same."""
    seen: dict[str, list[tuple[Facts, InputSummary]]] = {}
    for facts in examination.ranks:
        weights = {"starting weights": facts.weights} if facts.weights else {}
        for subject, summary in {**(facts.data or {}), **weights}.items():
            seen.setdefault(subject, []).append((facts, summary))
    findings, good = [], []
    for subject, summaries in seen.items():
        faults = _input_faults(subject, summaries)
        findings += faults
        if not faults:
            good.append(f"{subject} ({summaries[0][1].description})")
    if good:
        findings.append(ok(f"every host can read the same {', '.join(good)}"))
    return findings


def _is_needed(package: str, ranks: list[Facts]) -> bool:
    """Whether training needs the package; a missing optimizer is an error of the configuration that asks for it."""
    if package == "mpi4py":
        return any(facts.build and facts.build.features["mpi"] for facts in ranks)
    return package not in OPTIONAL


def _lacking_for_gpus(ranks: list[Facts]) -> list[Finding]:
    """What Horovod lacks for the GPUs that training would use."""
    known = [(facts, facts.build.features) for facts in ranks if facts.build and facts.gpus and facts.may_use_gpu]
    remedy = "Build it with NCCL (make setup GPU=1) in an environment of its own."
    if lacking := [facts for facts, features in known if not features["cuda"]]:
        return [error(f"Horovod was built without CUDA on {where(lacking, ranks)}: it cannot sum GPU tensors", remedy)]
    if lacking := [facts for facts, features in known if not features["nccl"]]:
        sentence = f"Horovod was built without NCCL on {where(lacking, ranks)}: gradients go through host memory"
        return [warning(sentence, remedy)]
    return []


def _input_faults(subject: str, summaries: list[tuple[Facts, InputSummary]]) -> list[Finding]:
    hosts = [facts for facts, _ in summaries]
    remedy = "Correct data.root and the paths, or copy what is missing: every host reads the whole data set."
    if subject == "starting weights":
        remedy = "Correct model.weights, or copy the file to every host."
    errors = grouped((facts, summary.error) for facts, summary in summaries if summary.error)
    findings = [
        error(f"the {subject} cannot be used on {where(who, hosts)}: {text}", remedy) for text, who in errors.items()
    ]
    fingerprints = [(facts, summary.fingerprint[:12]) for facts, summary in summaries if not summary.error]
    if difference := differing(fingerprints):
        sentence = f"the hosts do not have the same {subject}: {difference}"
        findings.append(error(sentence, "Copy it to all hosts again, from one place."))
    return findings


def _list_of(features: dict[str, bool]) -> str:
    return ", ".join(name for name, built in features.items() if built)
