"""What is measured on the test split: robustness, file facts, held-out sources, heat maps, and the report of it all."""

import re
import shutil
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from deepfake_core.config import EvaluationParameters, PromotionParameters
from deepfake_core.data.images import Images, load_same, load_seen
from deepfake_core.data.shortcuts import score_file_facts
from deepfake_core.detector import Detector, call_fake
from deepfake_core.errors import ConfigurationError, ModelError
from deepfake_core.evaluation import robustness
from deepfake_core.evaluation.promotion import Scored, compare_scores, decide_promotion, measure_cost
from deepfake_core.evaluation.regression import Regression, ReportedImage
from deepfake_core.evaluation.robustness import measure_robustness
from deepfake_core.evaluation.test_split import evaluate_on_test, find_trained_on
from deepfake_core.models import CANDIDATES
from deepfake_core.registry.challenge import Outcome
from deepfake_core.reports import plots
from deepfake_core.reports.model_report import ModelFacts, list_warnings, render_report, write_model_card
from deepfake_core.training.export import check_parity, load_network
from deepfake_core.training.heat_map import ExplainedNetwork
from tests.builders import SIZE, draw_image, encode, faces, prepare, stripes, write_zip


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    pictures = faces(30, start=900)
    first = write_zip(folder / "first.zip", faces(40))
    second = write_zip(folder / "second.zip", pictures)
    return prepare(folder, first, second)


def test_a_selection_reads_what_it_is_asked_for():
    images = stripes(20, 0)
    mask = np.arange(20) % 3 == 1
    chosen = images.select(mask)
    assert len(chosen) == len(chosen.pixels) == 7
    assert chosen.pixels.shape == (7, SIZE, SIZE, 3)
    assert np.array_equal(chosen.pixels[2:5], images.pixels[mask][2:5])
    assert np.array_equal(chosen.select(np.arange(7) > 4).pixels[np.arange(2)], images.pixels[mask][5:])
    assert images.select(np.ones(20, bool)) is images


@pytest.mark.slow
def test_held_out_sources_are_only_tested(two_sources, candidate):
    for split in ("train", "val", "test"):
        assert set(load_seen(two_sources, split, SIZE, ["second"]).rows["source"]) == {"first"}
    result = evaluate_on_test(candidate.folder, two_sources, ["second"])
    assert set(result.images.rows["source"]) == {"first"}
    assert result.unseen["second"].confusion.total == 60
    assert result.evaluation.confusion.total == len(result.images)
    with pytest.raises(ConfigurationError, match=r"Received: third; the data set has first, second"):
        load_seen(two_sources, "train", SIZE, ["third"])
    with pytest.raises(ConfigurationError, match="leave one to train on"):
        load_seen(two_sources, "train", SIZE, ["first", "second"])


def test_the_same_images_are_found_at_another_size(two_sources):
    mine = load_seen(two_sources, "test", SIZE, ["second"])
    same = load_same(two_sources, mine, 16)
    assert same.rows["sha256"].tolist() == mine.rows["sha256"].tolist()
    assert same.pixels.shape[1] == 16


def manifest_of(rows):
    return pd.DataFrame(rows, columns=["sha256", "group", "split", "kept"])


def test_images_that_production_learned_are_found_by_their_groups():
    production = manifest_of(
        [
            ("a", "a", "train", True),
            ("a2", "a", "", False),  # a copy that was left out
            ("v", "v", "val", True),
            ("t", "t", "test", True),
        ]
    )
    now = manifest_of(
        [
            ("a", "a", "train", True),
            ("n1", "a", "test", True),  # a new near copy of what was trained on
            ("n2", "n2", "test", True),
            ("v", "v", "test", True),
            ("t", "t", "test", True),
            ("a2", "a2", "test", True),
        ]
    )
    test = now[now["split"] == "test"]
    seen = find_trained_on(test, now, production)
    assert dict(zip(test["sha256"], seen, strict=True)) == {
        "n1": True, "n2": False, "v": True, "t": False, "a2": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_each_change_changes_the_image_more_the_stronger_it_is(name):
    image = draw_image(3, size=128, cells=40)
    change, strengths = robustness.CHANGES[name]
    before = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), float)
    distances = [
        np.abs(np.asarray(change(image, strength).resize((64, 64), Image.Resampling.BILINEAR), float) - before).mean()
        for strength in strengths
    ]
    assert min(distances) > 0.05
    if name not in ("brightness", "contrast", "colour") and not name.startswith("screenshot"):  # which go both ways
        assert distances == sorted(distances)
    assert np.array_equal(np.asarray(change(image, strengths[0])), np.asarray(change(image, strengths[0])))


