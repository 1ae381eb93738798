"""What the Triton kernels give in Triton's interpreter, on the CPU; run by test_triton_kernels.py."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # has to be known when the kernels are defined

import torch
from torchvision.ops import nms

from horovod_megdet.layers.kernels import PlainKernels, channels
from horovod_megdet.models import suppression, suppression_gpu


def check_channels(count: int) -> None:
    """Each kernel against the plain operators, in float64."""
    plain, x = PlainKernels(), 3 * torch.randn(4, count, 5, 6, dtype=torch.float64) + 5
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = plain.sums(x)
    torch.testing.assert_close(channels.sums(mean, (variance + 1e-12).rsqrt(), 1e-12, 120), expected)
    found, reference = channels.statistics(expected, 1e-5), plain.statistics(expected, 1e-5)
    torch.testing.assert_close(found.values, reference.values)
    torch.testing.assert_close(found.narrow, torch.stack([reference.mean, reference.invstd]).float())
    ours, theirs = ([torch.zeros(count), torch.ones(count)] for _ in range(2))
    channels.update_running(*ours, found, 0.1)
    plain.update_running(*theirs, reference, 0.1)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(x)
    sum_dy, sum_dy_xmu = dy.sum((0, 2, 3)), (dy * (x - mean.view(-1, 1, 1))).sum((0, 2, 3))
    _, sums = plain.gradient_sums(dy, x, reference)
    torch.testing.assert_close(channels.gradient_sums(sum_dy, sum_dy_xmu, found), sums)
    mean_dy, mean_dy_xmu, one = channels.kernel_sums(sums, found, torch.float64)
    torch.testing.assert_close(mean_dy, sum_dy / 120)
    torch.testing.assert_close(mean_dy_xmu, sum_dy_xmu / 120)
    assert one.tolist() == [1]


def boxes(lists: int, count: int) -> torch.Tensor:
    """Random boxes many of which overlap, one of them without area."""
    corners = 40 * torch.rand(lists, count, 2)
    found = torch.cat([corners, corners + 5 + 20 * torch.rand(lists, count, 2)], dim=2)
    found[0, count // 2] = 0
    return found


def check_suppression(count: int) -> None:
    """Lists of boxes against torchvision's operator."""
    candidates, scores = boxes(3, count), torch.linspace(1, 0.1, count)
    kept = suppression_gpu.kept(candidates, 0.5)
    for found, of_list in zip(kept, candidates, strict=True):
        assert found.nonzero().flatten().tolist() == nms(of_list, scores, 0.5).sort().values.tolist()


def check_levels() -> None:
    """Both ways to suppress, for levels of different sizes."""
    sizes = [70, 40, 20]
    scores = torch.cat([torch.rand(2, size).sort(descending=True).values for size in sizes], dim=1)
    candidates = boxes(2, sum(sizes))
    one = suppression.image_by_image(candidates, scores, sizes, 0.5)
    other = suppression._in_triton(candidates, sizes, 0.5)
    assert torch.equal(one, other)
    assert 0.3 < one.float().mean() < 0.9


if __name__ == "__main__":
    torch.manual_seed(0)
    for number in (1, 3, 128, 200):
        check_channels(number)
    for number in (1, 31, 130):
        check_suppression(number)
    check_levels()
