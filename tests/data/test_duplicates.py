import itertools
import tempfile
import tracemalloc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfake_core.config import Source
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.hashes import hash_thumbnails
from deepfake_core.data.index import build_index, read_facts, write_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import LINK_COLUMNS, find_links, find_or_read_links
from deepfake_core.data.search_shards import SearchShard, search_shard
from deepfake_core.storage.store import open_store
from tests.builders import FACES, draw_image, encode, faces, forbid, jpeg, needs_faces, recode, write_zip


def rows_of(*images: tuple[str, str, str, str, str]) -> pd.DataFrame:
    """Make index rows from source, member, sha256, label and reason; an image's member is its width."""
    frame = pd.DataFrame(images, columns=["source", "member", "sha256", "label", "reason"])
    return frame.assign(width=frame["member"].str.extract(r"(\d+)")[0].astype(int), height=1, bytes=1)


def links_of(*pairs: tuple[str, str, bool]) -> pd.DataFrame:
    rows = [(*sorted(pair[:2]), 10, 0.9, 20.0, pair[2]) for pair in pairs]
    return pd.DataFrame(rows, columns=LINK_COLUMNS).astype({"same_picture": bool})


NO_LINKS = links_of()


def test_of_equal_bytes_the_source_listed_first_keeps_them():
    rows = mark_duplicates(
        rows_of(("b", "1.jpg", "p", "real", ""), ("b", "1_.jpg", "p", "real", ""), ("a", "1.jpg", "p", "real", "")),
        NO_LINKS,
    )
    assert rows["reason"].tolist() == ["kept", "duplicate", "duplicate"]
    assert rows["copy_of"].tolist() == ["", "p", "p"]


def test_of_one_picture_the_largest_is_kept_and_all_say_which():
    images = rows_of(("a", "1", "p", "real", ""), ("b", "3", "q", "real", ""), ("b", "2", "r", "real", ""))
    rows = mark_duplicates(images, links_of(("p", "q", True), ("r", "q", True)))
    assert rows["reason"].tolist() == ["copy", "kept", "copy"]
    assert rows["copy_of"].tolist() == ["q", "", "q"]
    assert rows["group"].tolist() == ["p"] * 3


def test_near_but_different_pictures_are_all_kept_in_one_group():
    images = rows_of(("a", "1", "p", "fake", ""), ("a", "2", "q", "fake", ""), ("a", "3", "r", "fake", ""))
    rows = mark_duplicates(images, links_of(("p", "q", False), ("q", "r", False)))
    assert rows["kept"].all()
    assert rows["group"].tolist() == ["p"] * 3


@pytest.mark.parametrize("same_picture", [True, False])
def test_different_labels_are_all_kept_in_one_group(same_picture):
    images = rows_of(("a", "1", "p", "real", ""), ("a", "2", "q", "fake", ""))
    rows = mark_duplicates(images, links_of(("p", "q", same_picture)))
    assert rows["kept"].all()
    assert rows["group"].tolist() == ["p"] * 2


def test_equal_bytes_under_both_labels_are_dropped_on_both_sides():
    rows = mark_duplicates(
        rows_of(
            ("a", "1", "p", "real", ""),
            ("b", "1", "p", "fake", ""),
            ("b", "1", "p", "fake", ""),
            ("b", "1", "q", "fake", ""),
        ),
        links_of(("p", "q", True)),
    )
    assert rows["reason"].tolist() == ["label_conflict", "label_conflict", "label_conflict", "kept"]


def test_unusable_rows_keep_their_reason_and_group_with_nothing():
    rows = mark_duplicates(rows_of(("a", "1", "p", "real", "truncated"), ("a", "2", "p", "", "no_label")), NO_LINKS)
    assert rows["reason"].tolist() == ["truncated", "no_label"]
    assert rows["group"].tolist() == ["", ""]
    assert not rows["kept"].any()


def test_a_chain_does_not_swallow_a_class(monkeypatch, caplog):
    monkeypatch.setattr("deepfake_core.data.groups.MAX_GROUP_IMAGES", 5)
    names = [f"{i:03}" for i in range(100)]
    images = rows_of(*(("a", "1", name, "fake", "") for name in names))
    chain = links_of(*((one, other, False) for one, other in itertools.pairwise(names)))
    rows = mark_duplicates(images, chain)
    assert rows["kept"].all()
    assert rows.groupby("group").size().max() <= 5
    assert "left in groups of their own" in caplog.text
    copies = mark_duplicates(images, chain.assign(same_picture=True))
    assert copies["group"].nunique() == 1  # copies of one picture are no chain of likenesses


