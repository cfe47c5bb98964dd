"""Packaging: the requirements live in `requirements/`, the version in `internlm/__init__.py`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
EXTRAS = ("data", "export", "gpu", "tensorboard", "plot", "serve", "web", "eval", "dev")


def requirements(name: str) -> list[str]:
    """The lines of requirements/NAME.txt without comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def version() -> str:
    """Read, not imported: at build time nothing of ours is installed."""
    source = (ROOT / "internlm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found, "internlm/__init__.py has no line __version__ = ..."
    return found.group(1)


extras = {name: requirements(name) for name in EXTRAS}
extras["all"] = sorted({line for name in EXTRAS if name != "dev" for line in extras[name]})

setup(
    name="internlm",
    version=version(),
    description="Trains decoder language models by Hybrid ZeRO, from one CPU to many GPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["internlm", "internlm.*"]),
    package_data={"internlm": ["py.typed", "data/templates/*.jinja", "checkpoint/remote_code/*.in"]},
    install_requires=requirements("runtime"),
    extras_require=extras,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
