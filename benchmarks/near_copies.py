"""Near copies: how many planted ones end in their original's group, and what is grouped among real faces.

    python benchmarks/near_copies.py ARCHIVES

ARCHIVES holds real-and-fake-face-detection.zip and 140k-real-and-fake-faces.zip. Of 500 of their images, drawn at
random, copies of fifteen kinds are made, and each kind is searched for alone among all images. The results go into
benchmarks/results/near_copies.json, which the README quotes. Whether the groups found among the images themselves are
true is for the eye: the report's gallery shows them, and `JUDGED_TRUE` lists those that were seen to be.
"""

import argparse
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter

from deepfake_core.config import KAGGLE_SOURCES
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.storage.files import write_json
from deepfake_core.storage.store import open_store

RESULTS = Path(__file__).parent / "results" / "near_copies.json"
SOURCES = [KAGGLE_SOURCES[0], KAGGLE_SOURCES[2]]
PLANTED = 500

KNOWN_PAIRS = (
    ("easy_94_0001", "real_00858"),
    ("easy_130_1101", "real_01060"),
    ("easy_177_1010", "real_00874"),
    ("easy_155_0011", "real_00150"),
    ("easy_123_0100", "real_00753"),
    ("hard_127_0011", "hard_84_0011"),
)
"""Edits and their sources, known before this was written."""

JUDGED_TRUE = {
    "0C3SNOUVEY 0CSC8SIMA9",
    "0GTFMAQMQQ 0R4POY5DTW",
    "0MJ9X634NH 0PUM4O6RRM",
    "0YYEKMF3GY 1DKCGEETES",
    "easy_123_0100 real_00753",
    "easy_130_1101 real_01060",
    "easy_136_0111 real_00748",
    "easy_145_1000 real_00289",
    "easy_150_0011 real_00211",
    "easy_155_0011 real_00150",
    "easy_158_0011 real_00065",
    "easy_177_1010 real_00874",
    "easy_214_0011 mid_458_1111",
    "easy_216_1100 real_00159",
    "easy_21_0011 real_00552",
    "easy_237_0011 real_00955",
    "easy_23_1100 real_00832",
    "easy_41_0001 real_00649",
    "easy_75_1100 real_00270",
    "easy_94_0001 real_00858",
    "hard_127_0011 hard_84_0011",
    "mid_426_1111 real_00216",
}
"""Groups found among the 2,400 images that show one photograph, or neighbours in a generator's latent space: judged by
eye on 2026-11-23, in the gallery of the report. None was judged false."""


