"""Package metadata; the tools' settings are in pyproject.toml, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: muco_ds may need what is not installed yet.
(VERSION,) = re.findall(r'^__version__ = "(.+)"', (ROOT / "muco_ds" / "__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="muco_ds",
    version=VERSION,
    description="DeepSpeed training of multimodal embedding models with multi-turn contrastive learning",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["muco_ds", "muco_ds.*"]),
    package_data={"muco_ds.pages": ["*.css", "*.jinja", "*.js"]},
    install_requires=[
        "torch>=2.10",  # the first with torch.nn.attention.varlen
        "deepspeed>=0.19.8",  # frozen parameters with non-reentrant checkpointing under ZeRO-3
        # 5.23 is the first to keep rotary tables in fp32 under zero.Init, and needs Python 3.11.
        'transformers>=5.23,<6; python_version >= "3.11"',
        'transformers>=5.20,<6; python_version < "3.11"',
        # Lower bounds below: the oldest that tests/oldest.sh ran with (constraints-oldest.txt).
        "accelerate>=1.1",
        "datasets>=4.2",
        "docstring-parser>=0.15",  # jsonargparse shows the fields' descriptions in --help with it
        "jinja2>=3.1.6",
        "jsonargparse>=4.50",
        "numpy>=1.26.4",
        "packaging",
        "peft>=0.20",
        "pillow>=11.0",  # older ones turn TIFFs by another rule and open 16-bit PNGs as 32-bit
        "psutil>=5.9.5",
        "pyarrow>=21.0",
        "pyyaml>=6.0.1",
        "safetensors>=0.8",
        "tensorboard>=2.16.2",
        "tqdm>=4.66.3",
        'triton>=3.6; platform_system == "Linux"',
        "xxhash>=3.2",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8.3", "liger-kernel>=0.8.5"],
        "mining": ["faiss-cpu"],
        "pages": ["faiss-cpu", "nicegui>=3.18"],
        "factory": ["httpx2", "openai>=3"],
        "mteb": ['mteb>=2.26; python_version >= "3.11"'],
        "dev": [
            *["faiss-cpu", "httpx2", "hypothesis", "matplotlib", "mypy", "openai>=3", "pytest", "pytest-xdist", "ruff"],
            'mteb>=2.26; python_version >= "3.11"',
            *["nicegui>=3.18", "playwright", "sentence-transformers>=6.2"],
        ],
    },
)
