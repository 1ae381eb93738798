"""How fast Cross-GPU BN is: every table of docs/benchmarks.md, from one command.

    python benchmarks/cross_gpu_bn.py                              # prints the tables; takes minutes
    python benchmarks/cross_gpu_bn.py --write docs/benchmarks.md   # and writes them to the file
    python benchmarks/cross_gpu_bn.py --only memory messages       # some of them

Everything runs on two ranks of one thread each on this machine, except for the table of ranks. The variants take
turns; a ratio is the median over the turns, in each of which the slowest rank counts. Times depend on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from document import Row, machine, table
from programs import under_mpirun
from timing import Timing

from horovod_megdet.solver.cost import MessageCost

HERE = Path(__file__).parent
UNBOUND = {"BENCHMARK_BIND_CORES": "0"}
HOROVOD_DEFAULTS = {"HOROVOD_CYCLE_TIME": "1", "OMPI_MCA_mpi_yield_when_idle": "0", **UNBOUND}
RANKS = (1, 2, 4, 8, 16)
SETTINGS_RUNS = 3
WAITS = ("until the last rank comes", "from there")

NOISE_HEADING = "## Gradient noise"
"""Of the section that gradient_noise.py writes behind the tables; it stays."""

FOLLOWS = ("nothing", "ReLU", "shortcut and ReLU")
RATIOS = ("bfloat16 / float32", "ours / torch, float32", "ours / torch, bfloat16")

Table = tuple[str, Row, Sequence[Row]]


def measure(part: str, ranks: int = 2, settings: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a part of measure_cgbn.py on ``ranks`` ranks with these environment variables, and returns its result."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        passed_on = tuple(word for name in settings or {} for word in ("-x", name))
        command = under_mpirun(ranks, str(HERE / "measure_cgbn.py"), part, str(result), options=passed_on)
        print(f"# {part}, {ranks} ranks {settings or ''}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, env=os.environ | (settings or {}))
        return json.loads(result.read_text())


def steps_table() -> Table:
    """ResNet-50 and the detector: CGBN against the alternatives."""
    names = {
        "plain": "plain nn.BatchNorm2d and ReLU under Horovod",
        "plain_ddp": "plain nn.BatchNorm2d and ReLU under DDP-gloo",
        "local": "the same layers with local statistics",
        "naive_ddp": "differentiable allreduce of (E x, E x^2) under DDP-gloo",
        "five_messages": "Horovod's five messages a layer",
    }
    rows = []
    for model, part in (("ResNet-50", "resnet_steps"), ("R50-FPN detector", "detector_steps")):
        for side, variants in measure(part).items():
            timings = {name: Timing(seconds) for name, seconds in variants.items()}
            ours = timings.pop("cgbn")
            rows += [
                (
                    f"{model}, 2 images of {side} px per rank",
                    names[name],
                    _ms(ours.median),
                    _ms(timing.median),
                    f"{ours.ratio(timing):.2f}",
                )
                for name, timing in timings.items()
            ]
    return "Whole steps", ("step", "compared with", "CGBN, ms", "other, ms", "ratio"), rows


def kernels_table() -> Table:
    """Layers without their messages: bfloat16 beside float32, and beside torch's separate operators."""
    rows = []
    for shape, seconds in measure("kernels", ranks=1).items():
        timings = {name: Timing(values) for name, values in seconds.items()}
        for follows in FOLLOWS:
            mine = [timings[f"{follows}, {dtype}, ours"] for dtype in ("float32", "bfloat16")]
            theirs = [timings[f"{follows}, {dtype}, torch"] for dtype in ("float32", "bfloat16")]
            ratios = [mine[1].ratio(mine[0])] + [one.ratio(two) for one, two in zip(mine, theirs, strict=True)]
            times = [_ms(timing.median) for timing in (*mine, *theirs)]
            rows.append((shape, follows, *times, *(f"{ratio:.2f}" for ratio in ratios)))
    head = ("input", "followed by", "float32, ms", "bfloat16, ms", "torch float32, ms", "torch bfloat16, ms")
    return "A layer without its messages, forward and backward", (*head, *RATIOS), rows


def messages_table() -> Table:
    """A CGBN message with our launch defaults, with Horovod's, and as a bare MPI call."""
    ours, theirs = measure("messages"), measure("messages", settings=HOROVOD_DEFAULTS)
    rows = []
    for channels in ("64", "512", "2048"):
        mine, other, bare = ours["horovod"][channels], theirs["horovod"][channels], ours["mpi"][channels]
        rows.append((channels, f"{mine * 1e6:.0f}", f"{other * 1e6:.0f}", f"{mine / other:.2f}", f"{bare * 1e6:.0f}"))
    head = ("channels", "launch defaults, us", "Horovod's defaults, us", "ratio", "bare MPI.Allreduce, us")
    return "One message of 2 C + 1 float64", head, rows


def memory_table() -> Table:
    """ResNet-50 at 512 px with and without recomputing blocks, and torchvision's."""
    result = measure("memory")
    timings = {name: Timing(seconds) for name, seconds in result["512"].items()}
    none, peaks = timings["none"], result["peak_mb"]
    names = {
        "none": "CGBN",
        "blocks": "CGBN, recomputing blocks",
        "torchvision": "torchvision's ResNet, plain nn.BatchNorm2d",
    }
    rows = [
        (
            what,
            f"{peaks[name]:.0f}",
            f"{peaks[name] / peaks['none']:.2f}",
            _ms(timings[name].median),
            f"{timings[name].ratio(none):.2f}",
        )
        for name, what in names.items()
    ]
    head = ("", "peak of the activations, MB", "ratio", "step, ms", "ratio")
    return "Memory: ResNet-50, 2 images of 512 px per rank", head, rows


