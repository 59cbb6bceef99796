"""Shards from a server that fails, stalls, cuts off and changes: complete and right, or refused in one line."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convmixer.data import fetch
from convmixer.data.find import find
from convmixer.errors import RequestError
from convmixer.files import cache_folder
from data_sets import load, parts, pixels, write_parquet, write_tar
from file_server import FileServer, serving


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(fetch, "STALL_SECONDS", 0.3)
    with serving() as found:
        for number in range(3):
            shard = tmp_path / "here" / f"digits-train-{number:03}.tar"
            write_tar(shard, range(40 * number, 40 * number + 40))
            with shard.open("ab") as file:  # larger than what a client buffers
                file.write(bytes(1_000_000))
            found.files[f"/set/{shard.name}"] = shard.read_bytes()
        yield found


ONE = "/set/digits-train-000.tar"


def gets(server: FileServer) -> list[tuple[str, int]]:
    return [(path, start) for method, path, start in server.asked if method == "GET"]


def copies(name: str = "*.tar") -> list[Path]:
    return sorted(cache_folder("shards").rglob(name))


def test_a_range_of_shards_is_read_as_the_files_are(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/set/digits-train-{{000..002}}.tar"
    data, local = load(url), load(tmp_path / "here")
    assert [pixels(part) for part in parts(data)] == [pixels(part) for part in parts(local)]
    assert (data.checksum, data.classes, data.spec) == (local.checksum, local.classes, url)
    assert len(gets(server)) == 3
    load(url)
    assert len(gets(server)) == 3  # the second time from the copies


def test_a_list_names_shards_beside_it(server: FileServer) -> None:
    names = [f"{server.url}/set/digits-train-000.tar", "# the rest", "", "digits-train-001.tar"]
    server.files["/set/all.txt"] = "\n".join(names).encode()
    assert len(find(f"{server.url}/set/all.txt").splits["train"][1]) == 80
    for line, reason in (
        ("http://169.254.169.254/secret.tar", "on another server, which is not opened"),
        ("file:///etc/passwd.tar", "on another server, which is not opened"),
        ("s3://bucket/x.tar", "on another server, which is not opened"),
        ("notes.csv", "names files with .csv: expected all .tar or all .parquet"),
        ("", "names 0 files"),
        ("\udcff.tar", "it is not text"),
    ):
        server.files["/set/bad.txt"] = line.encode(errors="surrogateescape")
        with pytest.raises(RequestError, match=reason):
            find(f"{server.url}/set/bad.txt")
    server.files["/set/long.txt"] = b"a.tar\n" * 4_000_000
    with pytest.raises(RequestError, match="more than the limit of 16777216 for such a file"):
        find(f"{server.url}/set/long.txt")


def test_parquet_and_splits_in_the_name(server: FileServer, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", range(60))
        server.files[f"/{split}/0.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    server.files["/all.txt"] = b"train/0.parquet\ntest/0.parquet\n"
    assert set(find(f"{server.url}/all.txt").splits) == {"train", "test"}


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "stall", "away", "drip"])
def test_a_passing_fault_is_tried_again(server: FileServer, capfd: pytest.CaptureFixture[str], fault: object) -> None:
    server.faults[ONE] = [fault, fault]
    assert len(find(server.url + ONE).splits["train"][1]) == 40
    assert copies()[0].read_bytes() == server.files[ONE]
    assert "; trying again in 0.01 s" in capfd.readouterr().err
    if fault in ("cut", "stall", "drip"):  # goes on from where it stopped
        starts = [start for _, start in gets(server)]
        assert 0 == starts[0] < starts[1] <= starts[2]


def test_a_server_that_cannot_skip_begins_anew(server: FileServer) -> None:
    server.skips = False
    server.faults[ONE] = ["cut", "cut"]
    find(server.url + ONE)
    assert copies()[0].read_bytes() == server.files[ONE]
    assert [start for _, start in gets(server)] == [0, 0, 0]


def test_what_arrived_is_kept_for_the_next_start(server: FileServer) -> None:
    server.faults[ONE] = ["cut"] + [500] * 3
    with pytest.raises(RequestError, match=r"after 4 tries: the server answers 500; the bytes that arrived are kept"):
        find(server.url + ONE)
    assert not copies()  # only whole files have a name
    find(server.url + ONE)
    assert gets(server)[-1][1] > 100_000
    assert copies()[0].read_bytes() == server.files[ONE]


def test_what_cannot_succeed_is_not_tried_again(server: FileServer) -> None:
    with pytest.raises(RequestError, match=r"none\.tar cannot be read: the server answers 404"):
        find(f"{server.url}/set/none.tar")
    server.faults[ONE] = [403]
    with pytest.raises(RequestError, match="cannot be read: the server answers 403"):
        find(server.url + ONE)
    assert len(gets(server)) == 2


def test_a_changed_file_is_fetched_anew_and_the_old_copy_stays(server: FileServer, tmp_path: Path) -> None:
    before = find(server.url + ONE)
    write_tar(tmp_path / "other.tar", range(200, 250))
    server.files[ONE] = (tmp_path / "other.tar").read_bytes()
    after = find(server.url + ONE)
    assert (len(before.splits["train"][1]), len(after.splits["train"][1])) == (40, 50)
    assert before.checksum != after.checksum
    assert len(before.splits["train"][0].encoded(39)) > 0  # a run that reads it goes on


def test_a_file_that_changes_while_it_is_fetched_is_no_mixture(server: FileServer, tmp_path: Path) -> None:
    write_tar(tmp_path / "other.tar", range(200, 250))
    server.faults[ONE] = [lambda: server.files.update({ONE: (tmp_path / "other.tar").read_bytes()})]
    with pytest.raises(RequestError, match="changed while it was fetched: start again"):
        find(server.url + ONE)
    assert len(find(server.url + ONE).splits["train"][1]) == 50


def test_without_a_mark_nothing_is_resumed_and_a_note_says_so(server: FileServer) -> None:
    server.marks = False
    server.faults[ONE] = ["cut"]
    found = find(server.url + ONE)
    assert any("neither ETag nor date" in note for note in found.notes)
    assert copies()[0].read_bytes() == server.files[ONE]


def test_an_unreachable_server_leaves_the_copies(server: FileServer) -> None:
    url = server.url + ONE
    find(url)
    server.server_close()
    server.shutdown()
    found = find(url)
    assert any("the local copy of" in note for note in found.notes)
    with pytest.raises(RequestError, match=r"none\.tar cannot be read after 4 tries"):
        find(f"{server.url}/none.tar")


def test_what_is_recorded_never_uses_the_network(server: FileServer) -> None:
    url = server.url + ONE
    with pytest.raises(RequestError, match="never opened unasked: give it as DATA"):
        find(url, recorded=True)
    assert not server.asked
    find(url)
    asked = len(server.asked)
    assert len(find(url, recorded=True).splits["train"][1]) == 40
    assert len(server.asked) == asked


def test_a_full_disk_is_noticed_before_the_first_byte(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SPARE_BYTES", 1 << 60)
    with pytest.raises(RequestError, match=r"GB would be fetched into .* set XDG_CACHE_HOME to a larger disk"):
        find(server.url + ONE)
    assert not gets(server)


def test_copies_not_used_for_a_week_make_room(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        find(f"{server.url}/set/digits-train-{number:03}.tar")
    old, fresh = copies()
    os.utime(old, (0, time.time() - 8 * 86400))
    monkeypatch.setattr(fetch, "MOST_SHARE", 0.0)
    find(server.url + ONE)  # asked for, so it counts as used now
    assert copies() == [old, fresh]
    os.utime(old, (0, time.time() - 8 * 86400))
    find(f"{server.url}/set/digits-train-002.tar")
    assert old not in copies()
    assert fresh in copies()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://host/x.tar", "data are read from http, https, s3, gs or this disk, not from ftp"),
        ("file:///x.tar", "not from file"),
        ("simplecache::http://host/x.tar", "not from simplecache::http"),
        ("https://me:word@host/x.tar", "holds a password or a signature"),
        ("https://host/x.tar?X-Amz-Signature=1", "holds a password or a signature"),
        ("http://127.0.0.1:9/x-{000000..999999}.tar", "names more than 100000 files"),
        ("http://127.0.0.1:9/x-{0..999}-{0..999}.tar", "names more than 100000 files"),
        ("http://127.0.0.1:9/x-{9..1}.tar", "a range ends before it begins"),
        ("http://127.0.0.1:9/x-*.tar", "a web server does not list its files"),
        ("http://127.0.0.1:9/x.zip", "expected all .tar or all .parquet"),
    ],
)
def test_urls_that_are_refused(url: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        find(url)
    assert "word" not in str(error.value).replace("password", "")
