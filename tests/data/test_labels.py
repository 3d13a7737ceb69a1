"""Labels by folders of several names, and what is said of a source without an image that can be used."""

import os

import pytest

from deepfake_core.config import Source
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.labels import name_label
from deepfake_core.errors import DatasetError, DiskError
from deepfake_core.storage.store import open_store
from tests.builders import jpeg, write_zip

HEIC = b"\0\0\0\x18ftypheic" + bytes(1000)


def index_of(path, **rule):
    store = open_store(path.parent / "data")
    return build_index(fetch_archive(Source(name=str(path), **rule), store), store).set_index("member")


def explain(path, **rule):
    with pytest.raises(DatasetError) as caught:
        index_of(path, **rule)
    return str(caught.value)


CELEB_DF = {"real_folder": ["Celeb-real", "YouTube-real"], "fake_folder": "Celeb-synthesis"}
FACEFORENSICS = {"real_folder": "original_*", "fake_folder": ["manipulated_*", "Deepfake[s1]"]}


@pytest.mark.parametrize(
    ("rule", "folder", "label"),
    [
        (CELEB_DF, "top/Celeb-real/id0", "real"),
        (CELEB_DF, "YouTube-real", "real"),
        (CELEB_DF, "Celeb-synthesis/id0_id1", "fake"),
        (CELEB_DF, "celeb-real", ""),
        (FACEFORENSICS, "original_sequences/youtube/c23", "real"),
        (FACEFORENSICS, "manipulated_sequences/Face2Face/c40", "fake"),
        (FACEFORENSICS, "original_sequences/Deepfakes", "fake"),
        (FACEFORENSICS, "original/Deepfake", ""),
        ({"real_folder": "[real]"}, "a/[real]", "real"),
    ],
)
def test_several_folders_and_patterns_name_a_class(rule, folder, label):
    assert name_label(Source(name="./a", **rule), folder) == label


def test_a_source_of_several_folders_per_class_is_indexed(tmp_path):
    members = {
        f"{folder}/{i}.jpg": jpeg(10 * k + i)
        for k, folder in enumerate(("Celeb-real", "YouTube-real", "Celeb-synthesis"))
        for i in range(2)
    }
    index = index_of(write_zip(tmp_path / "celeb.zip", members), **CELEB_DF)
    assert index["label"].value_counts().to_dict() == {"real": 4, "fake": 2}


def test_a_folder_that_patterns_of_both_classes_fit_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"real_or_fake/a.jpg": jpeg(1)})
    assert "'real_or_fake' fits `real_folder` 'real*' and `fake_folder` '*fake'" in explain(
        path, real_folder="real*", fake_folder="*fake"
    )


def test_links_that_lead_out_say_so(tmp_path):
    folder = tmp_path / "linked" / "real"
    folder.mkdir(parents=True)
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (folder / "a.jpg").symlink_to(tmp_path / "a.jpg")
    message = explain(folder.parent)
    assert "links lead out of the source" in message
    assert "follow_links: true" in message
    assert "Correct `real_folder`" not in message
    assert index_of(folder.parent, follow_links=True)["reason"].to_dict() == {"real/a.jpg": ""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])
def test_what_may_not_be_read_says_so(tmp_path, mode):
    folder = tmp_path / "faces"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "a.jpg").write_bytes(jpeg(1))
    path = write_zip(tmp_path / "below" / "faces.zip", {"real/a.jpg": jpeg(1)})
    path.chmod(0)
    folder.chmod(mode)
    try:
        message = explain(folder)
        with pytest.raises(DiskError, match=r"must be able to read and write .*faces.zip"):
            index_of(path)
        path.parent.chmod(0)
        with pytest.raises(DiskError, match=r"must be able to read and write .*faces.zip"):
            index_of(path)
    finally:
        for each in (folder, path.parent):
            each.chmod(0o755)
    assert "This user can't read some of its files and folders: grant access" in message
    assert "Correct `real_folder`" not in message


@pytest.mark.parametrize("name", ["real/IMG_1.HEIC", "real/renamed.jpg"])
def test_heic_says_so(tmp_path, name):
    message = explain(write_zip(tmp_path / "phone.zip", {name: HEIC}))
    assert "HEIC and AVIF images are not read: convert them to JPEG" in message
    assert "Correct `real_folder`" not in message


def test_a_zip_in_a_zip_says_so(tmp_path):
    inner = write_zip(tmp_path / "faces.zip", {"real/a.jpg": jpeg(1)}).read_bytes()
    message = explain(write_zip(tmp_path / "outer.zip", {"set/faces.ZIP": inner, "readme.txt": b"hello"}))
    assert "Archives inside a source are not read: unpack set/faces.ZIP" in message
    assert "Correct `real_folder`" not in message


def test_all_that_applies_is_said(tmp_path):
    message = explain(write_zip(tmp_path / "mixed.zip", {"a/b.heic": HEIC, "a/c.zip": b"PK", "a/d.jpg": jpeg(1)}))
    assert all(part in message for part in ("convert them to JPEG", "unpack a/c.zip", "Correct `real_folder`"))
