"""Write the measured sections of README.md, docs/benchmarks.md and docs/scale.md from benchmarks/results.

    python benchmarks/render.py

A section is between two comments that name it. The `make bench` targets write all of them again;
tests/test_results.py fails where one differs from what the files say.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from deepfake_core.config import SPLITS
from deepfake_core.evaluation.evaluation import Estimate, per_100

ROOT = Path(__file__).parents[1]
README, BENCHMARKS, SCALE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "scale.md"

Results = dict[str, Any]
"""What the benchmarks wrote, by the name of their file."""

SHORT_NAMES = {"140k-real-and-fake-faces": "140k", "real-and-fake-face-detection": "ciplab"}
FORENSIC = "efficientnet_lite0, 140k alone"
"""A candidate trained with images scaled, blurred and recompressed; the one below without."""
PLAIN = f"{FORENSIC}, no forensic augmentation"
DETECTOR = "YuNet, from 0.8"
"""The face detector that is used."""

SERVING_ROWS = {
    ("cold_seconds", "help"): "`deepfake --help`, s",
    ("cold_seconds", "bare"): "bare ONNX Runtime script, s",
    ("cold_seconds", "predict_no_detect"): "`deepfake predict --no-detect`, s",
    ("cold_seconds", "times_bare"): "times the bare script",
    ("cold_seconds", "predict"): "`deepfake predict`, s",
    ("images_per_second", "decoding"): "decoding alone, images/s",
    ("images_per_second", "scoring"): "scoring alone, images/s",
    ("images_per_second", "predict_no_detect"): "predictor without detection, images/s",
    ("images_per_second", "of_slower"): "of the slower of the two",
    ("images_per_second", "of_floor"): "of one after the other on the same cores",
    ("images_per_second", "predict"): "predictor with detection, images/s",
}


FEEDINGS = {"resident": "resident", "streamed": "streamed", "host": "changed by the CPU"}


def load_results() -> Results:
    return {file.stem: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")}


def wrap(text: str, indent: str = "") -> str:
    """Break a paragraph into lines of at most 120 characters; all but the first begin with `indent`."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def draw_table(alignment: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        alignment: a letter per column: "l" for text, "r" for numbers.
    """
    rules = ["---:" if letter == "r" else "---" for letter in alignment]
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (header, rules, *rows)
    )


def show_interval(metrics: dict[str, float], name: str) -> str:
    """Write a metric with its 95 % interval."""
    value, low, high = (metrics[name + end] for end in ("", "_low", "_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def show_of_100(metrics: dict[str, float], name: str) -> str:
    """Write a share as a number of 100, with its 95 % interval."""
    return per_100(Estimate(*(metrics[name + end] for end in ("", "_low", "_high"))))


def show_splits(splits: dict[str, dict[str, int]]) -> str:
    """Write how many images each split has."""
    return ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in splits.items())


# --- README.md


def render_key_results(results: Results) -> str:
    """Write the few metrics of a full run, of serving and of near copies that matter most."""
    run, faces, serving = results["retrain"], results["face_detection"], results["serving_speed"]
    found, planted = faces["detectors"][DETECTOR], results["near_copies"]["planted"]
    grouped = min(shares["grouped"] for shares in planted.values())
    metrics = run["metrics"]
    every, made, edited = (
        [show_of_100(metrics, f"test/{source}{rate}") for rate in ("false_alarm_rate", "recall")]
        for source in ("", "140k-real-and-fake-faces/", "real-and-fake-face-detection/")
    )
    images = sum(run["counts"]["splits"]["test"].values())
    seconds, speed = (serving[part]["efficientnet_lite0"]["predict"] for part in ("cold_seconds", "images_per_second"))
    rows = {
        f"of 100 real images, called fake (on {images} test images, with 95 % intervals)": every[0],
        "of 100 real images of the 140k set, called fake": made[0],
        "of 100 real images of ciplab, called fake": edited[0],
        "of 100 fakes, found": every[1],
        "of 100 faces of a generator (140k set), found": made[1],
        "of 100 photographs edited by hand (ciplab), found": edited[1],
        "of 100 verdicts sure": show_of_100(metrics, "test/sure_share"),
        "of 100 sure verdicts wrong": show_of_100(metrics, "test/error_when_sure"),
        "AUC": show_interval(metrics, "test/auc"),
        f"faces found, of {faces['faces']} in scenes": f"{found['recall']:.3f}, with {found['false_per_scene']:.3f} "
        "false ones per scene",
        "`deepfake predict` in a new process": f"{seconds:.2f} s for one image, {speed:.0f} images/s of many",
        f"near copies grouped with their original, worst of {len(planted)} kinds": f"{grouped:.1%}",
    }
    summary = (
        f"One full run of {' and '.join(run['training']['candidates'])} with the default parameters on "
        f"{run['counts']['kept']:,} real images, on {run['machine']}: {run['seconds']['retrain'] / 60:.0f} minutes."
    )
    return f"{wrap(summary)}\n\n{draw_table('ll', ('', ''), rows.items())}"


def summarise_calibrated(variant: dict[str, Any]) -> tuple[int, str, str, str]:
    """Return, of the calibrated trainings: how many, the range of fakes that they found of 100, the highest number of
    a source's reals that one called fake of 100, and that source."""
    runs = [run["calibrated"] for run in variant["seeds"].values() if "calibrated" in run]
    recalls = [100 * run["all"]["recall"] for run in runs]
    worst, source = max((run[name]["false_alarm_rate"], name) for run in runs for name in SHORT_NAMES)
    return len(runs), f"{min(recalls):.0f} to {max(recalls):.0f}", f"{100 * worst:.0f}", SHORT_NAMES[source]