def index_of(path: Path) -> pd.DataFrame:
    return build_index(fetch_archive(Source(name=str(path)), open_store(path.parent)), open_store(path.parent / "data"))


def keep(index: pd.DataFrame, folder: Path) -> Path:
    """Write an index into a file."""
    index.to_parquet(folder / "index.parquet", index=False)
    return folder / "index.parquet"


def test_pictures_that_were_searched_before_are_not_searched_again(tmp_path, monkeypatch):
    store = open_store(tmp_path / "data")
    picture = jpeg(1)
    members = {"real/1.jpg": picture, "real/2.jpg": recode(picture), "fake/3.jpg": jpeg(2)}
    source = Source(name=str(write_zip(tmp_path / "a.zip", members)))
    whole = write_index(fetch_archive(source, store), store)
    index = pd.read_parquet(whole)
    first = find_or_read_links([whole], store)
    assert len(first) == 1
    with monkeypatch.context() as patch:
        forbid(patch, "deepfake_core.data.links.find_in_shards")
        pd.testing.assert_frame_equal(find_or_read_links([keep(index[::-1], tmp_path)], store), first)
        with pytest.raises(AssertionError):
            find_or_read_links([keep(index.iloc[1:], tmp_path)], store)
    pd.testing.assert_frame_equal(find_or_read_links([whole], store), find_links(index))


def draw_many(count: int, folder: Path) -> Path:
    """Write an index of distinct pictures."""
    random = np.random.default_rng(count)
    pixels = random.integers(0, 256, (count, 32, 32), dtype=np.uint8)
    rows = [
        (random.bytes(32).hex(), one.tobytes(), bits.tobytes())
        for one, bits in zip(pixels, hash_thumbnails(pixels), strict=True)
    ]
    index = pd.DataFrame(rows, columns=["sha256", "thumbnail", "hash"])
    index = index.assign(source="s", member=index["sha256"], label="real", reason="", format="JPEG", jpeg_table="")
    index.assign(width=1, height=1, bytes=1).to_parquet(folder / f"{count}.parquet", row_group_size=1000)
    return folder / f"{count}.parquet"


@pytest.mark.slow
def test_no_stage_holds_all_thumbnails_or_hashes_of_views(tmp_path, monkeypatch):
    """Memory may grow by half of what the thumbnails alone are."""
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 2)
    peaks = []
    for count in (10_000, 30_000):
        file, store = draw_many(count, tmp_path), open_store(tmp_path / "data")
        tracemalloc.start()
        links = find_or_read_links([file], store)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        mark_duplicates(read_facts([file]), links)
        peaks.append((found, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    for before, after in zip(*peaks, strict=True):
        assert after - before < 20_000 * 1024 / 2


def test_a_search_that_was_killed_goes_on_from_its_finished_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 350)
    file, store, begun = draw_many(60, tmp_path), open_store(tmp_path / "data"), list[str]()

    def run(shards: Sequence[SearchShard]) -> None:
        for number, shard in enumerate(shards):
            begun.append(str(shard))
            if killed and number == 2:
                raise KeyboardInterrupt
            search_shard(shard, threads=1)

    killed = True
    with pytest.raises(KeyboardInterrupt):
        find_or_read_links([file], store, run)
    killed = False
    with monkeypatch.context() as patch:
        forbid(patch, "deepfake_core.data.pictures.hash_thumbnails")
        links = find_or_read_links([file], store, run)
    assert begun == [f"hash tables {part}" for part in ("0-100", "100-200", "200-300", "200-300", "300-350")]
    pd.testing.assert_frame_equal(links, find_links(pd.read_parquet(file)))
    assert list(store.indexes().glob(".*")) == []


def test_a_search_that_was_killed_while_pairs_were_compared_goes_on_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 100)
    store, begun = open_store(tmp_path / "data"), list[str]()
    file = keep(POOL.drop_duplicates("sha256"), tmp_path)
    expected = find_links(pd.read_parquet(file))
    monkeypatch.setattr("deepfake_core.data.search_shards.PAIRS_IN_SHARD", 7)

    def run(shards: Sequence[SearchShard]) -> None:
        for shard in shards:
            begun.append(str(shard))
            if killed and str(shard) == "pairs 14-21":
                raise KeyboardInterrupt
            search_shard(shard, threads=1)

    for killed in (True, False):
        with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
            pd.testing.assert_frame_equal(find_or_read_links([file], store, run), expected)
    assert begun[:5] == ["hash tables 0-100", "pairs 0-7", "pairs 7-14", "pairs 14-21", "pairs 14-21"]
    assert len(set(begun[4:])) == len(begun[4:]) > 1
    assert list(store.indexes().glob(".*")) == []


