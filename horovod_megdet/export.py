"""``megdet export``: a trained detector as a file that needs nothing of this project."""

import io
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from horovod_megdet.engine import checkpoint as checkpoints
from horovod_megdet.engine.checkpoint import Checkpoint
from horovod_megdet.errors import UserError
from horovod_megdet.files import atomic_write
from horovod_megdet.models.any_image import AnyImage
from horovod_megdet.models.equivalent import torchvision_detector

Format = Literal["onnx", "torchscript", "torchvision"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".pt", "torchvision": ".pth"}
"""Of the files, by format."""

METADATA_FILE = "metadata.json"
"""In a TorchScript archive: what an ONNX file has as metadata."""

OPSET = 17
"""Version of ONNX's operators: onnxruntime 1.13 and newer have them."""

INPUTS = {
    "image": "uint8 (height, width, 3), RGB, upright, of any size; the detector resizes it",
    "original_size": "int64 (2,): height and width that boxes shall be in pixels of: those of image, or of the file "
    "where image was decoded at a fraction of its size (JPEG)",
}
OUTPUTS = {
    "boxes": "float32 (detections, 4): x1, y1, x2, y2 in pixels, best score first",
    "scores": "float32 (detections,)",
    "labels": "int64 (detections,): label l stands for class_names[l - 1] and category_ids[l - 1]",
}


def export_detector(checkpoint: str | Path, output: Path, format: Format) -> None:
    """Writes the detector of a checkpoint to the file ``output``.

    Args:
        checkpoint: a checkpoint folder, or a run directory for its newest checkpoint.
        output: the file to write.
        format: ``onnx`` and ``torchscript`` have the inputs :data:`INPUTS`, the outputs :data:`OUTPUTS` and the
            metadata of :func:`metadata`; ``torchvision`` is a state dict of torchvision's ``FasterRCNN``.

    Raises :class:`UserError` for a checkpoint that cannot be read or has no such form, a package that is missing, and a
    file that cannot be written.
    """
    saved = checkpoints.read(checkpoint)
    write = {"onnx": _onnx, "torchscript": _torchscript, "torchvision": _state_dict}[format]
    content = write(saved)
    with atomic_write(output) as file:
        file.write(content)


def metadata(saved: Checkpoint) -> dict[str, Any]:
    """What a user of the file has to know about the detector, and how it resizes images."""
    config, run = saved.config, saved.run
    return {
        "class_names": run.class_names,
        "category_ids": run.category_ids,
        "shorter_side": config.data.shorter_side_test,
        "longer_side": config.data.longer_side_test,
        "score_threshold": config.model.score_threshold,
        "nms_threshold": config.model.nms_threshold,
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "images_seen": saved.images_seen,
    }


def _any_image(saved: Checkpoint) -> AnyImage:
    config = saved.config
    detector = torchvision_detector(
        config.model, config.data, saved.weights(), config.batch_norm.eps, len(saved.run.class_names)
    )
    return AnyImage(detector, config.data.shorter_side_test, config.data.longer_side_test).eval().requires_grad_(False)


def _onnx(saved: Checkpoint) -> bytes:
    try:
        import onnx
    except ImportError:
        raise UserError(
            "--format onnx needs the package onnx: pip install 'horovod-megdet[export]', or pip install onnx."
        ) from None
    traced = io.BytesIO()
    with warnings.catch_warnings():
        # torch.export, which the exporter wants to be called with, cannot handle torchvision's detectors.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _any_image(saved),
            _example(saved),
            traced,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={"image": {0: "height", 1: "width"}} | {name: {0: "detections"} for name in OUTPUTS},
        )
    model = onnx.load_from_string(traced.getvalue())
    values = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in metadata(saved).items()
    }
    onnx.helper.set_model_props(model, values)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _torchscript(saved: Checkpoint) -> bytes:
    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would have us use torch.export; see above
        scripted = torch.jit.script(_any_image(saved))
        torch.jit.save(scripted, archive, _extra_files={METADATA_FILE: json.dumps(metadata(saved), indent=1)})
    return archive.getvalue()


def _state_dict(saved: Checkpoint) -> bytes:
    if saved.config.model.backbone_norm == "none":
        raise UserError(
            f"{saved.path}: model.backbone_norm is none, and torchvision's ResNets have norms: take --format "
            "torchscript or onnx."
        )
    file = io.BytesIO()
    torch.save(dict(_any_image(saved).detector.state_dict()), file)
    return file.getvalue()


def _example(saved: Checkpoint) -> tuple[Tensor, Tensor]:
    """What the exporter records the operators with; nothing depends on its size."""
    side = saved.config.data.shorter_side_test
    return torch.zeros((side, side, 3), dtype=torch.uint8), torch.tensor([side, side])
