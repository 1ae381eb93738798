"""The compiled part of the package; everything else about it is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # A plain shared library that ctypes loads: it knows nothing of Python or torch.
        Extension(
            "horovod_megdet.layers._cpu",
            [f"horovod_megdet/layers/{name}_cpu.c" for name in ("batch_norm", "roi_align", "suppression")],
            depends=["horovod_megdet/layers/numbers_cpu.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ]
)