def test_a_search_of_other_pictures_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
    store = open_store(tmp_path / "data")

    def run(shards: Sequence[SearchShard]) -> None:
        raise KeyboardInterrupt(shards[0])

    for count in (5, 6):
        with pytest.raises(KeyboardInterrupt):
            find_or_read_links([draw_many(count, tmp_path)], store, run)
        assert len(list(store.indexes().glob(".near copies*"))) == 1


@pytest.mark.slow
def test_where_an_archive_grew_only_what_is_new_is_searched(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 100)
    monkeypatch.setattr("deepfake_core.data.links.MAX_SHARE_NEW", 0.5)
    caplog.set_level("INFO")
    store = open_store(tmp_path / "data")
    copies = {f"fake/small{i}.jpg": encode(draw_image(i).resize((44, 44)), quality=85) for i in range(10)}
    mirrored = draw_image(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for members, new in (
        (faces(10), 20),
        (faces(10) | copies, 10),
        (faces(10) | copies | {"real/mirrored.jpg": encode(mirrored, quality=90)}, 1),
        (faces(9) | copies, 0),
        (faces(10) | {"real/again.jpg": recode(jpeg(3))}, 4),  # it stands for its copy from now on
    ):
        path = write_zip(tmp_path / "a.zip", members)
        index = write_index(fetch_archive(Source(name=str(path)), store), store)
        caplog.clear()
        with monkeypatch.context() as patch:
            if new < 20:
                forbid(patch, "deepfake_core.data.links.find_in_shards")
            links = find_or_read_links([index], store)
        assert f"{new} of them new" in caplog.text
        pd.testing.assert_frame_equal(links, find_links(pd.read_parquet(index)))
        pd.testing.assert_frame_equal(links, find_or_read_links([index], store))


def test_copies_crops_and_edits_of_drawn_pictures_are_grouped(tmp_path):
    image = draw_image(1, 256, 24)
    edited = image.copy()
    edited.paste(draw_image(2, 64), (96, 160))
    members = faces(20) | {
        "real/original.png": encode(image, "PNG"),
        "real/recoded.jpg": recode(encode(image, quality=90)),
        "real/small.jpg": encode(image.resize((100, 100), Image.Resampling.LANCZOS), quality=60),
        "real/cropped.jpg": encode(image.crop((8, 8, 248, 248)), quality=90),
        "real/mirrored.jpg": encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), quality=90),
        "fake/edited.jpg": encode(edited, quality=90),
    }
    index = index_of(write_zip(tmp_path / "a.zip", members))
    rows = mark_duplicates(index, find_links(index)).set_index("member")
    (group,) = set(rows.loc[list(members)[40:], "group"])
    assert (rows["group"] == group).sum() == 6
    assert rows.loc[list(members)[40:], "reason"].to_dict() == {
        "real/original.png": "kept",
        "real/recoded.jpg": "copy",
        "real/small.jpg": "copy",
        "real/cropped.jpg": "kept",
        "real/mirrored.jpg": "kept",
        "fake/edited.jpg": "kept",
    }


def test_even_pictures_are_no_copies_of_each_other(tmp_path):
    members = faces(2) | {f"real/grey{i}.png": encode(Image.new("L", (50, 50), 20 * i), "PNG") for i in range(10)}
    links = find_links(index_of(write_zip(tmp_path / "a.zip", members)))
    assert links.empty


def test_no_images_have_no_links(tmp_path):
    index = index_of(write_zip(tmp_path / "a.zip", faces(1)))
    assert list(find_links(index.iloc[:0]).columns) == LINK_COLUMNS
    assert mark_duplicates(index.iloc[:0], NO_LINKS).empty


def test_links_do_not_depend_on_the_order_of_rows_or_cores(tmp_path, monkeypatch):
    copies = {f"real/small{i}.jpg": encode(draw_image(i).resize((44, 44)), quality=85) for i in range(20)}
    index = index_of(write_zip(tmp_path / "a.zip", faces(20) | copies))
    links = find_links(index)
    assert len(links) >= 20
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    pd.testing.assert_frame_equal(find_links(index.sample(frac=1, random_state=1)), links)


