"""1,000 images with a bit flipped, of 20 kinds: each is used or refused, alike by training and by serving."""

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deepfake_core.config import Source
from deepfake_core.data.index import build_index
from deepfake_core.data.local import open_local
from deepfake_core.serving.predictor import Predictor, load_detector
from deepfake_core.storage.store import open_store
from tests.builders import FORMER, draw_image, encode, mpo, write_zip

pytestmark = pytest.mark.sweep

FLIPS = 50
"""Of each kind."""

HEADER_BYTES = 400
"""Half of the flips are among the first bytes, which say what follows."""

MAX_SECONDS = 10
"""Of CPU for an image: a flip can make one of 96 pixels a side say that it has 7,000."""

PICTURE = draw_image(1, 96, cells=24)
TURNED = Image.Exif()
TURNED[0x0112] = 6
FRAMES = {"save_all": True, "append_images": [draw_image(seed, 96) for seed in (2, 3)]}

KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(PICTURE, quality=90),
    "jpeg-coarse": lambda: encode(PICTURE, quality=20),
    "jpeg-full-colour": lambda: encode(PICTURE, quality=90, subsampling=0),
    "jpeg-optimised": lambda: encode(PICTURE, optimize=True),
    "jpeg-restarts": lambda: encode(PICTURE, restart_marker_blocks=4),
    "jpeg-progressive": lambda: encode(PICTURE, progressive=True),
    "jpeg-grey": lambda: encode(PICTURE.convert("L")),
    "jpeg-cmyk": lambda: encode(PICTURE.convert("CMYK")),
    "jpeg-turned": lambda: encode(PICTURE, exif=TURNED),
    "mpo": lambda: mpo(PICTURE),
    "png": lambda: encode(PICTURE, "PNG"),
    "png-alpha": lambda: encode(PICTURE.convert("RGBA"), "PNG"),
    "png-palette": lambda: encode(PICTURE.quantize(64), "PNG", transparency=0),
    "png-bilevel": lambda: encode(PICTURE.convert("1"), "PNG"),
    "png-16-bit": lambda: encode(Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 256), "PNG"),
    "png-animated": lambda: encode(PICTURE, "PNG", **FRAMES),
    "webp": lambda: encode(PICTURE, "WEBP"),
    "webp-lossless": lambda: encode(PICTURE, "WEBP", lossless=True),
    "webp-alpha": lambda: encode(PICTURE.convert("RGBA"), "WEBP", exif=TURNED),
    "webp-animated": lambda: encode(PICTURE, "WEBP", **FRAMES),
}

make = cache(lambda kind: KINDS[kind]())


def flip(kind: str, number: int) -> bytes:
    """Flip one bit of an image, by a seed that kind and number give."""
    data = bytearray(make(kind))
    random = np.random.default_rng([list(KINDS).index(kind), number])
    position = random.integers(min(HEADER_BYTES, len(data)) if number % 2 else len(data))
    data[position] ^= 1 << random.integers(8)
    return bytes(data)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(load_detector(FORMER), detect=False)


@pytest.fixture(scope="module")
def find_row(tmp_path_factory) -> Callable[[str, int], pd.Series]:
    """Return a function that gives a flipped image's row; a kind's images are indexed together."""

    @cache
    def index(kind: str) -> pd.DataFrame:
        folder = tmp_path_factory.mktemp(kind)
        members = {f"real/{number:02}.jpg": flip(kind, number) for number in range(FLIPS)}
        members["real/whole.jpg"] = make(kind)  # of PNGs with their checksums, no flipped one can be used
        archive = open_local(Source(name=str(write_zip(folder / "a.zip", members))), open_store(folder / "data"))
        started = time.process_time()
        rows = build_index(archive, open_store(folder / "data")).set_index("member")
        assert time.process_time() - started < MAX_SECONDS * FLIPS
        assert len(rows) == FLIPS + 1
        assert rows.loc["real/whole.jpg", "reason"] == ""
        return rows

    return lambda kind, number: index(kind).loc[f"real/{number:02}.jpg"]


@pytest.mark.parametrize("number", range(FLIPS))
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_with_a_bit_flipped_is_used_or_refused(predictor, find_row, kind, number):
    started = time.process_time()
    (judged,) = predictor.judge([("flipped", flip(kind, number))])
    assert time.process_time() - started < MAX_SECONDS
    (verdict,) = judged.verdicts
    row = find_row(kind, number)
    assert (verdict.label is None) == bool(verdict.error) == bool(row["reason"]), (row["reason"], verdict.error)
    if verdict.label:
        assert 0 <= verdict.fake_probability <= 1
        assert (row["width"] > 0, row["height"] > 0, len(row["hash"])) == (True, True, 32)
