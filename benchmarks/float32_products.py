"""bfloat16 on processors without AMX: products in float32 beside oneDNN's own, as a section of docs/benchmarks.md.

    python benchmarks/float32_products.py                              # prints the section
    python benchmarks/float32_products.py --write docs/benchmarks.md   # and replaces it in the file

Forward and backward passes of ResNet-50, channels last, on one thread. Where the processor has AMX, it is not
used (``ONEDNN_MAX_CPU_ISA``). The variants take turns; figures are medians over the turns.
"""

import os
from functools import partial

import torch
from document import machine, measure_section, table
from timing import take_turns
from torch import Tensor, nn
from torchvision.models import resnet50

from horovod_megdet.layers.float32_products import use_float32_products

IMAGES, SIDE = 2, 224
TURNS = 5


def passes(model: nn.Module, images: Tensor, bfloat16: bool, float32_products: bool) -> None:
    """A forward and a backward pass."""
    if float32_products:
        use_float32_products()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        outputs = model(images)
    outputs.float().square().mean().backward()
    use_float32_products.cache_clear()


def section() -> str:
    """Measures, and returns the section."""
    torch.manual_seed(0)
    model = resnet50().to(memory_format=torch.channels_last)
    images = torch.randn(IMAGES, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    run = partial(passes, model, images)
    variants = {
        "bfloat16, products in float32": partial(run, bfloat16=True, float32_products=True),
        "bfloat16, oneDNN's products": partial(run, bfloat16=True, float32_products=False),
        "float32": partial(run, bfloat16=False, float32_products=False),
    }
    timings = take_turns(variants, TURNS, warm_up=1)
    ours = timings["bfloat16, products in float32"]
    rows = [(name, f"{timing.median:.2f}", f"{ours.ratio(timing):.2f}") for name, timing in timings.items()]
    return "\n".join(
        [
            "## bfloat16 without AMX",
            "",
            "Written by `python benchmarks/float32_products.py --write docs/benchmarks.md`, which says how it measures:"
            f" {IMAGES} images of {SIDE} px. {machine()}.",
            "",
            table(("forward and backward, ResNet-50", "s", "the first / this"), rows),
            "",
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # read at the first product
    measure_section(__doc__, section)
