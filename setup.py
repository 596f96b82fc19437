import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "tomesd/__init__.py").read_text(encoding="utf-8"))[1]
# What the commands `generate`, `tune`, `explain` and `trace` need, and then `bench`, `plot` and `quality`.
diffusers = [
    *("diffusers>=0.30", "transformers>=4.40", "accelerate>=0.30", "safetensors>=0.4.1"),
    *("numpy", "pillow", "matplotlib", "tqdm"),
]
bench = [*diffusers, "scikit-image"]
app = [*diffusers, "gradio>=6"]
# transformers 5.18 asks for torch 2.5.
docs = ["mkdocs-material", "mkdocstrings[python]"]
vit = ["torch>=2.5", "timm>=1.0.16", "torchvision", "transformers>=5.18", "numpy", "tqdm", "pillow"]

setup(
    name="tomesd",
    version=version,
    description="Token merging: makes Stable Diffusion faster and lighter by merging similar tokens",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={
        "Paper (diffusion)": "https://arxiv.org/abs/2303.17604",
        "Paper (ViT)": "https://arxiv.org/abs/2210.09461",
    },
    license="MIT",
    license_files=["LICENSE"],
    keywords=["token merging", "stable diffusion", "diffusers", "vision transformer", "attention"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["tomesd", "tomesd.*"]),
    package_data={"tomesd": ["py.typed", "emoji-model/**"]},
    entry_points={"console_scripts": ["tomesd = tomesd.__main__:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
    extras_require={
        "diffusers": diffusers,
        "bench": bench,
        "app": app,
        "vit": vit,
        "docs": docs,
        "xformers": ["xformers"],
        "dev": [
            *bench,
            *vit,
            *docs,
            "peft",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "basedpyright",  # pyright as a package of PyPI alone
            # for scripts/
            *("fonttools", "onnx"),
            *("onnxruntime", "onnxscript", "open_clip_torch"),
            # what CompVis' ldm imports; the tests run against it
            "einops",
            "omegaconf",
        ],
    },
)
