"""The compiled part of the package; everything else about it is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # A plain shared library that ctypes loads: it knows nothing of Python or torch.
        Extension(
            "horovod_megdet.layers._cpu",
            ["horovod_megdet/layers/batch_norm_cpu.c", "horovod_megdet/layers/roi_align_cpu.c"],
            depends=["horovod_megdet/layers/numbers_cpu.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ]
)