def overlap_table() -> Table:
    """CGBN messages beside gradient messages, by fusion threshold."""
    rows = []
    for name, settings in (
        ("default, 128 MB", {}),
        ("2 MB", {"HOROVOD_FUSION_THRESHOLD": str(2 << 20)}),
        ("0, no fusion", {"HOROVOD_FUSION_THRESHOLD": "0"}),
    ):
        result = measure("overlap", settings=settings)
        phases = (result["forward"], result["backward"])
        times = [f"{phase['median'] * 1e3:.2f}" for phase in phases]
        times += [f"{phase[figure] * 1e3:.1f}" for phase in phases for figure in ("waiting", "message")]
        rows.append((name, *times, _ms(result["step"])))
    medians = ("forward, median ms", "backward, median ms")
    waits = tuple(f"{phase}, ms of a step {what}" for phase in ("forward", "backward") for what in WAITS)
    return (
        "CGBN messages beside gradient messages: ResNet-50 at 128 px",
        ("fusion threshold", *medians, *waits, "step, ms"),
        rows,
    )


def settings_table() -> Table:
    """The step of a whole job by cycle time, yield and core binding; several runs of each, which take turns."""
    ours = {"HOROVOD_CYCLE_TIME": "0.02", "OMPI_MCA_mpi_yield_when_idle": "1", "BENCHMARK_BIND_CORES": "1"}
    variants = [ours | {"HOROVOD_CYCLE_TIME": cycle} for cycle in ("0.01", "0.02", "0.05", "0.2", "1")]
    variants += [ours | UNBOUND, ours | {"OMPI_MCA_mpi_yield_when_idle": "0"}, HOROVOD_DEFAULTS]
    runs = [[measure("overlap", settings=settings) for settings in variants] for _ in range(SETTINGS_RUNS)]
    rows = []
    for settings, results in zip(variants, zip(*runs, strict=True), strict=True):
        message = statistics.median(result["forward"]["median"] for result in results)
        step = statistics.median(result["step"] for result in results)
        rows.append((*(settings[name] for name in ours), f"{message * 1e3:.2f}", _ms(step)))
    head = (
        "HOROVOD_CYCLE_TIME, ms",
        "mpi_yield_when_idle",
        "cores bound",
        "message in the forward pass, ms",
        "step, ms",
    )
    return "Launch settings: ResNet-50 at 128 px with CGBN", head, rows


def ranks_table() -> Table:
    """A small model on 1 to 16 ranks of this machine, and the cost of messages fitted to them."""
    results = [measure("scaling", ranks) for ranks in RANKS]
    rows = [
        (
            str(result["ranks"]),
            f"{1 / result['seconds']:.2f}",
            f"{result['memory_mb']:.0f}",
            f"{result['message'] * 1e6:.0f}" if result["ranks"] > 1 else "",
            f"{result['large_message'] * 1e3:.0f}" if result["ranks"] > 1 else "",
        )
        for result in results
    ]
    cores = os.cpu_count() or 1
    fitted = [result for result in results if 1 < result["ranks"] <= max(2, cores)]
    cost = MessageCost.fitted([(r["ranks"], r["message"], r["large_message"]) for r in fitted], large_bytes=16 << 20)
    rows.append((f"fit over at most {max(2, cores)} ranks: {cost}", "", "", "", ""))
    head = ("ranks", "steps/s", "memory per rank, MB", "CGBN message, us", "message of 16 MiB, ms")
    return f"Ranks on {cores} cores: ResNet-18 with CGBN, 2 images of 64 px per rank", head, rows


TABLES: dict[str, Callable[[], Table]] = {
    "steps": steps_table,
    "kernels": kernels_table,
    "messages": messages_table,
    "memory": memory_table,
    "overlap": overlap_table,
    "settings": settings_table,
    "ranks": ranks_table,
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables to measure")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    if arguments.write and arguments.only != list(TABLES):
        parser.error("--write takes all tables, since they belong to one machine: leave out --only.")
    text = _head()
    print(text, flush=True)
    for name in arguments.only:
        title, head, rows = TABLES[name]()
        section = f"\n\n## {title}\n\n{table(head, rows)}"
        print(section, flush=True)
        text += section
        if arguments.write:  # after each table, so that an interruption keeps the previous ones
            _, heading, noise = arguments.write.read_text().partition(NOISE_HEADING)
            arguments.write.write_text(f"{text}\n\n{heading}{noise}" if heading else f"{text}\n")


def _head() -> str:
    return (
        "# Benchmarks\n\nWritten by `python benchmarks/cross_gpu_bn.py --write docs/benchmarks.md`, which explains how "
        f"it measures. {machine()}. Ours is faster where a ratio of times is below 1, or one of images/s above 1; a "
        "ratio is the median of the ratios of all turns, not the ratio of the two medians. "
        "[performance.md](performance.md) explains the figures."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


if __name__ == "__main__":
    main()