def test_large_images_are_scaled_down_before_they_are_changed(monkeypatch, candidate):
    """A change of 50 million pixels would take 4 GB, in each thread."""
    seen = []

    def keep(image, strength):  # noqa: ARG001 - the signature of a change
        seen.append(image.size)
        return image

    monkeypatch.setattr(robustness, "CHANGES", {"none": (keep, (1,))})
    files = {
        "large": encode(draw_image(1, size=2000).crop((0, 0, 2000, 1500))),
        "small": encode(draw_image(2, size=300)),
    }
    scores = robustness.score_changed(Detector(candidate.folder), list(files), files.__getitem__)
    assert sorted(seen) == [(300, 300), (1024, 768)]
    assert scores["none", 1].shape == (2,)


@pytest.mark.slow
def test_robustness_compares_with_the_same_images_unchanged(two_sources, candidate):
    result = evaluate_on_test(candidate.folder, two_sources)
    progress = []
    table = measure_robustness(
        candidate.folder, two_sources, result, 10, on_progress=lambda done, total: progress.append((done, total))
    )
    assert len(table) == sum(len(strengths) for _, strengths in robustness.CHANGES.values())
    assert set(table["images"]) == {10}
    assert progress[-1] == (10, 10)
    clean = table["auc"] + table["auc_lost"]
    assert clean.max() == pytest.approx(clean.min())
    unchanged = np.sort(np.random.default_rng(0).permutation(len(result.images))[:10])
    alarms = call_fake(result.scores[unchanged], result.threshold)[result.images.labels[unchanged] == 0].mean()
    assert (table["false_alarm_rate"] - table["false_alarms_added"]).tolist() == pytest.approx([alarms] * len(table))
    assert measure_robustness(candidate.folder, two_sources, result, 0).empty


@pytest.mark.process  # joblib counts cores
def test_file_facts_alone_are_found_out():
    random = np.random.default_rng(0)
    labels = np.where(np.arange(300) % 2, "fake", "real")
    rows = pd.DataFrame(
        {
            "label": labels, "width": 256, "height": 256, "bytes": random.integers(9000, 11000, 300), "format": "JPEG",
            "jpeg_table": np.where((labels == "fake") & (random.random(300) < 0.8), "q75", "q90"),
        }
    )  # fmt: skip
    colours = random.uniform(90, 160, (300, 3))
    fake = labels[200:] == "fake"
    told = score_file_facts(rows[:200], colours[:200], rows[200:], colours[200:])
    assert told[fake].mean() > told[~fake].mean() + 0.4
    plain = rows.assign(jpeg_table="q90")
    guessed = score_file_facts(plain[:200], colours[:200], plain[200:], colours[200:])
    assert abs(guessed[fake].mean() - guessed[~fake].mean()) < 0.15