def render_measured_limits(results: Results) -> str:
    """Write what the rate of false alarms costs and how far test images break it, what forensic augmentation costs and
    gains, and in how many images no face is found."""
    trained = results["candidates"]["variants"]
    trainings, found, worst, source = summarise_calibrated(trained[DEFAULT])
    others, found_there, worst_there, _ = summarise_calibrated(trained[OTHER_SPLITS])
    alarms = (
        "The threshold is chosen so that, with a confidence of 0.9, at most 10 of 100 real images of each source are "
        "called fake. Where validation images are few, that costs recall, and the rate can be broken: "
        f"{trainings} trainings of `{DEFAULT}` on these images found {found} of 100 fakes of the test split. The worst "
        f"called {worst} of 100 real test images of {source} fake. With the images divided in {others} other ways, one "
        f"training of each found {found_there} of 100 fakes, and called at most {worst_there} of 100 real test images "
        "of a source fake. The report of a version, and `promotion.max_false_alarm_rate`, go by its test images."
    )
    forensic, plain = (list(trained[name]["seeds"].values()) for name in (FORENSIC, PLAIN))
    cost = mean_auc(plain, "all") - mean_auc(forensic, "all")
    augmentation = (
        "`efficientnet_lite0` trains on images of which some are scaled, blurred and recompressed. On the 140k set "
        f"alone, mean over {len(forensic)} seeds, that cost {cost:.3f} of AUC on untouched test images. The most "
        f"harmful change of the test images then cost {mean_auc_lost(forensic):.2f} of AUC instead of "
        f"{mean_auc_lost(plain):.2f}. "
        "With `recompression`, `blur` and `resize` of `training.augmentation` at 0, none is."
    )
    generated, edited = (
        f"{counts['missed']:,} of {counts['images']:,}"
        for counts in (results["face_detection"]["shared"][source] for source in SHORT_NAMES)
    )
    missed = f"Images in which no face is found: {generated} of the 140k set, {edited} of ciplab's."
    return "\n".join(wrap(f"- {limit}", "  ") for limit in (alarms, augmentation, missed))


# --- docs/benchmarks.md


def render_full_run(results: Results) -> str:
    """Write what became of every file, and what the model reached on each source."""
    run = results["retrain"]
    metrics, seconds = run["metrics"], run["seconds"]
    reached = (
        f"Split: {show_splits(run['counts']['splits'])}. The best candidate on val is `{run['architecture']}`. On the "
        f"test split, at the threshold {run['threshold']:.3f} from val, with 95 % intervals:"
    )
    robustness = (
        f"File facts alone reach AUC {metrics['file_facts/auc']:.3f}. What changes of the image cost in AUC, at most: "
        f"{list_worst_changes(metrics)}."
    )
    classes = (
        f"Of the reals, {show_interval(metrics, 'test/reals_surely_fake')} are surely called fake, and of the fakes "
        f"{show_interval(metrics, 'test/fakes_surely_real')} surely real; at most 0.05 are meant to be."
    )
    outcome = (
        f"Version 1: {run['decision']}, with the floors at their defaults. On {run['machine']}: preparing took "
        f"{seconds['prepare']:.0f} s, preparing again {seconds['prepare again']:.1f} s, and the retrain "
        f"{seconds['retrain'] / 60:.0f} minutes; the checkpoint kept is epoch {metrics['best_epoch']:.0f}'s."
    )
    sources = draw_sources(run["counts"])
    return "\n\n".join([sources, wrap(reached), draw_run_metrics(run), wrap(classes), wrap(robustness), wrap(outcome)])


def draw_sources(counts: dict[str, Any]) -> str:
    """Write a table of what became of each source's files."""
    columns = {"files": "files", "duplicates": "duplicate", "no image": "not_an_image", "kept": "kept"}
    sources = {**counts["sources"], "all": {"files": counts["files"], **counts["reasons"]}}
    rows = [[name, *(f"{mine.get(key, 0):,}" for key in columns.values())] for name, mine in sources.items()]
    return draw_table("lrrrr", ["source", *columns], rows)


