"""One real mini-batch of 256 images on 16 ranks: does it train, and do its gradients agree with those of one process?

    python -m experiments.mini_batch_256        some minutes on two cores, and about 16 GB of memory

Trains ``mini_batch_256.yaml`` for a few steps, then compares the first step's gradients with frozen norms in float32
(``compare_gradients.py``). The result goes to ``results/mini_batch_256.json``, and from there onto docs/findings.md.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from experiments.results import Row
from experiments.training import PROJECT, Laboratory, ProcessRunner, launch, made_with
from horovod_megdet.config import load_config
from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.report.rows import read_metrics
from horovod_megdet.run_files import METRICS_FILE

RANKS = 16
CONFIG = Path(__file__).with_suffix(".yaml")
RESULT = PROJECT / "experiments/results/mini_batch_256.json"
FROZEN = ("model.backbone_norm=frozen", "model.fpn_norm=none", "batch_norm.bn_size=world", "runtime.amp=none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=RANKS, help="fewer, to try it")
    parser.add_argument("--folder", type=Path, default=PROJECT / "runs/experiments", help="scratch")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        result = run(arguments.ranks, arguments.overrides, arguments.folder.absolute())
        with atomic_write(arguments.result) as file:
            file.write(json.dumps(result, indent=1).encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    losses = [step["loss"] for step in result["steps"]]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the gradients differ by {result['gradient_difference']:.1e}")
    return 0


def run(ranks: int, overrides: list[str], scratch: Path) -> Row:
    """Trains and compares; returns the result. Raises :class:`UserError`."""
    folder = scratch / "mini_batch_256"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, processes = load_config(CONFIG, overrides), ProcessRunner()
    Laboratory(scratch, processes, say=print).pretrain(Path(config.model.weights), [])
    for program, settings in (("train.py", ()), ("experiments/compare_gradients.py", FROZEN)):
        command = launch(ranks, PROJECT / program, CONFIG, folder / Path(program).stem, [*overrides, *settings])
        log = folder / f"{Path(program).stem}.txt"
        if code := processes.run(command, log):
            raise UserError(f"{program} on {ranks} ranks ended with exit code {code}; its output is in {log}.")
    rows = [row for row in read_metrics(folder / "train" / METRICS_FILE) if row["kind"] == "train"]
    return {
        "ranks": ranks,
        "images_per_rank": config.data.images_per_rank,
        "bn_size": config.batch_norm.bn_size,
        "steps": [{key: row[key] for key in ("step", "lr", "loss", "step_seconds", "memory_mb")} for row in rows],
        **json.loads((folder / "compare_gradients/difference.json").read_text(encoding="utf-8")),
        **made_with(config),
    }


if __name__ == "__main__":
    sys.exit(main())