@pytest.mark.slow
def test_heat_lies_where_the_evidence_is():
    """Train a network to tell whether a white square is there, and see whether the heat lies on the square."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 60, (160, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(160) % 2
    corners = random.integers(0, 22, (160, 2))
    for image, label, (top, left) in zip(pixels, labels, corners, strict=True):
        if label:
            image[top : top + 10, left : left + 10] = 255
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy")
    model.fit(pixels, labels, epochs=25, verbose=0)
    fakes = np.flatnonzero(labels)[:40]
    _, heat = (np.asarray(output) for output in ExplainedNetwork(model)(pixels[fakes].astype(np.float32)))
    assert heat.shape == (40, 16, 16)
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in heat]
    inside = [
        top - 2 <= 2 * row <= top + 12 and left - 2 <= 2 * column <= left + 12
        for (row, column), (top, left) in zip(peaks, corners[fakes], strict=True)
    ]
    assert np.mean(inside) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CANDIDATES)
def test_heat_is_grad_cam_as_automatic_differentiation_gives_it(architecture):
    recipe = CANDIDATES[architecture].RECIPE.model_copy(update={"image_size": 64, "weights": "none"})
    keras.utils.set_random_seed(0)
    model = CANDIDATES[architecture].build(recipe)
    pixels = stripes(3, 0).pixels.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32)
    scores, heat = ExplainedNetwork(model)(pixels)
    assert np.allclose(scores, model(pixels), atol=1e-6)

    features = tf.convert_to_tensor(pixels)
    chain = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    last = max(position for position, layer in enumerate(chain) if len(layer.output.shape) == 4)
    for layer in chain[: last + 1]:
        features = layer(features, training=False)
    with tf.GradientTape() as tape:
        tape.watch(features)
        *head, output = chain[last + 1 :]
        logit = features
        for layer in head:
            logit = layer(logit, training=False)
        logit = logit @ output.kernel + output.bias  # a sigmoid that is 0 or 1 to float32's last bit has none
    assert np.allclose(scores, tf.sigmoid(logit), atol=1e-6)
    weights = tf.reduce_mean(tape.gradient(logit, features), axis=(1, 2), keepdims=True)
    expected = tf.reduce_sum(features * weights, axis=-1).numpy()
    assert np.abs(expected).max() > 0
    # but for a factor: pooling shares each channel's slope among the positions
    assert np.corrcoef(np.ravel(heat), expected.ravel())[0, 1] > 0.9999
    factor = np.abs(expected).max() / np.abs(heat).max()
    assert np.allclose(heat * factor, expected, atol=1e-3 * np.abs(expected).max())


def test_the_heat_map_shows_the_evidence_for_the_verdict(candidate):
    detector = Detector(candidate.folder)
    images = stripes(80, 3)
    scores, heat = detector.explain(images.pixels)
    assert np.allclose(scores, detector.score(images.pixels))

    _, signed = ExplainedNetwork(load_network(candidate.folder))(images.pixels.astype(np.float32))
    verdicts = np.where(call_fake(scores, detector.threshold), 1, -1)
    assert set(verdicts) == {-1, 1}
    evidence = np.maximum(np.asarray(signed) * verdicts[:, None, None], 0)
    expected = evidence / evidence.max(axis=(1, 2), keepdims=True)
    assert heat.dtype == np.float32
    assert np.allclose(heat, expected, atol=1e-3)
    assert expected.std(axis=(1, 2)).max() > 0.1  # an even map would not do


@pytest.mark.slow
def test_a_model_that_is_served_otherwise_than_trained_is_refused(candidate, tmp_path):
    images = stripes(250, 3)
    assert check_parity(candidate.folder, images) < 1e-5
    shutil.copytree(candidate.folder, tmp_path / "changed")
    network = load_network(tmp_path / "changed")
    kernel, bias = network.layers[-1].get_weights()
    network.layers[-1].set_weights([kernel * 1.1, bias])
    network.save(tmp_path / "changed" / "checkpoint.keras")
    with pytest.raises(ModelError, match=r"less than 0.001 apart.*200 images"):
        check_parity(tmp_path / "changed", images)


def test_a_model_that_gives_no_numbers_is_refused(candidate, monkeypatch):
    monkeypatch.setattr(Detector, "score", lambda _, images: np.full(len(images), np.nan, np.float32))
    images = stripes(8, 3)
    reals = Images(
        images.pixels[images.labels == 0], images.labels[images.labels == 0], images.rows[images.labels == 0]
    )
    with pytest.raises(ModelError, match="Received: nan apart"):
        check_parity(candidate.folder, reals)


def make_report(dataset, folder, regression=None, bounds=None):
    result = evaluate_on_test(folder, dataset)
    table = measure_robustness(folder, dataset, result, 8)
    labels, rows = result.images.labels, result.images.rows
    compared = compare_scores(labels, rows, Scored(result.scores, 0.5), Scored(1 - result.scores, 0.5))
    cost = measure_cost(Detector(folder))
    decision = decide_promotion(
        result.evaluation, compared, cost, PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)
    )
    facts = ModelFacts(
        name="deepfake-detector",
        version="7",
        architecture="cnn",
        run="r1",
        commit="c1",
        seed=3,
        temperature=1.5,
        bounds=bounds,
        cost=cost,
        evaluation=EvaluationParameters(),
        candidates=pd.DataFrame([{"candidate": "cnn", "AUC": "0.9"}]),
        settings={"training.epochs": "<script>alert(1)</script>"},
    )
    figures = {"Calibration": plots.plot_reliability(labels, result.scores)}
    outcome = Outcome(decision, compared, "5", cost, regression or Regression())
    page = render_report(facts, dataset, result, table, outcome, figures, {})
    return page, write_model_card(facts, dataset, result, decision, table), result, decision


@pytest.mark.slow
def test_the_report_says_the_verdict_first_and_fetches_nothing(two_sources, candidate):
    bounds = {"lower": 0.0, "upper": 0.87, "max_error": 0.05}
    page, card, result, decision = make_report(two_sources, candidate.folder, bounds=bounds)
    body = page[page.index("<body>") :]
    assert f"version 7: {'promoted' if decision.promoted else 'not promoted'}</h1>" in body
    assert body.index("which was in production") < body.index("On the test split")
    assert f"{result.evaluation.metrics['auc'].value:.3f}" in body
    for reason in decision.reasons:
        assert reason.split(",")[0] in body.replace("&#39;", "'")
        assert reason in card
    text = " ".join(re.sub("</?em>", "", body).split())
    assert "The verdict fake is sure where P(fake) is above 0.87, the verdict real never. The image must" in text
    assert "<script>alert" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert two_sources.version in body
    assert two_sources.version in card


@pytest.mark.slow
def test_the_report_shows_each_confirmed_report_before_and_after(two_sources, candidate):
    rows = two_sources.split("test")
    sides = [(True, False), (False, True), (True, True), (False, False)]
    images = [
        ReportedImage(row.sha256, row.group, row.source, row.member, row.label, row.path, 0.61, after, 0.42, before)
        for row, (after, before) in zip(rows.itertuples(), sides, strict=False)
    ]
    page, _, _, _ = make_report(two_sources, candidate.folder, Regression(tuple(images)))
    section = page[page.index("Confirmed reports that no model learns from") : page.index("On the test split")]
    found = re.findall(
        r"<code>(\w{12})</code>.*?<td>(\w+)</td>\s+<td>(.+?)</td>\s+<td>(.+?)</td>\s+<td>(\w*)</td>", section, re.S
    )
    assert [(name, *cells) for name, label, *cells in found] == [
        (images[0].name, "0.42, right", "0.61, wrong", "worse"),
        (images[1].name, "0.42, wrong", "0.61, right", "better"),
        (images[2].name, "0.42, wrong", "0.61, wrong", ""),
        (images[3].name, "0.42, right", "0.61, right", ""),
    ]
    assert [label for _, label, *_ in found] == rows["label"][:4].tolist()
    assert section.count("data:image/jpeg;base64,") == 4
    assert "Version 5 is wrong on 2 of 4 images, version 7 on 2." in re.sub(r"\s+", " ", section)
    first = replace(images[0], before=None, wrong_before=None)
    page, _, _, _ = make_report(two_sources, candidate.folder, Regression((first,)))
    assert "1 of 1 verdicts are wrong" in page


@pytest.mark.slow
def test_a_source_of_one_class_has_no_auc_and_does_no_harm(tmp_path, candidate):
    reals = {name: data for name, data in faces(40, start=700).items() if name.startswith("real")}
    dataset = prepare(tmp_path, write_zip(tmp_path / "both.zip", faces(40)), write_zip(tmp_path / "real.zip", reals))
    page, card, result, _ = make_report(dataset, candidate.folder)
    assert "auc" not in result.evaluation.sources["real"].metrics
    assert "<td>real</td><td>\N{EN DASH}</td><td>\N{EN DASH}</td>" in page
    assert "one class" in card
    reals = (dataset.split("val")["source"] == "real").sum()
    few = f"{reals} of real. The threshold keeps a rate of false alarms on all sources together"
    assert few in card
    assert card.index("Changes after which most of 100 reals are called fake") < card.index("Warnings")
    assert any(few in one for one in list_warnings(dataset, result, EvaluationParameters()))
    best_f1 = EvaluationParameters(threshold="best_f1")
    assert not any("real validation image" in one for one in list_warnings(dataset, result, best_f1))


@pytest.mark.slow
def test_strong_file_facts_are_said_in_the_first_lines(tmp_path, candidate):
    members = {
        name: encode(draw_image(number), quality=60 if "fake" in name else 95)
        for number, name in enumerate(sorted(faces(60)))
    }
    dataset = prepare(tmp_path, write_zip(tmp_path / "told.zip", members))
    page, card, result, _ = make_report(dataset, candidate.folder)
    assert result.file_facts.auc > 0.95
    (warning,) = [
        one for one in list_warnings(dataset, result, EvaluationParameters()) if one.startswith("File facts alone")
    ]
    assert page.index("File facts alone") < page.index("<h2>")
    assert warning in card
