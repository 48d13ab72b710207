from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds are the releases the package is written against (transformers 5, trl 1); exact, tested versions of
# everything, indirect dependencies included, are in constraints.txt.
INSTALL_REQUIRES = [
    "accelerate>=1.15",
    "datasets>=5.0,<6",
    "fsspec>=2025.3",
    "huggingface_hub>=2.0,<3",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "numpy>=2.0",
    "pandas>=3.0",
    "psutil>=5.9",
    "pyarrow>=21.0",
    "pyyaml>=6.0.1",
    "safetensors>=0.8",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "tokenizers>=0.23.1,<0.24",  # the range transformers 5.23 accepts
    "torch>=2.9",
    "tqdm>=4.66.3",
    "transformers>=5.20,<6",
    "tzdata>=2024.1",  # time zones where the system has none
    "trl>=1.15,<2",  # DPOTrainer's internals, which alignment/ overrides, move between major versions
]
EXTRAS_REQUIRE = {
    "demo": ["gradio>=6.31,<7"],
    "large": ["duckdb>=1.3"],
    "lora": ["peft>=0.18"],
    "search": ["optuna>=5.0"],
    "serve": ["prometheus_client>=0.21", "starlette>=1.0", "uvicorn>=0.40"],
    "tracking": ["trackio>=0.43,<1"],
    "test": [
        *("duckdb>=1.3", "hypothesis>=6.100", "optuna>=5.0", "peft>=0.18", "prometheus_client>=0.21", "pytest>=8.0"),
        *("pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.17", "starlette>=1.0", "torchao>=0.15"),
        "uvicorn>=0.40",
    ],
}

# The templates live in model_cards/ at the repository's root, scripts and configurations in recipes/; an installed
# wheel carries them inside the package.
TEMPLATES_PACKAGE, RECIPES_PACKAGE = "onerec_hf.model_card_templates", "onerec_hf.recipes"

setup(
    name="onerec_hf",
    version="0.1.0",
    description="OneRec on Hugging Face: a generative recommender, from raw logs to aligned recommendations",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["onerec_hf", "onerec_hf.*"]), TEMPLATES_PACKAGE, RECIPES_PACKAGE],
    package_dir={TEMPLATES_PACKAGE: "model_cards", RECIPES_PACKAGE: "recipes"},
    package_data={TEMPLATES_PACKAGE: ["*.md"], RECIPES_PACKAGE: ["*.yaml", "*/*.yaml"]},
    entry_points={"console_scripts": ["onerec = onerec_hf.command_line:main"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
