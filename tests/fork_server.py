"""What the fork server of `small_retrain` does once, before it forks: it takes seconds that no other process needs."""

from mlflow.utils import requirements_utils

from tests import small_retrain  # noqa: F401

requirements_utils._init_modules_to_packages_map()
