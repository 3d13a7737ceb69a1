from types import SimpleNamespace

import numpy as np
import pytest

from deepfake_core.registry import names, runs
from deepfake_core.registry.connection import connect
from deepfake_core.registry.scores import compare_logged_scores


@pytest.mark.usefixtures("tracking")
def test_a_logged_score_is_the_number_that_was_compared_with_the_threshold():
    """Written as text, 0.1 in float32 is "0.1", which as a float64 is another number, below it."""
    connect()
    score = np.float32(0.1)
    assert float(str(score)) < float(score)
    with runs.open_run("cnn") as run_id:
        runs.log_parameters(run_id, {names.THRESHOLD: float(score)})
        rows = [f"{n},{n},drawn,{n}.jpg,{('real', 'fake')[n % 2]},{score!s}" for n in range(4)]
        runs.log_text(run_id, "\n".join(["sha256,group,source,member,label,score", *rows]), names.SCORES)
    version = SimpleNamespace(version="1", run_id=run_id)
    comparison = compare_logged_scores(version, version)
    assert comparison.challenger.confusion.recall == comparison.challenger.confusion.false_alarm_rate == 1
