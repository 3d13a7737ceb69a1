"""Every file of a zip or folder is a member of its own, and of what is not read the reason is said."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from deepfake_core.config import Source
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.members import list_folder
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.store import open_store
from tests.builders import draw_image, encode, faces, jpeg, mpo, prepare, write_zip


def index_of(path: Path, **rule: object):
    store = open_store(path.parent / "data")
    return build_index(fetch_archive(Source(name=str(path), **rule), store), store).set_index("member")


def reasons_of(path: Path, **rule: object) -> dict[str, str]:
    return index_of(path, **rule)["reason"].to_dict()


@pytest.fixture
def folder(tmp_path):
    """A folder with one real image, and a folder outside it with another."""
    for place, seed in (("faces/real", 1), ("outside/fake", 2)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / f"{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path / "faces"


def test_phones_pictures_and_odd_members_are_published_in_one_data_set(tmp_path):
    odd = {
        "real/phone.jpg": mpo(draw_image(501, 96)),
        "fake/phone.jpg": mpo(draw_image(502, 96)),
        "fake/._phone.jpg": b"\0\5\x16\7" + bytes(100),
        "__MACOSX/fake/phone.jpg": jpeg(503),
        "": jpeg(504),
        "real\\windows\\a.jpg": jpeg(505),
        "\\real\\b.jpg": jpeg(506),
    }
    path = write_zip(tmp_path / "odd.zip", faces(20) | odd)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("fake/0.jpg", jpeg(507))
    dataset = prepare(tmp_path / "data", path)
    rows = dataset.manifest.set_index("member")
    assert len(rows) == 40 + len(odd) + 1
    assert rows["reason"].loc[[name.replace("\\", "/") for name in odd]].tolist() == [
        "kept",
        "kept",
        "system_file",
        "system_file",
        "unsafe_name",
        "kept",
        "unsafe_name",
    ]
    assert rows.loc["fake/0.jpg (2)", "reason"] == "kept"
    phone = dataset.path / rows.loc["real/phone.jpg", "path"]
    assert (phone.suffix, phone.read_bytes()) == (".jpg", odd["real/phone.jpg"])
    assert dataset.description["counts"]["reasons"] == {"kept": 44, "system_file": 2, "unsafe_name": 2}


def test_folders_of_a_zip_made_on_windows_name_the_label(tmp_path):
    path = write_zip(
        tmp_path / "windows.zip", {"set\\real\\": b"", "set\\real\\a.jpg": jpeg(1), "set\\fake\\b.png": jpeg(2)}
    )
    index = index_of(path)
    assert index["label"].to_dict() == {"set/real/a.jpg": "real", "set/fake/b.png": "fake"}


def test_files_of_a_folder_whose_names_are_shown_alike_are_told_apart(folder):
    for seed, name in ((3, b"a\xff.jpg"), (4, b"a\\xff.jpg")):
        Path(os.fsdecode(os.fsencode(folder / "real") + b"/" + name)).write_bytes(jpeg(seed))
    index = index_of(folder)
    assert index["reason"].to_dict() == {"real/1.jpg": "", "real/a\\xff.jpg": "", "real/a\\xff.jpg (2)": ""}
    assert index["sha256"].nunique() == 3


def test_a_folder_of_a_zip_that_holds_bytes_is_listed(tmp_path):
    path = write_zip(tmp_path / "odd.zip", {"real/": b"", "real/a.jpg": jpeg(1), "real/b/": b"bytes"})
    assert reasons_of(path) == {"real/a.jpg": "", "real/b/": "not_a_file"}


def test_what_macos_writes_beside_files_is_skipped_by_name(folder):
    for name in ("real/._1.jpg", "__MACOSX/real/1.jpg", "._real"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(1))
    (folder / "real" / ".1.jpg").write_bytes(jpeg(3))
    assert reasons_of(folder) == {
        "real/1.jpg": "",
        "real/.1.jpg": "",
        "real/._1.jpg": "system_file",
        "__MACOSX/real/1.jpg": "system_file",
        "._real": "system_file",
    }


def test_a_file_that_goes_away_is_a_row_and_is_read_once_it_is_back(folder):
    gone, aside = folder / "real" / "gone.jpg", folder.parent / "aside.jpg"
    gone.write_bytes(jpeg(3))
    store = open_store(folder.parent / "data")
    archive = fetch_archive(Source(name=str(folder)), store)
    taken = archive.open()
    shutil.move(gone, aside)
    with pytest.raises(ArchiveError, match=r"'real/gone.jpg' of .* is gone, or has other bytes.*Run again"):
        taken.read_again("real/gone.jpg", "0" * 64)
    object.__setattr__(archive, "open", lambda: taken)
    assert build_index(archive, store)["reason"].tolist() == ["", "unreadable"]
    shutil.move(aside, gone)
    again = fetch_archive(Source(name=str(folder)), store)
    assert again.sha256 == archive.sha256
    assert build_index(again, store)["reason"].tolist() == ["", ""]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_listed(folder):
    (folder / "fake").mkdir(mode=0)
    assert reasons_of(folder) == {"real/1.jpg": "", "fake": "unreadable"}


def test_links_inside_a_folder_are_followed_and_others_named(folder):
    outside = folder.parent / "outside"
    (folder / "pool").mkdir()
    (folder / "pool" / "3.jpg").write_bytes(jpeg(3))
    (folder / "fake").symlink_to("pool")
    (folder / "real" / "4.jpg").symlink_to(folder / "pool" / "3.jpg")
    (folder / "real" / "5.jpg").symlink_to(outside / "fake" / "2.jpg")
    (folder / "real" / "6.jpg").symlink_to("nothing")
    (folder / "real" / "up").symlink_to("..")
    (folder / "real" / "self").symlink_to("self")
    (folder / "beside").symlink_to(outside)
    below = {"fake/3.jpg": "", "pool/3.jpg": "no_label", "real/1.jpg": "", "real/4.jpg": ""}
    nowhere = {"real/6.jpg": "symlink", "real/up": "symlink", "real/self": "symlink"}
    assert reasons_of(folder) == {**below, **nowhere, "beside": "symlink", "real/5.jpg": "symlink"}
    assert reasons_of(folder, follow_links=True) == {**below, **nowhere, "beside/fake/2.jpg": "", "real/5.jpg": ""}


def test_folders_that_link_to_each_other_are_read_once_each_way(folder):
    (folder / "fake").mkdir()
    (folder / "fake" / "to_real").symlink_to(folder / "real")
    (folder / "real" / "to_fake").symlink_to(folder / "fake")
    (folder.parent / "outside" / "fake" / "back").symlink_to(folder)
    (folder / "out").symlink_to(folder.parent / "outside")
    index = index_of(folder, follow_links=True)
    assert index["reason"].to_dict() == {
        "real/1.jpg": "",
        "fake/to_real/1.jpg": "",
        "out/fake/2.jpg": "",
        "out/fake/back": "symlink",
        "fake/to_real/to_fake": "symlink",
        "real/to_fake/to_real": "symlink",
    }


@pytest.mark.parametrize("count", [3, 7])
def test_a_folder_that_many_links_lead_to_is_followed_once(folder, count):
    for name in range(count):
        (folder / f"p{name}" / "real").mkdir(parents=True)
        (folder / f"p{name}" / "real" / "a.jpg").write_bytes(jpeg(name))
        for other in range(count):
            (folder / f"p{name}" / f"friend{other}").symlink_to(f"../p{other}")
    members = list_folder(folder)
    assert sum(not member.problem for member in members) == 1 + 2 * count  # each as it is, and through one link
    assert len(members) < 3 * count**2


def test_a_source_that_is_a_link_is_read(folder):
    (folder.parent / "link").symlink_to(folder)
    assert reasons_of(folder.parent / "link") == {"real/1.jpg": ""}


def test_a_file_is_published_through_the_link_that_was_followed(tmp_path):
    folder = tmp_path / "faces"
    for name, data in faces(20).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    plain = prepare(tmp_path / "one", folder)
    shutil.move(folder / "fake", folder / "generated")
    (folder / "fake").symlink_to("generated")
    linked = prepare(tmp_path / "two", folder)
    assert linked.version == plain.version
    assert (linked.manifest["reason"] == "no_label").sum() == 20


def test_an_encoding_is_no_matter_of_a_name(tmp_path):
    path = write_zip(
        tmp_path / "names.zip", {"real/a.heic": jpeg(1), "real/b": encode(draw_image(2), "PNG"), "real/c.jpg": b"PK"}
    )
    assert reasons_of(path) == {"real/a.heic": "", "real/b": "", "real/c.jpg": "not_an_image"}
