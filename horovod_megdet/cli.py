"""The ``megdet`` command. ``train``, ``demo``, ``doctor`` and ``evaluate`` run under a launcher, too."""

import argparse
import socket
import sys
from pathlib import Path

from horovod_megdet.arguments import (
    EXIT_CODES,
    add_config_arguments,
    add_demo_arguments,
    add_run_dir_argument,
    add_set_argument,
    add_training_arguments,
    config_of,
    fractions,
    picture,
    positive,
    positive_number,
)
from horovod_megdet.cluster.launch import command as launch
from horovod_megdet.errors import EXIT_CRASHED, EXIT_USER_ERROR, UserError
from horovod_megdet.evaluation.metrics import DRAWN_SCORE
from horovod_megdet.wording import count

Commands = argparse._SubParsersAction  # argparse has no public name for it


def main() -> int:
    """Entry point of the ``megdet`` console script; returns the exit code."""
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megdet", description="Train detectors; plan, check, evaluate and look at training runs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (
        _add_demo,
        _add_train,
        _add_plan,
        _add_import_data,
        _add_check_data,
        _add_anchors,
        _add_synth,
        _add_evaluate,
        _add_predict,
        _add_export,
        _add_doctor,
        _add_launch,
        _add_report,
    ):
        add_command(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small detector on a generated data set, in minutes; also under mpirun or horovodrun",
        epilog=EXIT_CODES,
    )
    add_demo_arguments(parser)
    parser.set_defaults(run=_train)


def _add_train(commands: Commands) -> None:
    parser = commands.add_parser(
        "train", help="train a detector, as train.py does; also under mpirun or horovodrun", epilog=EXIT_CODES
    )
    add_training_arguments(parser)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from horovod_megdet.run import train

    return train(arguments)


