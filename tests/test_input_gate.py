"""What is measured of an image before a verdict on it can be sure."""

import numpy as np
import pytest
from PIL import ImageEnhance, ImageFilter

from deepfake_core.detector import decode_image, resize_image
from deepfake_core.input_gate import (
    MEASURES,
    ImageQuality,
    estimate_jpeg_quality,
    find_reason,
    fit_limits,
    measure_saturation,
    measure_sharpness,
    read_jpeg_quality,
)
from tests.builders import draw_portrait, encode


@pytest.mark.parametrize("quality", [30, 50, 75, 90, 95, 100])
def test_a_jpegs_quality_is_the_one_it_was_written_at(quality):
    image = decode_image(encode(draw_portrait(1), quality=quality))
    assert read_jpeg_quality(image) == pytest.approx(quality, abs=1)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_what_is_no_jpeg_has_no_quality(form):
    assert read_jpeg_quality(decode_image(encode(draw_portrait(1), form))) is None
    assert estimate_jpeg_quality([300] * 64) is None  # of 16 bits, which libjpeg writes at no quality


@pytest.mark.parametrize("seed", range(5))
def test_blur_and_scaling_up_lower_the_sharpness_and_brightness_does_not(seed):
    portrait = draw_portrait(seed, 256)
    sharp = measure_sharpness(np.asarray(portrait))
    blurred = [measure_sharpness(np.asarray(portrait.filter(ImageFilter.GaussianBlur(radius)))) for radius in (1, 2, 4)]
    scaled = [measure_sharpness(resize_image(portrait.resize((side, side)), 256)) for side in (128, 64, 32)]
    for values in (blurred, scaled):
        assert sharp > values[0] > values[1] > values[2]
    assert measure_sharpness((np.asarray(portrait) // 2 + 60).astype(np.uint8)) == pytest.approx(sharp, rel=0.05)
    assert measure_sharpness(np.zeros((8, 8, 3), np.uint8)) == 0


def test_of_100_images_one_lies_below_each_limit():
    qualities = [
        ImageQuality(200 + number, 0.1 + number / 1000, 50 + number / 4, number / 200) for number in range(100)
    ]
    limits = fit_limits(qualities)
    assert set(limits) == set(MEASURES)
    for name, limit in limits.items():
        assert sum(getattr(one, name) < limit for one in qualities) == 1
    assert fit_limits([ImageQuality(64, 0.2)]) == {"side": 64, "sharpness": 0.2}  # no JPEG, no limit
    assert fit_limits([]) == {}


def test_the_reason_says_what_is_unlike_the_calibration_images():
    limits = {"side": 200, "sharpness": 0.1, "jpeg_quality": 60, "saturation": 0.05}
    assert find_reason(ImageQuality(200, 0.1, 60), limits) is None
    assert find_reason(ImageQuality(200, 0.1), limits) is None
    assert "shorter side of 150 pixels" in find_reason(ImageQuality(150, 0.1, 60), limits)
    assert "blurred or scaled up, sharpness 0.050" in find_reason(ImageQuality(200, 0.05, 60), limits)
    assert "JPEG quality 40" in find_reason(ImageQuality(200, 0.1, 40), limits)
    assert "grey or nearly so, saturation 0.010" in find_reason(ImageQuality(200, 0.1, None, 0.01), limits)
    assert find_reason(ImageQuality(200, 0.1, None, 0.05), limits) is None


def test_saturation_is_none_of_grey_and_all_of_a_pure_colour():
    assert measure_saturation(np.full((4, 4, 3), 90, np.uint8)) == 0
    assert measure_saturation(np.tile(np.uint8([255, 0, 0]), (4, 4, 1))) == 1
    portrait = draw_portrait(1)
    values = [
        measure_saturation(np.asarray(ImageEnhance.Color(portrait).enhance(factor))) for factor in (0, 0.3, 0.6, 1)
    ]
    assert values[0] == 0
    assert values == sorted(values)
