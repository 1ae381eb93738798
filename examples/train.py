"""Training from Python: a detector is trained, evaluated and tried on an image.

python examples/train.py [CONFIG [RUN_DIR]]                      one process
horovodrun -np 2 python examples/train.py [CONFIG [RUN_DIR]]     two ranks
"""

import sys

import horovod_megdet as megdet
from horovod_megdet import comm


def main(config: str = "demo", run_dir: str = "runs/from_python") -> None:
    short = {"epochs": 1, "milestones": [], "gammas": []}
    result = megdet.train({"base": config, "solver": short, "output": {"run_dir": run_dir}})
    evaluation = megdet.evaluate(result.best_checkpoint, {"model": {"score_threshold": 0.2}})
    if comm.is_main():
        print(f"AP {result.metrics['AP']:.3f} at the end; {evaluation.metrics['AP']:.3f} without scores below 0.2")
        print(f"The best checkpoint: {result.best_checkpoint}")


if __name__ == "__main__":  # loader processes import this file again
    main(*sys.argv[1:])
