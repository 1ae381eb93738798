"""The compiled part of the package; everything else about it is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # A plain shared library that ctypes loads: it knows nothing of Python or torch.
        Extension(
            "horovod_megdet.layers._batch_norm_cpu",
            ["horovod_megdet/layers/batch_norm_cpu.c"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ]
)
