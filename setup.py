"""The packages and their data files; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

LISTS = "clip_retrieval.data.annotations"

setup(
    packages=[*find_packages(include=["clip_retrieval*"]), LISTS],
    package_dir={LISTS: "datasets/annotations"},
    package_data={
        "clip_retrieval": ["**/*.csv", "**/*.json", "**/*.yaml", "**/static/*", "**/templates/*"],
        LISTS: ["*.npy", "*.txt"],
    },
)
