"""The detector as MLflow loads it; MLflow copies this file and the model's own code into each version.

Input: a column `image` of encoded bytes (JPEG, PNG, WebP), or of the same as base64 or a data URL. Output: `label`,
`fake_probability`, `threshold`, `sure`, `reason`, `error` per row. The parameter `threshold` replaces the model's own.
It takes no paths and no addresses.
"""

import base64
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

HERE = Path(__file__).parent
CODE = HERE / "code" if (HERE / "code").is_dir() else HERE  # in a registered version; while it is being logged


def import_detector() -> Any:
    """Import `Detector` from the files beside this one, as a package of which this process knows no name.

    As modules of their names, two versions in one process, or another `detector` there, would share what came first.
    """
    package = types.ModuleType(f"deepfake_{uuid4().hex}")
    package.__path__ = [str(CODE)]
    sys.modules[package.__name__] = package
    try:
        return importlib.import_module(f"{package.__name__}.detector").Detector
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


Detector = import_detector()


FORMS = "must be an image as bytes, base64 or a base64 data URL, not a path, an address or nothing"


def decode_text(value: Any) -> Any:
    """Return the bytes that a text holds as base64, of either alphabet, or as a data URL; None if it holds none."""
    if not isinstance(value, str):
        return value if isinstance(value, bytes | bytearray | memoryview) else None
    if value[:5].lower() == "data:":
        value = re.sub(r'^data:(?:"[^"]*"|[^,"])*;base64,', "", unquote(value), flags=re.IGNORECASE)
    text = re.sub(r"\s|=+\s*$", "", value)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None


class DeepfakeDetector(PythonModel):
    """Judge encoded images; a row that can't be read gets an error and doesn't affect the others."""

    def load_context(self, context: PythonModelContext) -> None:
        self._detector = Detector(context.artifacts["detector"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        del context  # MLflow's signature
        threshold = (params or {}).get("threshold")
        detector = self._detector if threshold is None else self._detector.at(float(threshold))
        images = [decode_text(image) for image in model_input["image"]]
        predictions = detector.predict(images)
        return pd.DataFrame(
            {
                "label": [prediction.label for prediction in predictions],
                "fake_probability": [prediction.fake_probability for prediction in predictions],
                "threshold": [prediction.threshold for prediction in predictions],
                "sure": [prediction.sure for prediction in predictions],
                "reason": [prediction.reason for prediction in predictions],
                "error": [
                    FORMS if image is None else prediction.error
                    for image, prediction in zip(images, predictions, strict=True)
                ],
            },
            dtype=object,  # what is missing stays None, which the scoring server writes as null, not as NaN
        )


set_model(DeepfakeDetector())
