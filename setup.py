import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "tomesd/__init__.py").read_text(encoding="utf-8"))[1]
# What the commands `generate` and `generate-4k` need, and then `bench`, `plot` and `quality`.
diffusers = [
    *("diffusers>=0.30", "transformers>=4.40", "accelerate>=0.30", "safetensors>=0.4"),
    *("pillow", "matplotlib"),
]
bench = [*diffusers, "tqdm", "scikit-image"]
app = [*diffusers, "gradio>=6"]
vit = ["timm>=1.0", "torchvision", "transformers>=5", "tqdm", "pillow"]

setup(
    name="tomesd",
    version=version,
    description="Token merging: makes Stable Diffusion faster and lighter by merging similar tokens",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["tomesd", "tomesd.*"]),
    package_data={"tomesd": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.1"],
    extras_require={
        "diffusers": diffusers,
        "bench": bench,
        "app": app,
        "vit": vit,
        "xformers": ["xformers"],
        "dev": [
            *bench,
            *vit,
            "peft",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            # for scripts/
            *("fonttools", "onnx"),
            *("onnxruntime", "open_clip_torch"),
            # what CompVis' ldm imports; the tests run against it
            "einops",
            "omegaconf",
        ],
    },
)
