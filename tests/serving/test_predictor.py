"""Faces found and judged: the predictor, its pictures, and `deepfake predict`."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepfake_core.cli import main
from deepfake_core.detector import Detector, resize_image
from deepfake_core.serving.explained import colour_heat
from deepfake_core.serving.faces import Box, fit_crop, load_face_finder
from deepfake_core.serving.predictor import MAX_QUEUED_IMAGES, Predictor
from deepfake_core.training.export import load_network
from tests.builders import copy_former, draw_image, draw_portrait, draw_scene, encode, jpeg, stripes

PEOPLE = {(40, 60): 200, (300, 250): 150, (480, 40): 90}
"""Left and top, and side, of who is in the scene."""


@pytest.fixture(scope="module")
def detector(candidate):
    return Detector(candidate.folder)


@pytest.fixture(scope="module")
def scene():
    return draw_scene({corner: draw_portrait(side, side) for corner, side in PEOPLE.items()})


def test_faces_are_found_largest_first_and_cropped_with_a_training_images_margin(scene):
    found = load_face_finder()(scene)
    assert len(found) == 3
    for face, ((left, top), side) in zip(found, PEOPLE.items(), strict=True):
        assert fit_crop(face, *scene.size).overlap(Box(left, top, left + side, top + side)) > 0.6


def test_of_what_was_cropped_before_all_is_judged():
    find = load_face_finder()
    for seed in range(10):
        portrait = draw_portrait(seed)
        assert fit_crop(find(portrait)[0], *portrait.size) == Box(0, 0, 160, 160)


def test_large_photographs_are_searched_too():
    scene = draw_scene({(1500, 900): draw_portrait(1, 400)}, 3000, 2000)
    (face,) = load_face_finder()(scene)
    assert Box(1500, 900, 1900, 1300).intersect(face) == face


@pytest.mark.sweep
@pytest.mark.slow
def test_the_search_keeps_no_image():
    find, scene, process = load_face_finder(), draw_scene({(100, 100): draw_portrait(1)}, 1024, 1024), psutil.Process()
    memory = []
    for _ in range(100):
        find(scene)
        memory.append(process.memory_info().rss)
    assert memory[-1] - memory[20] < 30_000_000  # one image is 3 MB


@pytest.mark.slow
@pytest.mark.parametrize("side", [600, 1000, 1280, 3000])
def test_faces_that_fill_large_images_are_found_once(side):
    for seed in range(3):
        portrait = draw_portrait(seed).resize((side, side))
        (face,) = load_face_finder()(portrait)
        assert fit_crop(face, side, side) == Box(0, 0, side, side)


@given(st.floats(-50, 900), st.floats(-50, 700), st.floats(4, 900), st.floats(4, 900), st.integers(16, 800))
def test_a_crop_is_a_square_inside_the_image_or_all_of_it(left, top, width, height, side):
    crop = fit_crop(Box(left, top, left + width, top + height), side, side + 40)
    assert crop.intersect(Box(0, 0, side, side + 40)) == crop
    assert crop.right - crop.left == crop.bottom - crop.top or crop == Box(0, 0, side, side + 40)
    assert crop.area > 0


def test_each_face_is_scored_as_its_crop_would_be(detector, scene):
    (judged,) = Predictor(detector).judge([("scene", encode(scene, "PNG"))])
    assert [verdict.face for verdict in judged.verdicts] == [1, 2, 3]
    for verdict in judged.verdicts:
        crop = resize_image(scene.crop(verdict.box), detector.image_size)
        assert verdict.fake_probability == pytest.approx(float(detector.score(crop[None])[0]), abs=1e-6)
        assert verdict.label == detector.label(verdict.fake_probability)


def test_order_is_kept_and_one_bad_image_harms_no_other(detector):
    images = [(str(seed), b"no image" if seed % 50 == 7 else jpeg(seed)) for seed in range(3 * MAX_QUEUED_IMAGES)]
    judged = list(Predictor(detector, detect=False).judge(images))
    assert [one.name for one in judged] == [name for name, _ in images]
    plain = detector.predict([data for _, data in images])
    for one, expected in zip(judged, plain, strict=True):
        (verdict,) = one.verdicts
        assert verdict.error == expected.error
        assert verdict.unreadable == (expected.error is not None)
        if not verdict.unreadable:
            assert verdict.fake_probability == pytest.approx(expected.fake_probability, abs=1e-6)


def test_no_more_images_are_read_than_wait_to_be_scored(detector):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield str(read), jpeg(read % 5)

    judged = Predictor(detector, detect=False).judge(endless())
    for _ in range(100):
        next(judged)
    judged.close()
    assert read <= 100 + 3 * MAX_QUEUED_IMAGES


def test_no_face_is_said_and_is_not_unreadable(detector):
    (judged,) = Predictor(detector).judge([("wall", jpeg(1, 200))])
    (verdict,) = judged.verdicts
    assert (verdict.label, verdict.fake_probability, verdict.unreadable) == (None, None, False)
    assert "no face was found" in verdict.describe()


def test_pictures_show_the_heat_inside_the_boxes_alone(detector, scene):
    (judged,) = Predictor(detector).judge([("scene", encode(scene, "PNG"))], explain=True)
    assert judged.picture.width == scene.width
    assert judged.picture.height > scene.height
    changed = (np.asarray(judged.picture)[: scene.height] != np.asarray(scene)).any(axis=2)
    inside = np.zeros(changed.shape, bool)
    for left, top, right, bottom in (verdict.box for verdict in judged.verdicts):
        inside[top:bottom, left:right] = True
        assert changed[top:bottom, left:right].mean() > 0.9
    assert not changed[~inside].any()


def test_the_heats_colours_rise_from_black_to_yellow():
    colours = np.asarray(colour_heat(np.linspace(0, 1, 100)[None]))[0]
    assert colours[0].tolist() == [0, 0, 4]
    assert colours[-1].tolist() == [252, 255, 164]
    assert (np.diff(colours.astype(int).sum(axis=1)) >= 0).all()


@pytest.fixture
def folder(tmp_path, scene):
    (tmp_path / "in" / "below").mkdir(parents=True)
    scene.save(tmp_path / "in" / "scene.png")
    draw_portrait(3).save(tmp_path / "in" / "below" / "scene.jpg", quality=95)
    draw_image(1, 100).save(tmp_path / "in" / "wall.webp")
    (tmp_path / "in" / "notes.txt").write_text("notes")
    return tmp_path / "in"


def read_json(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_a_glob_and_files_give_the_same_rows(candidate, folder, capsys):
    model = ["--json", "--model", str(candidate.folder)]
    assert main(["predict", str(folder), *model]) == 0
    out, err = capsys.readouterr()
    rows = read_json(out)
    assert [(row["image"].removeprefix(str(folder)), row["face"]) for row in rows] == [
        ("/below/scene.jpg", 1),
        ("/scene.png", 1),
        ("/scene.png", 2),
        ("/scene.png", 3),
        ("/wall.webp", None),
    ]
    assert f"Skipped 1 that are neither image nor clip: {folder / 'notes.txt'}" in err
    assert main(["predict", str(folder / "**" / "*.[jpw]*"), *model]) == 0
    assert read_json(capsys.readouterr().out) == rows
    files = [str(folder / name) for name in ("below/scene.jpg", "scene.png", "wall.webp")]
    assert main(["predict", *files, *model]) == 0
    assert read_json(capsys.readouterr().out) == rows


@pytest.mark.process
def test_standard_input_is_an_image_or_names(candidate, folder, tmp_path):
    def predict(data: bytes):
        command = [sys.executable, "-m", "deepfake_core.cli", "predict", "-", "--json", "--model", candidate.folder]
        return read_json(subprocess.run(command, input=data, capture_output=True, check=True).stdout.decode())

    file = folder / "below" / "scene.jpg"
    (row,) = predict(file.read_bytes())
    assert row["image"] == "standard input"
    (named,) = predict(f"{file}\n\n".encode())
    assert named == {**row, "image": str(file)}
    assert not list(tmp_path.glob("standard*"))


def test_csv_has_a_column_per_field(candidate, folder, capsys):
    assert main(["predict", str(folder / "scene.png"), "--csv", "--model", str(candidate.folder)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["face"] for row in rows] == ["1", "2", "3"]
    assert len(rows[0]["box"].split()) == 4
    assert 0 <= float(rows[0]["fake_probability"]) <= 1


def test_the_table_names_an_image_once_and_counts_outcomes(candidate, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["predict", str(folder), "--model", str(candidate.folder)])
    out = capsys.readouterr().out
    assert out.count("scene.png") == 1
    assert "no face was found" in out
    assert "1 no face" in out
    assert "Fake from 0.5 up." in out
    assert "not sure" not in out  # a model without bounds does not say


@pytest.fixture
def bounded(candidate, tmp_path):
    """Return a model that says where it is sure and what its threshold meant; of images from 100 pixels up."""
    model = Path(shutil.copytree(candidate.folder, tmp_path / "bounded"))
    description = json.loads((model / "detector.json").read_text())
    description |= {"bounds": {"lower": 0.5, "upper": 0.5, "max_error": 0.05}, "limits": {"side": 100}}
    table = [[0.01, 0.9, 1.0], [0.5, 0.07, 0.71], [0.9, 0.01, 0.3]]
    description["rates"] = {"drawn": False, "parts": [{"name": "", "reals": 100, "fakes": 100, "table": table}]}
    (model / "detector.json").write_text(json.dumps(description))
    return model


def test_what_is_not_sure_says_why(bounded, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for number, (image, name) in enumerate(zip(stripes(2, 5).pixels, ("dark", "bright"), strict=True)):
        Image.fromarray(image).resize((100 - number, 100)).save(folder / f"{name}.png")
    files = [str(folder / f"{name}.png") for name in ("dark", "bright")]
    options = ["--model", str(bounded), "--no-detect"]
    assert main(["predict", *files, *options, "--json"]) == 0
    dark, bright = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (dark["label"], dark["sure"], dark["reason"]) == ("real", True, None)
    assert (bright["label"], bright["sure"]) == ("fake", False)
    assert "shorter side of 99 pixels; calibrated on 100 and more" in bright["reason"]
    assert main(["predict", *files, *options]) == 0
    out = capsys.readouterr().out
    assert "fake?" in out
    assert "1 of the verdicts are not sure" in out
    assert "of 100 real ones about 7 (3 to 14) were called fake, and of 100 fakes about 71 (61 to 79) were found" in out
    assert main(["predict", *files, *options, "--fail-on", "unsure"]) == 1
    assert main(["predict", files[0], *options, "--fail-on", "unsure", "--fail-on", "fake"]) == 0


def test_a_model_that_can_not_say_whether_it_is_sure_is_no_gate(candidate, folder, capsys):
    assert main(["predict", str(folder / "scene.png"), "--fail-on", "unsure", "--model", str(candidate.folder)]) == 2
    assert "For --fail-on unsure, a model must say which verdicts are sure." in capsys.readouterr().err


def test_another_threshold_says_what_it_meant(bounded, folder, capsys):
    options = ["--model", str(bounded), "--no-detect", str(folder / "scene.png")]
    assert main(["predict", *options, "--threshold", "0"]) == 0
    assert "1 fake" in capsys.readouterr().out
    assert main(["predict", *options, "--threshold", "0.95"]) == 0
    assert "of 100 real ones about 1 (0 to 5) were called fake, and of 100 fakes about 30 (" in capsys.readouterr().out
    assert main(["predict", *options, "--threshold", "0.95", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["threshold"] == 0.95
    assert "Fake from 0.95 up. On test images, with fake from 0.9 up, of 100 real ones about 1 (0 to 5)" in said.err
    assert main(["predict", *options, "--threshold", "0.005"]) == 0
    assert "Fake from 0.005 up. What this meant on test images is not known." in capsys.readouterr().out
    assert main(["predict", *options, "--threshold", "1.5"]) == 2
    assert "--threshold must be a number from 0 to 1. Received: 1.5" in capsys.readouterr().err


def test_names_are_shown_as_they_are(candidate, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "[").mkdir()
    names = ["[bold]face.png", "[/red].png"]  # rich would take these for markup
    for name in names:
        draw_portrait(1).save(tmp_path / name)
    main(["predict", *(str(tmp_path / name) for name in names), "--model", str(candidate.folder)])
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]])
def test_a_name_that_is_no_text_is_shown_and_stops_no_other(tmp_path, capsys, monkeypatch, form):
    monkeypatch.setenv("COLUMNS", "300")
    names = [os.fsencode(tmp_path) + name for name in (b"/a.jpg", b"/b\xff.jpg", b"/c.jpg", b"/d\xfe.txt")]
    for number, name in enumerate(names[:3]):
        Path(os.fsdecode(name)).write_bytes(jpeg(number))
    Path(os.fsdecode(names[3])).write_text("words")
    model = ["--no-detect", "--model", str(copy_former(tmp_path / "model")), *form]
    for arguments in ([str(tmp_path / "*.jpg")], [os.fsdecode(name) for name in names[:3]], ["-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(names[:3]))))
        assert main(["predict", *arguments, *model]) == 0
        shown = capsys.readouterr().out.replace("\\\\", "\\")  # as JSON has it
        assert all(f"{tmp_path}/{name}" in shown for name in ("a.jpg", "b\\xff.jpg", "c.jpg"))


def test_bytes_beyond_the_limit_are_refused(detector, monkeypatch, tmp_path):
    monkeypatch.setattr("deepfake_core.serving.predictor.MAX_BYTES", 100)
    (tmp_path / "large.jpg").write_bytes(jpeg(1))
    images = [("bytes", jpeg(1)), ("file", tmp_path / "large.jpg")]
    for judged in Predictor(detector, detect=False).judge(images):
        assert judged.verdicts[0].error == "may hold 100 bytes at most"


def test_the_exit_status_tells_fakes_and_unreadable_images(candidate, folder, capsys):
    model = ["--model", str(candidate.folder), "--no-detect"]
    for image, name in zip(stripes(2, 5).pixels, ("dark", "bright"), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")  # what the small model learned to call real, and fake
    assert main(["predict", str(folder / "bright.png"), "--fail-on", "fake", *model]) == 1
    assert main(["predict", str(folder / "dark.png"), "--fail-on", "fake", *model]) == 0
    assert main(["predict", str(folder / "bright.png"), *model]) == 0
    (folder / "words.jpg").write_text("words")
    capsys.readouterr()
    assert main(["predict", str(folder / "words.jpg"), str(folder / "dark.png"), "--csv", *model]) == 2
    assert f"{folder / 'words.jpg'}: must be a JPEG, PNG or WebP image" in capsys.readouterr().err


def test_an_error_of_ours_is_not_told_as_a_fake(candidate, folder, capsys, monkeypatch):
    monkeypatch.setattr(Predictor, "judge", lambda *_, **__: 1 / 0)
    assert main(["predict", str(folder), "--model", str(candidate.folder), "--fail-on", "fake"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_pictures_of_equal_names_are_all_kept(candidate, folder, tmp_path):
    main(["predict", str(folder), "--explain", str(tmp_path / "out"), "--model", str(candidate.folder)])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "scene-2.explained.png",
        "scene.explained.png",
        "wall.explained.png",
    ]


@pytest.mark.slow
def test_a_model_from_before_heat_maps_judges_but_explains_nothing(candidate, folder, tmp_path, capsys):
    shutil.copytree(candidate.folder, tmp_path / "old")
    network = load_network(candidate.folder)
    network(np.zeros((1, *network.input_shape[1:]), np.float32))
    network.export(tmp_path / "old" / "model.onnx", format="onnx", verbose=False)
    assert main(["predict", str(folder), "--model", str(tmp_path / "old")]) == 0
    assert main(["predict", str(folder), "--model", str(tmp_path / "old"), "--explain", str(tmp_path / "out")]) == 2
    assert "must have heat maps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_names_nothing_is_said(candidate, tmp_path, capsys):
    model = ["--model", str(candidate.folder)]
    assert main(["predict", str(tmp_path), *model]) == 2
    assert "which holds none" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "*.jpg"), *model]) == 2
    assert "matches none" in capsys.readouterr().err


def test_an_empty_name_is_not_the_current_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["predict", "", "scene.png"]) == 2
    assert "An image must have a name. Received: an empty one." in capsys.readouterr().err


def test_nothing_to_judge_is_no_success(candidate, folder, capsys, monkeypatch):
    model = ["--model", str(candidate.folder), "--fail-on", "fake"]
    assert main(["predict", str(folder.parent / "i*"), *model]) == 2  # a folder, which a glob does not open
    assert "No images given" in capsys.readouterr().err
    for data, status, words in ((b"", 2, "No images given"), (b"a\0b.jpg\n", 2, "must be a JPEG, PNG or WebP image")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["predict", "-", "--json", *model]) == status
        assert words in capsys.readouterr().err


def test_what_can_not_be_written_or_loaded_is_no_verdict(candidate, folder, tmp_path, capsys):
    image = str(folder / "scene.png")
    assert main(["predict", image, "--model", str(candidate.folder), "--explain", image]) == 2
    assert "--explain must be a folder" in capsys.readouterr().err
    shutil.copytree(candidate.folder, tmp_path / "damaged")
    for damage in (lambda file: file.write_bytes(b"damaged"), lambda file: file.unlink()):
        damage(tmp_path / "damaged" / "model.onnx")
        assert main(["predict", image, "--model", str(tmp_path / "damaged")]) == 2
        assert "Pull it again" in capsys.readouterr().err