def draw_run_metrics(run: dict[str, Any]) -> str:
    """Write a table of the metrics of each source that the test split has images of."""
    columns = {"false alarms": "false_alarm_rate", "recall": "recall", "sure": "sure_share"}
    columns |= {"wrong where sure": "error_when_sure", "AUC": "auc", "calibration error": "ece"}
    prefixes = {**{source: f"test/{source}/" for source in run["counts"]["sources"]}, "all": "test/"}
    rows = [
        [source, *(show_interval(run["metrics"], prefix + key) for key in columns.values())]
        for source, prefix in prefixes.items()
        if f"{prefix}auc" in run["metrics"]
    ]
    return draw_table("lrrrrrr", ["source", *columns], rows)


def list_worst_changes(metrics: dict[str, float]) -> str:
    """Name the three changes of the test images that cost the most AUC."""
    pattern = re.compile("robustness/(.+)_auc_lost")
    lost = {match[1].replace("_", " "): value for name, value in metrics.items() if (match := pattern.fullmatch(name))}
    return ", ".join(f"{name} {lost[name]:.3f}" for name in sorted(lost, key=lambda name: -lost[name])[:3])


DEFAULT = "efficientnet_lite0"
OTHER_SPLITS = f"{DEFAULT}, other splits"
CALIBRATED = ("false_alarm_rate", "recall", "sure_share", "error_when_sure")


def render_training_results(results: Results) -> str:
    """Write what each candidate reached, and how fast training is."""
    candidates = results["candidates"]
    caption = (
        "Test split at threshold 0.5, mean over the seeds, for AUC with the lowest and the highest; "
        f"{show_splits(candidates['splits'])}. Sources: 140k-real-and-fake-faces, and ciplab's "
        "real-and-fake-face-detection. Minutes of training and images per second (validation included) on "
        f"{candidates['machine']}. AUC lost: by the change of the test images that costs most, over all sources; "
        "empty where it was not measured. AUC on val is that of the checkpoint, which was chosen there. A second head "
        "has 1,281 parameters, which are not counted. Other splits: each seed divides the "
        "images in another way, into about as many of each split."
    )
    parts = [wrap(caption), draw_candidates(candidates["variants"]), *draw_calibrated(candidates["variants"])]
    return "\n\n".join([*parts, wrap(describe_training_speed(results["training_speed"]))])


def draw_calibrated(variants: dict[str, Any]) -> list[str]:
    """Write, of the trainings that were calibrated, false alarms, recall and sure verdicts for each seed and source."""
    rows = []
    for name, variant in variants.items():
        for seed, run in variant["seeds"].items():
            for source, rates in run.get("calibrated", {}).items():
                where = SHORT_NAMES.get(source, source)
                cells = (f"{rates[one]:.3f}" if one in rates else "" for one in CALIBRATED)
                rows.append([name, seed, where, *cells])
    if not rows:
        return []
    caption = (
        "The same test scores at the threshold that was chosen on val, so that at most 1 in 10 reals of each source is "
        "called fake with a confidence of 0.9; and of the verdicts that are sure, how many are wrong:"
    )
    header = ["candidate", "seed", "source", "false alarms", "recall", "sure", "wrong where sure"]
    return [wrap(caption), draw_table("lrlrrrr", header, rows)]


def draw_candidates(variants: dict[str, Any]) -> str:
    """Write a table with a row per candidate and source."""
    header = ["candidate", "parameters", "seeds", "source", "AUC", "AUC on val", "accuracy", "precision", "recall"]
    header += ["AUC lost", "minutes", "images/s"]
    rows = [
        describe_candidate(name, variant, source)
        for name, variant in variants.items()
        for source in next(iter(variant["seeds"].values()))["test"]
        if source != "all"
    ]
    return draw_table("lrrlrrrrrrrr", header, rows)


def describe_candidate(name: str, variant: dict[str, Any], source: str) -> list[str]:
    """Return a candidate's cells on one source: means over its seeds."""
    runs = list(variant["seeds"].values())
    aucs = [run["test"][source]["auc"] for run in runs]
    spread = f" ({min(aucs):.3f} to {max(aucs):.3f})" if len(aucs) > 1 else ""
    rates = (mean(run["test"][source][rate] for run in runs) for rate in ("accuracy", "precision", "recall"))
    return [
        name,
        f"{variant['parameters']:,}",
        str(len(runs)),
        SHORT_NAMES[source],
        f"{mean(aucs):.3f}{spread}",
        f"{mean(run['val'][source]['auc'] for run in runs):.3f}",
        *(f"{rate:.3f}" for rate in rates),
        f"{mean_auc_lost(runs):.3f}" if any("auc_lost" in run for run in runs) else "",
        f"{mean(run['minutes'] for run in runs):.1f}",
        f"{mean(run['images_per_second'] for run in runs):.0f}",
    ]