@pytest.mark.slow
@needs_faces
def test_edits_of_one_photograph_share_a_group_and_different_people_do_not(tmp_path):
    from benchmarks.near_copies import JUDGED_TRUE, KNOWN_PAIRS

    images = {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for source in ("ciplab", "140k")
        for path in (FACES / "faces" / source).rglob("*.jpg")
    }
    index = index_of(write_zip(tmp_path / "a.zip", images))
    links = find_links(index)
    rows = mark_duplicates(index, links)
    group = rows.set_index(rows["member"].map(lambda member: Path(member).stem))["group"]
    assert len(group) == 2400
    for one, other in KNOWN_PAIRS:
        assert group[one] == group[other]
    groups = {" ".join(sorted(part.index)) for _, part in group.groupby(group) if len(part) > 1}
    assert groups <= JUDGED_TRUE  # no others: different people share none
    assert len(groups) >= 0.9 * len(JUDGED_TRUE)
    assert rows["kept"].all()
    assert not links["same_picture"].any()


def test_jpeg_and_its_recoded_twin_are_one_picture(tmp_path):
    index = index_of(write_zip(tmp_path / "a.zip", {"real/a.jpg": jpeg(1), "real/b.jpg": recode(jpeg(1))}))
    rows = mark_duplicates(index, find_links(index)).set_index("member")
    assert rows["reason"].to_dict() == {"real/a.jpg": "copy", "real/b.jpg": "kept"}


def describe_pictures(named: list[tuple[str, np.ndarray]]) -> pd.DataFrame:
    """Make index rows from SHA-256 and thumbnail."""
    rows = [(name, pixels.tobytes(), hash_thumbnails(pixels[None])[0].tobytes()) for name, pixels in named]
    return pd.DataFrame(rows, columns=["sha256", "thumbnail", "hash"]).assign(reason="")


def draw_pool() -> pd.DataFrame:
    """Draw families of pictures: alike, mirrored, of equal hashes, and one that is decoded anew to other pixels."""
    random = np.random.default_rng(0)
    pool = [(random.bytes(32).hex(), np.full((32, 32), 7, np.uint8))]
    for family in range(6):
        smooth = np.asarray(draw_image(family, 32, 8).convert("L"))
        alike = [np.clip(smooth + random.normal(0, 2 * i, smooth.shape), 0, 255).astype(np.uint8) for i in range(5)]
        pool += [(random.bytes(32).hex(), one) for one in (*alike, smooth[:, ::-1], smooth, smooth)]
        pool.append((pool[-2][0], alike[1]))
    return describe_pictures(pool)


def draw_film() -> pd.DataFrame:
    """Draw pictures that are nearly equal, so that they share many buckets."""
    random = np.random.default_rng(1)
    scene = np.asarray(draw_image(100, 32, 8).convert("L"))
    frames = [np.clip(scene + random.normal(0, 0.5, scene.shape), 0, 255).astype(np.uint8) for _ in range(40)]
    return describe_pictures([(random.bytes(32).hex(), frame) for frame in frames])


POOL, FILM = draw_pool(), draw_film()


@pytest.mark.parametrize("among_many_first", [True, False])
def test_between_few_and_many_pictures_the_search_begins_anew(tmp_path, monkeypatch, among_many_first):
    """Few are all compared, and many by tables, of which one alone misses most pairs."""
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 1)
    monkeypatch.setattr("deepfake_core.data.links.MAX_SHARE_NEW", 1.0)
    found = []
    for among_many in (among_many_first, not among_many_first):
        monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0 if among_many else 10**10)
        index = POOL.drop_duplicates("sha256").iloc[1 + len(found) :]  # the first is even
        links = find_or_read_links([keep(index, tmp_path)], open_store(tmp_path / "data"))
        pd.testing.assert_frame_equal(links, find_links(index))
        found.append(len(links))
    assert (found[0] < found[1]) == among_many_first


MISSING = st.sets(st.sampled_from(range(len(POOL))), max_size=20)


@pytest.mark.sweep
@settings(max_examples=25, deadline=None)
@given(searches=st.lists(st.tuples(MISSING, st.sampled_from((0, 4, 8, 11, 40))), min_size=2, max_size=4))
def test_a_search_that_goes_on_from_another_finds_what_a_search_anew_does(searches):
    """With up to 11 frames no bucket is full; with more, some are."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)
        patch.setattr("deepfake_core.data.hash_tables.TABLES", 20)
        patch.setattr("deepfake_core.data.links.MAX_SHARE_NEW", 1.0)
        for module in ("hash_tables", "neighbours"):
            patch.setattr(f"deepfake_core.data.{module}.MAX_NEIGHBOURS", 11)
        for missing, frames in searches:
            present = POOL[~POOL.index.isin(missing)].drop_duplicates("sha256")
            index = pd.concat([present, FILM.iloc[:frames]])
            file = keep(index, Path(folder))
            pd.testing.assert_frame_equal(find_or_read_links([file], open_store(folder)), find_links(index))
