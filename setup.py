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
        "accelerate",
        "datasets",
        "docstring-parser",  # jsonargparse shows the fields' descriptions in --help with it
        "jinja2",
        "jsonargparse",
        "numpy",
        "peft",
        "pillow",
        "psutil",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tqdm",
        'triton>=3.6; platform_system == "Linux"',
        "xxhash",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8.3", "liger-kernel>=0.8.5"],
        "mining": ["faiss-cpu"],
        "pages": ["faiss-cpu", "nicegui>=3.18"],
        "factory": ["httpx2", "openai>=3"],
        "mteb": ['mteb>=2.26; python_version >= "3.11"'],
        "dev": [
            *["faiss-cpu", "httpx2", "matplotlib", "mypy", "openai>=3", "pytest", "pytest-xdist", "ruff"],
            'mteb>=2.26; python_version >= "3.11"',
            *["nicegui>=3.18", "playwright", "sentence-transformers>=6.2"],
        ],
    },
)