def render_levers(results: Results) -> str:
    """Write what each lever reached on validation images."""
    measured = results["levers"]
    images, levers = measured["images"], measured["levers"]
    caption = (
        f"AUC on the {images['val']} validation images after the last epoch, mean over the seeds, with the lowest and "
        f"the highest; {images['train']:,} training images. Where a row names an epoch, it was chosen on half of the "
        "validation images, and all its figures are of the other half. No test image was used. "
        f"Minutes of training on {measured['machine']}, most beside other jobs."
    )
    rows = []
    for name, seeds in levers.items():
        rows.append(describe_lever(name, "last weights", seeds))
        ways = next(iter(seeds.values()))["auc"] if name in ("one head", "a head per kind") else ()
        rows += [describe_lever(f"{name}, {way}", way, seeds) for way in ways if way != "last weights"]
    edited_caption = (
        "The same images before and after edits that make no fake of a photograph: JPEG, WebP, blur, smoothing, "
        "sharpening, brightness, contrast and colour, at the strengths of `deepfake_core/evaluation/robustness.py`. "
        "Each source has the threshold at which 0.1 of its reals are called fake before. Means over the seeds, and the "
        "edit at which they are worst."
    )
    edited = [
        describe_edited(name, source, list(seeds.values()))
        for name, seeds in levers.items()
        for source in SHORT_NAMES
        if all(seed.get("edited") for seed in seeds.values())
    ]
    titles = ["", "source", "AUC before", "at worst", "false alarms at worst", "recall before", "at worst"]
    return (
        f"{wrap(caption)}\n\n{draw_table('lrrrr', ['', 'seeds', '140k', 'ciplab', 'minutes'], rows)}\n\n"
        f"{wrap(edited_caption)}\n\n{draw_table('llrllrl', titles, edited)}"
    )


def describe_edited(name: str, source: str, seeds: list[dict[str, Any]]) -> list[str]:
    """Return a lever's cells for the validation images of a source before and after edits."""
    auc, alarms, recall = (
        {edit: mean(seed["edited"][edit][measure][source] for seed in seeds) for edit in seeds[0]["edited"]}
        for measure in ("auc", "false_alarms", "recall")
    )
    lowest_auc, lowest_recall = (min(one, key=one.__getitem__) for one in (auc, recall))
    most_alarms = max(alarms, key=alarms.__getitem__)
    return [
        name,
        SHORT_NAMES[source],
        f"{auc['none']:.3f}",
        f"{auc[lowest_auc]:.3f}, {lowest_auc}",
        f"{alarms[most_alarms]:.3f}, {most_alarms}",
        f"{recall['none']:.3f}",
        f"{recall[lowest_recall]:.3f}, {lowest_recall}",
    ]


def describe_lever(name: str, way: str, seeds: dict[str, Any]) -> list[str]:
    """Return a lever's cells; `way` is how the trained network scores."""
    cells = [name, str(len(seeds))]
    for source in SHORT_NAMES:
        aucs = [seed["auc"][way][source] for seed in seeds.values()]
        spread = f" ({min(aucs):.3f} to {max(aucs):.3f})" if len(aucs) > 1 else ""
        cells.append(f"{mean(aucs):.3f}{spread}")
    return [*cells, f"{mean(seed['minutes'] for seed in seeds.values()):.1f}"]


def mean_auc(runs: list[dict[str, Any]], source: str) -> float:
    """Return the mean AUC of a candidate's seeds on the test images of a source."""
    return mean(run["test"][source]["auc"] for run in runs)


def mean_auc_lost(runs: list[dict[str, Any]]) -> float:
    """Return what the worst change of the test images costs in AUC, mean over the seeds that it was measured for."""
    return mean(max(run["auc_lost"].values()) for run in runs if "auc_lost" in run)


def describe_training_speed(speed: dict[str, Any]) -> str:
    """Compare training with the reference pipeline and with bare steps."""
    rates, times, floors = (speed[name] for name in ("images_per_second", "times_reference", "of_bare_steps"))
    return (
        f"The reference pipeline (`ImageDataGenerator`, float32) trains `cnn` at {rates['reference']:.0f} images/s; "
        f"ours at {rates['ours_float32']:.0f} in float32, {times['float32']:.1f} times, and at "
        f"{rates['ours_bfloat16']:.0f} in bfloat16, {times['bfloat16']:.1f} times. That is {floors['float32']:.2f} and "
        f"{floors['bfloat16']:.2f} of bare steps on a resident batch (medians of {speed['rounds']} rounds), which are "
        f"{rates['bare_bfloat16'] / rates['reference']:.1f} times the reference in bfloat16: the most that an input "
        "pipeline can reach."
    )


def render_accelerator_results(results: Results) -> str:
    """Write what an epoch takes on an accelerator, beside its floors."""
    measured = results["gpu_training"]
    header = ["candidate", "pixels", "batch", "images are", "s per epoch", "images/s", "waiting", "first epoch, s"]
    header += ["floor: memory, s", "floor: arithmetic, s"]
    rows = [
        [
            run["candidate"],
            str(run["image_size"]),
            str(run["batch_size"]),
            FEEDINGS[run["feeding"]],
            f"{run['seconds_per_epoch']:.2f}",
            f"{run['images_per_second']:,.0f}",
            f"{run['waiting_share']:.3f}",
            f"{run['first_epoch_seconds']:.0f}",
            f"{run['memory_floor_seconds']:.2f}",
            f"{run['arithmetic_floor_seconds']:.2f}",
        ]
        for run in measured["runs"]
    ]
    caption = (
        f"An epoch is {measured['images']:,} images of noise, without validation, on {measured['hardware']}. Waiting: "
        "the share of that time for which no images were ready. The first epoch includes compiling. Later runs of a "
        "candidate reuse what the first has tuned."
    )
    return f"{wrap(caption)}\n\n{draw_table('lrrlrrrrrr', header, rows)}"