def resize(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def crop(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut off shares of the width and height at the four sides."""
    width, height = image.size
    box = (round(width * left), round(height * top), width - round(width * right), height - round(height * bottom))
    return image.crop(box)


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{f"JPEG quality {quality}": lambda image: image for quality in (30, 50, 75, 95)},
    "scaled by 0.25": lambda image: resize(image, 0.25),
    "scaled by 0.5": lambda image: resize(image, 0.5),
    "scaled by 2": lambda image: resize(image, 2),
    "blurred, sigma 1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "brightened by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darkened by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "grey": lambda image: image.convert("L"),
    "cropped by 3 % at each side": lambda image: crop(image, 0.03, 0.03, 0.03, 0.03),
    "cropped by 1.5 % at each side": lambda image: crop(image, 0.015, 0.015, 0.015, 0.015),
    "cropped by 3 % at left and top": lambda image: crop(image, 0.03, 0.03, 0, 0),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def make_copies(data: bytes) -> dict[str, bytes]:
    """Make a copy of each kind from an encoded image, as a JPEG."""
    original = Image.open(io.BytesIO(data)).convert("RGB")
    copies = {}
    for kind, change in KINDS.items():
        buffer = io.BytesIO()
        quality = int(kind.split()[-1]) if kind.startswith("JPEG") else 90
        change(original).save(buffer, "JPEG", quality=quality)
        copies[kind] = buffer.getvalue()
    return copies


def read_distinct(archives: Path) -> dict[str, bytes]:
    """Read each distinct image once, as label/name."""
    images = {}
    for source in SOURCES:
        with zipfile.ZipFile(archives / f"{source.short_name}.zip") as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)
                if path.suffix == ".jpg":
                    label = "fake" if path.parent.name in ("fake", "training_fake") else "real"
                    images[f"{label}/{path.name}"] = archive.read(name)
    return images


def plant(images: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    names = sorted(images)
    chosen = np.random.default_rng(0).choice(names, min(PLANTED, len(names)), replace=False).tolist()
    with ProcessPoolExecutor() as pool:
        for name, copies in zip(chosen, pool.map(make_copies, [images[name] for name in chosen]), strict=True):
            for kind, data in copies.items():
                label, file = name.split("/")
                yield f"{kind}/{label}/{file}", data


def index_images(images: dict[str, bytes]) -> pd.DataFrame:
    """Run the product's own index over images, through a zip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in images.items():
                archive.writestr(name, data)
        source = SOURCES[1].model_copy(update={"name": str(path), "csv_real_label": None})
        return build_index(fetch_archive(source, open_store(folder)), open_store(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    images = read_distinct(parser.parse_args().archives)
    index = index_images(images | dict(plant(images)))
    kind = index["member"].map(lambda member: member.rpartition("/")[0].rpartition("/")[0])
    original = index["member"].map(lambda member: "/".join(member.split("/")[-2:]))

    links = find_links(index[kind == ""])
    rows = mark_duplicates(index[kind == ""], links)
    stems = rows["member"].map(lambda member: PurePosixPath(member).stem)
    groups = {" ".join(sorted(stems[members])) for members in rows.groupby("group").groups.values() if len(members) > 1}
    group = rows.set_index(stems)["group"]
    known = sum(group[one] == group[other] for one, other in KNOWN_PAIRS)
    print(f"{len(rows)} distinct images: {len(groups)} groups, {len(groups & JUDGED_TRUE)} of them true")
    print(f"not judged yet: {sorted(groups - JUDGED_TRUE) or 'none'}")
    print(f"known pairs in one group: {known} of {len(KNOWN_PAIRS)}")
    merged_among_distinct = int(links["same_picture"].sum())

    planted, merged = {}, 0
    for name in KINDS:
        part = index[kind.isin(["", name])]
        links = find_links(part)
        rows = mark_duplicates(part, links)
        planted[name] = measure(rows, original[part.index].to_numpy())
        merged += count_merged(links, rows, original[part.index].to_numpy())
        shares = planted[name]
        print(f"{name:32} {shares['grouped']:.1%} grouped, {shares['one_kept']:.1%} taken for the same picture")
    print(f"pairs of different originals taken for the same picture: {merged_among_distinct + merged}")
    write_json(
        RESULTS,
        {
            "distinct_images": int((kind == "").sum()),
            "groups": len(groups),
            "groups_judged_true": len(groups & JUDGED_TRUE),
            "known_pairs": len(KNOWN_PAIRS),
            "known_pairs_grouped": int(known),
            "planted_originals": min(PLANTED, len(images)),
            "planted": planted,
            "different_originals_merged": merged_among_distinct + merged,
        },
    )
    print(f"written: {RESULTS}")


def measure(rows: pd.DataFrame, original: np.ndarray) -> dict[str, float]:
    """Return the shares of copies in their original's group, and of pairs of which one was left out as a copy."""
    by_member = rows.set_index("member")
    copies = by_member[by_member.index != original]
    originals = by_member.loc[original[by_member.index != original]]
    left_out = (copies["reason"].to_numpy() == "copy") | (originals["reason"].to_numpy() == "copy")
    return {
        "grouped": float((copies["group"].to_numpy() == originals["group"].to_numpy()).mean()),
        "one_kept": float(left_out.mean()),
    }


def count_merged(links: pd.DataFrame, rows: pd.DataFrame, original: np.ndarray) -> int:
    """Count the pairs of different originals that are linked as the same picture."""
    names = pd.Series(original, index=rows["sha256"])
    names = names[~names.index.duplicated()]
    different = links["image"].map(names) != links["other"].map(names)
    return int((links["same_picture"] & different).sum())


if __name__ == "__main__":
    main()
