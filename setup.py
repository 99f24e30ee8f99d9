"""The one thing that pyproject.toml cannot say: find the rooms, and take two folders in with them.

conf/ and recipes/ stand at the top of the checkout, and inside the package in a wheel.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cfm_train*"]), "cfm_train.conf", "cfm_train.recipes"],
    package_dir={"cfm_train.conf": "conf", "cfm_train.recipes": "recipes"},
)