def render_serving_results(results: Results) -> str:
    """Write how well faces are found, and how fast images are judged."""
    faces, serving = results["face_detection"], results["serving_speed"]
    scenes = (
        f"Of {faces['faces']} shared faces, 64 to 900 pixels a side, pasted into {faces['scenes']} scenes of "
        "1280 x 960 without people:"
    )
    speed = (
        "YuNet from 0.8 is used. Speed, on "
        f"{serving['machine']}: seconds of a new process for one image, then images/s of {serving['images']} images of "
        "256 x 256."
    )
    detectors = draw_detectors(faces["detectors"])
    return "\n\n".join([wrap(scenes), detectors, wrap(speed), draw_serving_speed(serving)])


def draw_detectors(detectors: dict[str, Any]) -> str:
    """Write a table of the face detectors compared."""
    columns = {
        "found": ("recall", ".3f"),
        "below 110 pixels": ("recall_small", ".3f"),
        "from 400 pixels": ("recall_large", ".3f"),
        "false per scene": ("false_per_scene", ".3f"),
        "overlap of the crop": ("crop_overlap", ".2f"),
        "ms per scene": ("milliseconds", ".0f"),
    }
    rows = [[name, *(format(one[key], form) for key, form in columns.values())] for name, one in detectors.items()]
    return draw_table("lrrrrrr", ["face detector", *columns], rows)


def draw_serving_speed(serving: dict[str, Any]) -> str:
    """Write a table of seconds for one image and images per second, by network."""
    networks = ("efficientnet_lite0", "cnn")
    rows = []
    for (part, key), title in SERVING_ROWS.items():
        values = [serving[part][network][key] for network in networks]
        rows.append([title, *(f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values)])
    return draw_table("lrr", ["", *networks], rows)


def render_soak_results(results: Results) -> str:
    """Write the most memory, files and threads of each part, and how much more in its second half than in its first."""
    soak = results["soak"]
    units = {"predict": "photographs", "serve": "requests", "clips": "clips", "retrain": "retrains"}
    columns = {
        "memory, MB": "memory_mb_max",
        "growth": "memory_mb_growth",
        "open files": "open_files_max",
        "growth of files": "open_files_growth",
        "threads": "threads_max",
        "growth of threads": "threads_growth",
    }
    rows = [
        [f"{part}: {one['count']:,} {units[part]}", *(f"{one['summary'][key]:,.0f}" for key in columns.values())]
        for part, one in soak["parts"].items()
    ]
    table = draw_table("l" + "r" * len(columns), [soak["machine"], *columns], rows)
    if "retrain" not in soak["parts"]:
        return table
    disk = soak["parts"]["retrain"]["curve"]
    grew = {name: disk[name][-1] - disk[name][0] for name in ("data_mb", "mlflow_mb", "prefect_mb")}
    text = (
        f"From the first retrain to the last, the data folder grew by {grew['data_mb']:.1f} MB, MLflow by "
        f"{grew['mlflow_mb']:.1f} MB and Prefect's by {grew['prefect_mb']:.1f} MB."
    )
    return "\n\n".join([table, wrap(text)])


def render_data_results(results: Results) -> str:
    """Write how many near copies are found, and how fast preparing is."""
    copies, speed = results["near_copies"], results["data_speed"]
    found = (
        f"{copies['planted_originals']} originals of each kind. Different originals taken for the same picture: "
        f"{copies['different_originals_merged']} pairs. Among the {copies['distinct_images']:,} images themselves "
        f"{copies['groups']} groups are found, {copies['groups_judged_true']} of them judged true by eye. Of "
        f"{copies['known_pairs']} edits known before, {copies['known_pairs_grouped']} are found."
    )
    parts = [draw_copies(copies["planted"]), wrap(found), wrap(describe_beyond(copies)), draw_methods(copies)]
    parts += [f"Speed, on {speed['machine']}:", draw_data_speed(speed), wrap(describe_search(speed))]
    return "\n\n".join([*parts, wrap(describe_engines(speed["search"])), draw_engines(speed["search"]["engines"])])


