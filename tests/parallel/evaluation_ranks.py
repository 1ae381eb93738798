"""Evaluations on all ranks of a job; each rank writes its results to the folder that the command line names."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from horovod_megdet import comm
from horovod_megdet.config import Config, override
from horovod_megdet.data.coco import CocoDataset, load_dataset
from horovod_megdet.data.loader import Batch, build_eval_loader
from horovod_megdet.errors import UserError
from horovod_megdet.evaluation.coco import Evaluation, evaluate
from horovod_megdet.evaluation.loss import validation_losses
from horovod_megdet.evaluation.views import Views
from horovod_megdet.models.detector import build_detector

CPU = torch.device("cpu")
CONFIG = Config.model_validate(yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text()))


class Noisy(nn.Module):
    """Finds the objects of the last batch, each off by a little that depends only on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[dict[str, Any]] = []

    def watch(self, batches: list[Batch]) -> Iterator[Batch]:
        """Yields the batches and remembers the objects of the last one."""
        for batch in batches:
            self.targets = batch.targets
            yield batch

    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Twice as many detections as objects; a fifth have another class, and many have equal scores."""
        return [self._near(image, target) for image, target in zip(images, self.targets, strict=True)]

    @staticmethod
    def _near(image: Tensor, target: dict[str, Any]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(image.long().sum()))
        boxes, labels = target["boxes"].repeat(2, 1), target["labels"].repeat(2)
        sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return {
            "boxes": boxes + 0.1 * sizes * torch.randn(boxes.shape, generator=generator),
            "labels": torch.where(torch.rand(len(labels), generator=generator) < 0.8, labels, 1),
            "scores": torch.randint(1, 8, labels.shape, generator=generator) / 8,
        }


def load(root: Path) -> CocoDataset:
    """The validation set of a generated data set."""
    return load_dataset(root / "annotations" / "val.json", root / "images" / "val", training=False)


def shard(dataset: CocoDataset) -> list[Batch]:
    """This rank's batches."""
    return list(build_eval_loader(dataset, CONFIG.data, rank=comm.rank(), ranks=comm.size()))


def with_noisy(dataset: CocoDataset) -> Evaluation:
    """Evaluates a detector that is sometimes right."""
    detector = Noisy()
    return evaluate(detector, dataset, detector.watch(shard(dataset)), CPU)


def with_detector(dataset: CocoDataset) -> Evaluation:
    """Evaluates the real detector, with random weights."""
    torch.manual_seed(0)
    detector = build_detector(CONFIG.model, CONFIG.batch_norm, len(dataset.class_names))
    return evaluate(detector, dataset, shard(dataset), CPU)


def with_views(dataset: CocoDataset) -> Evaluation:
    """The same at three scales, and mirrored."""
    torch.manual_seed(0)
    detector = build_detector(CONFIG.model, CONFIG.batch_norm, len(dataset.class_names))
    config = override(CONFIG, ["evaluation.scales=[48,64,100]", "evaluation.flip=true", "evaluation.merge=soft_nms"])
    loader = build_eval_loader(
        dataset, config.data, rank=comm.rank(), ranks=comm.size(), scales=config.evaluation.scales
    )
    return evaluate(detector, dataset, loader, CPU, views=Views.of(config.evaluation, config.model))


def losses(dataset: CocoDataset) -> dict[str, float]:
    """The validation losses of the real detector, with random weights and statistics that are not those of a batch."""
    torch.manual_seed(0)
    detector = build_detector(CONFIG.model, CONFIG.batch_norm, len(dataset.class_names))
    for name, buffer in detector.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return validation_losses(detector, dataset, shard(dataset), CPU)


def bad_image_on_last_rank(dataset: CocoDataset) -> str:
    """The error that this rank reports."""
    batches = shard(dataset)
    if comm.rank() == comm.size() - 1:
        batches[-1].error = "broken.jpg: not an image."
    try:
        evaluate(Noisy(), dataset, [batch for batch in batches if batch.error], CPU)
    except UserError as error:
        return str(error)
    return ""


def main(root: Path, output: Path) -> None:
    """Evaluates the two data sets in ``root``; writes a JSON for each rank and rank 0's detections."""
    many, two = load(root / "many"), load(root / "two")
    jobs: dict[str, tuple[Callable[[CocoDataset], Evaluation], CocoDataset]] = {
        "noisy": (with_noisy, many),
        "detector": (with_detector, many),
        "views": (with_views, many),
        "few images": (with_noisy, two),
    }
    seen: dict[str, Any] = {"error": bad_image_on_last_rank(many), "losses": losses(many)}
    for name, (job, dataset) in jobs.items():
        evaluation = job(dataset)
        assert (evaluation.detections is not None) == comm.is_main()
        seen[name] = {"row": evaluation.row(), "images": evaluation.images, "mine": len(shard(dataset))}
        if comm.is_main():
            evaluation.write_detections(output / f"{name}.json")
    (output / f"rank{comm.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    comm.init()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    comm.shutdown()
