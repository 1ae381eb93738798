"""What a trainer is built on and that does not depend on the number of ranks: device, precision and data sets."""

from dataclasses import dataclass

import torch

from horovod_megdet import comm
from horovod_megdet.config import Config, DataConfig
from horovod_megdet.data.coco import CocoDataset, check_same_classes
from horovod_megdet.data.configured import load_split, make_synthetic
from horovod_megdet.data.loader import image_stream
from horovod_megdet.data.sampler import ImageStream
from horovod_megdet.engine import hardware, precision
from horovod_megdet.engine.checkpoint import RunDescription
from horovod_megdet.engine.signals import StopRequest
from horovod_megdet.versions import NUMERICAL, versions


@dataclass(frozen=True)
class Foundation:
    """What a trainer is built on and that does not depend on the number of ranks."""

    config: Config
    """With the precision in the place of ``auto``."""
    precision_choice: str
    device: torch.device
    train_set: CocoDataset
    val_set: CocoDataset
    stream: ImageStream
    stop_request: StopRequest | None

    @property
    def description(self) -> RunDescription:
        """What the run trains, for its checkpoints."""
        return RunDescription(
            config=self.config.model_dump(mode="json"),
            class_names=self.train_set.class_names,
            category_ids=self.train_set.category_ids,
            training_data=self.train_set.fingerprint,
            versions=versions(NUMERICAL),
        )


def lay_foundation(config: Config, stop_request: StopRequest | None, earlier: Config | None) -> Foundation:
    """Chooses device and precision and loads the data sets. Collective.

    ``earlier`` is the configuration with which the run was trained until now, if it was, on rank 0 or on all.
    """
    with comm.agreement("device"):
        device = hardware.set_up_process(config.runtime)
    # Compared before with `auto` in it: what it stands for follows from what all ranks know, so that it is equal, too.
    config, why = precision.decide(config, device, earlier)
    train_set, val_set = load_datasets(config)
    with comm.agreement("image stream"):
        stream = image_stream(train_set, config.data, config.runtime.seed)
    return Foundation(config, why, device, train_set, val_set, stream, stop_request)


def load_datasets(config: Config) -> tuple[CocoDataset, CocoDataset]:
    """Loads training and validation set on every rank and checks that all ranks see the same."""
    data = config.data
    generate_data(data)
    train_set = load_split(data, training=True, ranks=comm)
    val_set = load_split(data, training=False, ranks=comm)
    with comm.agreement("classes"):
        check_same_classes(train_set, val_set)
    comm.check_same({"training data": train_set.fingerprint, "validation data": val_set.fingerprint}, "data")
    return train_set, val_set


def generate_data(data: DataConfig) -> None:
    """Generates the synthetic data set where it is configured and missing, once for all ranks of a host. Collective."""
    with comm.agreement("synthetic data"):
        if comm.local_rank() == 0:
            make_synthetic(data)