def render_full_size(results: Results) -> str:
    """Write what each stage takes at the size of the three data sets, beside its floor."""
    measured = results["full_size"]
    counts, flows = measured["counts"], measured["flows"]
    large = counts["real"] + counts["fake"]
    train, decoding = flows["train"], measured["decoding"]
    caption = (
        f"{counts['small']:,} pictures of 256 x 256 pixels, and {large:,} of 600 x 600 that come three times: "
        f"{measured['archives_gb']:.1f} GB of archives. With 1 % new: {counts['new']:,} more. On "
        f"{measured['machine']}. Memory is the process's own, without Prefect's server and pages of files. Floors: "
        "reading the archives once, hashing the grown archive's members, decoding JPEGs that are new, copying files "
        "that are new, bare training steps without validation; measured in the same run, with a thread per core. "
        "`merge` reads images from the zips instead of small files, so it can take less than copying."
    )
    rows = [row for name, flow in flows.items() for row in list_stages(name, flow)]
    ratio = flows["prepare on a cluster"]["seconds"] / flows["prepare"]["seconds"]
    text = (
        f"Training began {train['seconds_to_training']:.0f} s after the start of its flow. From the first epoch to the "
        f"last its memory grew by {train['memory_growth_gb']:.2f} GB. On a Ray cluster of this machine's cores, "
        f"`prepare` took {ratio:.2f} times as long, and made the same data set. Images are decoded in the first epoch. "
        f"Alone, as before an accelerator is used, {decoding['images']:,} images were decoded, resized and written in "
        f"{decoding['seconds']:.0f} s; to decode them takes {decoding['floor_seconds']:.0f} s, and to "
        f"decode and resize them, as serving does, {decoding['resized_floor_seconds']:.0f} s."
    )
    table = draw_table("lrrrr", ["", "s", "floor, s", "memory, GB", "disk, GB"], rows)
    return "\n\n".join([wrap(caption), table, wrap(text)])


def render_scale(results: Results) -> str:
    """Write what near copies, groups, splits and manifest of many images take, and what is found."""
    measured = results["scale"]
    sizes, more = measured["sizes"], measured["more_sizes"]
    header = ["rows", "pair search, s", "second look, s", "grouping, s", "split, s", "manifest, s", "own memory, GB"]
    names = ("pair search", "second look", "grouping", "split", "manifest")
    rows = [
        [
            f"{int(count):,}",
            *(f"{size['steps'][name]['seconds']:.1f}" for name in names),
            f"{size['own_gb']:.2f}",
        ]
        for count, size in sizes.items()
    ]
    distances = list(next(iter(sizes.values()))["recall"]["links"])
    found = [
        [f"{int(count):,}", title, *(f"{size['recall'][key][name]['found']:.1%}" for name in distances)]
        for count, size in sizes.items()
        for key, title in (("pair_search", "by the pair search"), ("links", "linked after the second look"))
    ]
    larger = [
        [
            f"{int(count):,}",
            f"{size['search']['tables']:,} of {size['search']['bits']} bits",
            f"{size['search']['seconds']:.0f}",
            f"{size['search']['hours_of_all_tables']:.1f}",
            f"{size['search']['own_gb']:.1f}",
            f"{size['search']['resident_gb']:.1f}",
            f"{sum(step['seconds'] for step in size['steps'].values()):.0f}",
            f"{max(step['own_gb'] for step in size['steps'].values()):.1f}",
        ]
        for count, size in more.items()
    ]
    timed = measured["tables_timed"]
    return "\n\n".join(
        [
            f"All steps, on {measured['machine']}, which was busy with other work too:",
            draw_table("rrrrrrr", header, rows),
            "Planted edits that were found, by the distance of the hashes in bits:",
            draw_table("rl" + "r" * len(distances), ["rows", "found", *distances], found),
            wrap(
                f"The pair search of random hashes of seven views in {timed} of its hash tables, from which the hours "
                "of all follow; and grouping, split and manifest of indexes without pictures:"
            ),
            draw_table(
                "rrrrrrrr",
                ["rows", "tables", f"{timed} tables, s", "all tables, h", "own memory, GB", "with mapped pages, GB",
                 "the other steps, s", "own memory, GB"],
                larger,
            ),
        ]
    )  # fmt: skip


def list_stages(name: str, flow: dict[str, Any]) -> list[list[str]]:
    """Return the cells of a flow, and of its stages that take a second or more."""
    stages = {stage: cells for stage, cells in flow["stages"].items() if cells["seconds"] >= 1}
    rows = [[f"**{name}**", f"{flow['seconds']:.0f}", "", f"{flow['memory_gb']:.1f}", f"{flow['disk_gb']:.1f}"]]
    for stage, cells in stages.items():
        floor = f"{cells['floor_seconds']:.1f}" if "floor_seconds" in cells else ""
        rows.append([stage, f"{cells['seconds']:.1f}", floor, f"{cells['memory_gb']:.1f}", ""])
    return rows


def draw_copies(planted: dict[str, Any]) -> str:
    """Write a table of the kinds of near copies; those found alike share a row."""
    kinds: dict[tuple[float, float], list[str]] = {}
    for kind, shares in planted.items():
        kinds.setdefault((shares["grouped"], shares["one_kept"]), []).append(kind)
    rows = [["; ".join(names), *(f"{share:.1%}" for share in shares)] for shares, names in kinds.items()]
    return draw_table("lrr", ["copies", "in their original's group", "taken for the same picture"], rows)