def _add_plan(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="print schedule and predicted communication for a number of ranks")
    add_config_arguments(parser)
    parser.add_argument("--ranks", type=positive, required=True, help="number of ranks (GPUs)")
    parser.add_argument("--images", type=positive, help="images of an epoch, where the data is not at hand")
    parser.add_argument(
        "--latency-us",
        type=positive_number,
        metavar="US",
        default=100.0,
        help="microseconds of a small allreduce between two ranks, as `megdet doctor` measures it (default: "
        "%(default)g, between two processes of one machine)",
    )
    parser.add_argument(
        "--bandwidth-gbs",
        type=positive_number,
        metavar="GB/S",
        default=1.0,
        help="gigabytes per second of a large allreduce (default: %(default)g, one 10 Gbit/s link)",
    )
    parser.add_argument(
        "--step-seconds",
        type=positive_number,
        metavar="S",
        help="seconds that one rank computes per step, without communication; used to predict the whole step",
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument(
        "--noise-scale",
        type=positive_number,
        metavar="IMAGES",
        help="noise scale of the gradient, to say what the mini-batch gains and loses (docs/method.md)",
    )
    noise.add_argument(
        "--run",
        dest="noise_of",
        type=Path,
        metavar="DIR",
        help="take the noise scale that this run measured at the full rate",
    )
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from horovod_megdet.plan import print_plan, read_noise_scale
    from horovod_megdet.solver.cost import MessageCost

    noise_scale = read_noise_scale(arguments.noise_of) if arguments.noise_of else arguments.noise_scale
    cost = MessageCost(arguments.latency_us * 1e-6, arguments.bandwidth_gbs * 1e9)
    print_plan(config_of(arguments), arguments.ranks, arguments.images, cost, arguments.step_seconds, noise_scale)
    return 0


def _add_import_data(commands: Commands) -> None:
    parser = commands.add_parser(
        "import-data", help="write COCO JSON files from Pascal VOC, YOLO, LabelMe, CVAT or OpenImages annotations"
    )
    parser.add_argument("source", type=Path, help="folder of the data set, or one annotation file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; images stay put")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: JPEGImages or images in SOURCE, else SOURCE)",
    )
    parser.add_argument(
        "--format",
        choices=("voc", "cvat", "yolo", "labelme", "openimages"),
        help="which annotations to read, where the folder has several kinds",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the names of the classes in their order: one per line, YOLO's data.yaml, or a CSV of labels and names "
        "(default: data.yaml or classes.txt in SOURCE, or all that the annotations name)",
    )
    parser.add_argument(
        "--split",
        type=fractions,
        default=(0.8, 0.2),
        metavar="FRACTIONS",
        help="fractions of the images for train, val and test (default: 0.8,0.2; 1 does not split)",
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds split in other ways (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="skip bad input, and report how much there was")
    parser.set_defaults(run=_import_data)


def _import_data(arguments: argparse.Namespace) -> int:
    from horovod_megdet.data.importing.source import Source
    from horovod_megdet.import_data import import_data

    output = arguments.output
    source = Source.find(arguments.source, arguments.images, arguments.format, arguments.classes, output)
    import_data(source, output, arguments.split, arguments.seed, arguments.skip_bad)
    return 0


def _add_check_data(commands: Commands) -> None:
    parser = commands.add_parser("check-data", help="list everything that is wrong with the data of a configuration")
    add_config_arguments(parser)
    parser.add_argument(
        "--decode", action="store_true", help="decode every image completely: slow, finds truncated files"
    )
    parser.set_defaults(run=_check_data)


def _check_data(arguments: argparse.Namespace) -> int:
    from horovod_megdet.data.coco import check_dataset
    from horovod_megdet.data.configured import cache_folder, make_synthetic, split_paths

    config = config_of(arguments)
    make_synthetic(config.data)
    check_images = "decode" if arguments.decode else config.data.check_images
    found = 0
    for training in (True, False):
        annotations, images = split_paths(config.data, training)
        problems = check_dataset(annotations, images, check_images, cache_folder(config.data))
        for problem in problems:
            print(problem)
        print(f"{annotations}: {count(len(problems), 'problem')}")
        found += len(problems)
    return EXIT_USER_ERROR if found else 0


def _add_anchors(commands: Commands) -> None:
    parser = commands.add_parser(
        "anchors", help="say how well anchors and image sizes fit the training set, and which would fit better"
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--plot",
        type=picture,
        default=Path("anchors.png"),
        metavar="FILE",
        help="picture to write: PNG, PDF or SVG (default: %(default)s)",
    )
    parser.set_defaults(run=_anchors)


def _anchors(arguments: argparse.Namespace) -> int:
    from horovod_megdet.data.configured import load_split, make_synthetic
    from horovod_megdet.report.anchors import fit_anchors
    from horovod_megdet.report.tables import console

    config = config_of(arguments)
    make_synthetic(config.data)
    report = fit_anchors(config, load_split(config.data, training=True))
    console().print(report.table())
    print(f"\n{report.advice()}")
    report.write_plot(arguments.plot)
    print(arguments.plot)
    return 0


def _add_synth(commands: Commands) -> None:
    parser = commands.add_parser("synth", help="generate the data set of the demo (training does it by itself)")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--train", type=positive, default=600, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=positive, default=100, help="validation images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other images (default: %(default)s)")
    parser.set_defaults(run=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from horovod_megdet.data.synthetic import ensure_synthetic

    ensure_synthetic(arguments.folder, arguments.train, arguments.val, arguments.seed)
    print(f"{arguments.folder}: {arguments.train} training and {arguments.val} validation images")
    return 0


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="report what would make training fail or run slowly; run it under the launcher you train with",
    )
    add_config_arguments(parser)
    add_run_dir_argument(parser)
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON, to standard output or a file (horovodrun marks the lines of standard output)",
    )
    parser.add_argument("--plot", metavar="FILE", type=picture, help="draw the times of allreduces, as PNG, PDF or SVG")
    parser.add_argument(
        "--no-data", action="store_true", help="leave out data set and weights: reading a large set takes minutes"
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=600,
        metavar="SECONDS",
        help="give up after waiting this long for other ranks, of which the first reads the data before those of other "
        "hosts do (default: %(default)s)",
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    try:
        from horovod_megdet.cluster.doctor.command import run_doctor
    except ImportError as error:
        print(
            f"megdet doctor: {sys.executable} on {socket.gethostname()} lacks what training needs: {error}.\n"
            "    -> Run make setup there, or use one environment that all hosts share.",
            file=sys.stderr,
        )
        return EXIT_CRASHED
    return run_doctor(arguments)


def _add_evaluate(commands: Commands) -> None:
    parser = commands.add_parser("evaluate", help="COCO metrics of a checkpoint; also under mpirun or horovodrun")
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run directory for its newest")
    add_set_argument(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from horovod_megdet.run import evaluate_checkpoint

    return evaluate_checkpoint(arguments.checkpoint, arguments.overrides)


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser("predict", help="run a checkpoint on images: write detections as JSON and draw them")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run directory for its newest")
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--score",
        type=float,
        help=f"leave out detections with a lower score (default: {DRAWN_SCORE}, or model.score_threshold of --set)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add_set_argument(parser)
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    import torch

    from horovod_megdet.inference import sets_score
    from horovod_megdet.predict import predict_images

    score = arguments.score
    if score is None and not sets_score(arguments.overrides):
        score = DRAWN_SCORE
    results = predict_images(
        arguments.checkpoint,
        arguments.images,
        arguments.output,
        score,
        torch.device(arguments.device),
        arguments.overrides,
    )
    print(results)
    return 0


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="a checkpoint's detector as a file for other programs (docs/export.md)")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run directory for its newest")
    parser.add_argument(
        "--format",
        choices=("onnx", "torchscript", "torchvision"),
        default="onnx",
        help="onnx and torchscript: the whole detector, for images of any size; torchvision: a state dict of its "
        "FasterRCNN (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: detector.onnx, .pt or .pth, in this folder)"
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from horovod_megdet.export import SUFFIXES, export_detector

    output = arguments.output or Path(f"detector{SUFFIXES[arguments.format]}")
    export_detector(arguments.checkpoint, output, arguments.format)
    print(output)
    return 0


def _add_launch(commands: Commands) -> None:
    parser = commands.add_parser(
        "launch", help="start a program on the machines of a host file, with mpirun or horovodrun"
    )
    launch.add_arguments(parser)
    parser.set_defaults(run=launch.run_launch)


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report", help="compare runs on one HTML page, or look at one and draw its curves (curves.png) again"
    )
    parser.add_argument(
        "run_dirs", metavar="RUN", nargs="+", type=Path, help="a run directory, also of a run in progress"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the page to write (default: report.html, in the run directory or, for several runs, in this folder)",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from horovod_megdet.report.comparison import REPORT_FILE, write_comparison
    from horovod_megdet.report.curves import write_curves

    runs, output = arguments.run_dirs, arguments.output
    alone = len(runs) == 1
    print(write_comparison(runs, output or (runs[0] if alone else Path()) / REPORT_FILE))
    if alone and output is None:  # else the run's folder may be another user's
        print(write_curves(runs[0]))
    return 0