def describe_beyond(copies: dict[str, Any]) -> str:
    """Say what is measured beside what is promised, and where another method finds more."""
    found = copies["found"]
    peers = [method for method in copies["methods"] if method not in ("linked", "candidates")]
    lost = [kind for kind, shares in found.items() if max(shares[peer] for peer in peers) > shares["linked"]]
    grouped = "; ".join(f"{kind}: {shares['grouped']:.1%}" for kind, shares in copies["beyond"].items())
    return (
        f"Beyond what is promised, the copies of imagededup's benchmark end in their original's group thus: {grouped}. "
        "Below, pairs of a copy and its original that each method finds, and what it finds among the "
        f"{copies['distinct_images']:,} images themselves, which have {copies['true_pairs']} pairs known to be true. "
        f"Ours misses {copies['true_pairs'] - copies['among_distinct']['linked']['true']} of them. A peer finds more "
        f"than ours of these copies: {'; '.join(lost) or 'none'}."
    )


def draw_methods(copies: dict[str, Any]) -> str:
    """Write a table of the copies that each method finds; kinds found alike share a row."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, shares in copies["found"].items():
        cells = tuple(f"{shares[method]:.1%}" for method in copies["methods"])
        kinds.setdefault(("beyond: " if kind in copies["beyond"] else "", *cells), []).append(kind)
    rows = [[mark + "; ".join(names), *cells] for (mark, *cells), names in kinds.items()]
    counts = [copies["among_distinct"][method] for method in copies["methods"]]
    rows += [
        [f"true pairs among the {copies['distinct_images']:,}", *(f"{one['true']:,}" for one in counts)],
        ["false pairs among them", *(f"{one['false']:,}" for one in counts)],
    ]
    return draw_table("l" + "r" * len(counts), ["pairs found", *copies["methods"].values()], rows)


def draw_data_speed(speed: dict[str, Any]) -> str:
    """Write a table of how fast images are indexed and merged, and against what."""
    small, large, merge = speed["index_256"], speed["index_600_progressive"], speed["merge"]
    rows = [
        [
            "index, 256 x 256",
            f"{small['index_images_per_second']:,.0f}",
            f"{small['of_decoding']:.2f} of bare libjpeg-turbo grey decoding at that scale, "
            f"{small['times_phash']:.1f} times `imagehash.phash`",
        ],
        [
            "index, 600 x 600 progressive",
            f"{large['index_images_per_second']:,.0f}",
            f"{large['of_decoding']:.2f} and {large['times_phash']:.1f} times",
        ],
        ["merge", f"{merge['merge_images_per_second']:,.0f}", f"{merge['of_copying']:.2f} of copying the files"],
    ]
    return draw_table("lrl", ["", "images/s", "against"], rows)


def describe_search(speed: dict[str, Any]) -> str:
    """Say how long a grown index and the search for pairs take."""
    growth, search, curve = speed["growth"], speed["search"], speed["search"]["curve"]
    usual, largest = curve["140000"], curve["1000000"]["ours"]
    recall = min(sides["ours"]["recall"]["60"] for sides in curve.values())
    return (
        f"The index of {growth['images']:,} images, of which {growth['new_images']} are new, takes "
        f"{growth['grown_seconds']:.2f} s instead of {growth['afresh_seconds']:.2f} s. All pairs among 140,000 hashes "
        f"take {usual['ours']['seconds']:.1f} s (faiss's exact search: {usual['flat']['seconds']:.1f} s), among "
        f"1,000,000 {largest['seconds']:.0f} s in {largest['peak_memory_gb']:.1f} GB: "
        f"{search['growth_100k_to_1m']:.1f} times those among 100,000, which are still compared exactly; the hash "
        f"tables alone grow {search['growth_100k_to_1m_tables_alone']:.1f}-fold. Of planted neighbours 60 bits away at "
        f"least {recall:.1%} are found. 140,000 images through all views take {search['all_views']['seconds']:.0f} s."
    )


ENGINES = {"ours": "ours, which compares all of so few", "tables": "our hash tables", "flat": "faiss's exact search"}


def describe_engines(search: dict[str, Any]) -> str:
    """Say what the table of engines compares."""
    return (
        f"Engines for all pairs within {search['radius']} bits among {search['engines']['pictures']:,} simulated "
        f"pictures of seven views, on {search['engines']['machine']}, the faster of two rounds each; 1,000 pairs are "
        "planted at each distance. Other work slows all of them; seconds of the cores are what an engine itself used. "
        "Ours also keeps each pair once, through its nearest view. Multi-hash is faiss's IndexBinaryMultiHash."
    )


def draw_engines(engines: dict[str, Any]) -> str:
    """Write a table of what each engine takes and finds."""
    distances = list(engines["found"]["ours"]["recall"])
    rows = [
        [
            ENGINES.get(name, name),
            f"{one['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            *(f"{share:.1%}" for share in one["recall"].values()),
        ]
        for name, one in engines["found"].items()
    ]
    header = ["", "s", "s of the cores", *(f"found at {bits} bits" for bits in distances)]
    return draw_table("l" + "r" * (len(header) - 1), header, rows)


def render_feedback_results(results: Results) -> str:
    """Write what confirmed reports changed: both versions on fakes that neither has seen."""
    run = results["feedback"]
    images, splits, regression = run["images"], run["confirmed_by_split"], run["regression"]
    (candidate,) = run["training"]["candidates"]
    fakes = sum(images.values()) - images["reals"]
    where = ", ".join(f"{splits.get(split, 0)} in {split}" for split in SPLITS)
    asked = (
        f"Production is trained on {images['trained']} of {fakes} fakes of the 140k set. Of {images['shown']} others "
        f"it calls {run['confirmed']} real: these are reported and confirmed. The next data set has of them {where}; "
        f"{run['groups_in_two_splits']} groups with one are in two splits. Measured on {images['others']} further "
        "fakes of the set, of which neither version has seen a near copy, and on "
        f"{images['reals']} real test images of it. Each version has its own threshold; with 95 % intervals:"
    )
    names = {"recall": "recall", "false alarms": "false_alarm_rate", "AUC": "auc"}
    rows = [
        [title, *(str(Estimate(**run[side][name])) for name in names.values())]
        for title, side in (("production, before", "before"), ("the next retrain, after", "after"))
    ]
    against = [reason.removeprefix("NOT met: ") for reason in run["reasons"] if reason.startswith("NOT met: ")]
    outcome = (
        f"Of the {regression['images']:.0f} images of the regression set, production has "
        f"{regression['production_wrong']:.0f} wrong and the next retrain {regression['wrong']:.0f}. The rule, without "
        f"floors: {run['decision']}{', as ' if against else ''}{' and '.join(against)}. `{candidate}` at "
        f"{run['training']['image_size']} pixels, {run['training']['epochs']} epochs, one seed; both retrains took "
        f"{run['minutes']:.0f} minutes on {run['machine']}, which were busy."
    )
    return "\n\n".join([wrap(asked), draw_table("lrrr", ["", *names], rows), wrap(outcome)])


DRIFT_ROWS = {
    "unchanged": "drawn from the test split's own images",
    "disjoint": "drawn from half of the test images, with the other half as reference",
    "quality 40": "all recompressed at JPEG quality 40",
    "half": "all scaled to half",
    "one in five unseen": "one in five replaced by an unseen source",
}


def render_drift_results(results: Results) -> str:
    """Write how often windows alarmed, and the smallest change that 95 in 100 windows notice."""
    drift = results["drift"]
    faces, whole = drift["kinds"]["face"], drift["kinds"]["whole"]
    alarms = [
        (f"{title}", f"{faces['alarms'][name]:.1%}", f"{whole['alarms'][name]:.1%}")
        for name, title in DRIFT_ROWS.items()
    ]
    smallest = [
        (f"{int(count):,}", f"{shares['unseen']} in 100", f"{shares['quality 40']} in 100")
        for count, shares in faces["smallest"].items()
    ]
    text = (
        f"{drift['windows']} windows of {drift['window']} each, against the observations of {drift['images']['test']} "
        f"test images of the 140k set, alarm as often as the table says. The unseen source is ciplab, with "
        f"{drift['images']['unseen']} images."
    )
    least = "The smallest share of a window that may change, so that at least 95 in 100 windows alarm:"
    return "\n\n".join(
        [
            wrap(text),
            draw_table("lrr", ("windows", "faces", "whole images"), alarms),
            wrap(least),
            draw_table("rrr", ("faces in a window", "of the unseen source", "at quality 40"), smallest),
            wrap(f"Measured on {drift['machine']}, at the level {drift['level']} and with `watch.min_distance` "
                 f"{drift['min_distance']}."),
        ]
    )  # fmt: skip


SECTIONS: dict[Path, dict[str, Callable[[Results], str]]] = {
    README: {"key results": render_key_results, "measured limits": render_measured_limits},
    BENCHMARKS: {
        "results": render_full_run,
        "training results": render_training_results,
        "lever results": render_levers,
        "accelerator results": render_accelerator_results,
        "feedback results": render_feedback_results,
        "serving results": render_serving_results,
        "soak results": render_soak_results,
        "data results": render_data_results,
        "full-size results": render_full_size,
        "drift results": render_drift_results,
    },
    SCALE: {"scale results": render_scale},
}


def fill_section(page: str, name: str, content: str) -> str:
    """Return a page's text with a section's content replaced.

    Raises:
        ValueError: unless the page has exactly one section of that name.
    """
    section = re.compile(rf"^( *<!-- {name}: .+ -->\n).*?(?=^ *<!-- end of {name} -->$)", re.M | re.S)
    if len(section.findall(page)) != 1:
        raise ValueError(f"A page must have one section between <!-- {name}: … --> and <!-- end of {name} -->.")
    return section.sub(lambda match: f"{match[1]}{content}\n", page)


def main() -> None:
    results = load_results()
    for file, sections in SECTIONS.items():
        page = file.read_text()
        for name, render in sections.items():
            page = fill_section(page, name, render(results))
        file.write_text(page)


if __name__ == "__main__":
    main()
