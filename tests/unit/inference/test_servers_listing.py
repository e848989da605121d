import logging
import os

import pytest
from pydantic import ValidationError

from specforge.inference.config import ServersConfig, server_url
from specforge.inference.servers.listing import MAX_FILE_BYTES, ServerListing


@pytest.fixture
def file(tmp_path):
    return tmp_path / "servers.txt"


def test_addresses_come_from_the_configuration_and_from_the_file(file):
    file.write_text("# ours\nhttp://b:1/  # in the corner\n\nhttps://c:2\nhttp://a:1\n")
    listing = ServerListing(("http://a:1/",), file)
    assert listing.current() == ("http://a:1", "http://b:1", "https://c:2")
    assert listing.may_change
    assert str(file) in str(listing)


def test_without_a_file_nothing_changes():
    listing = ServerListing(("http://a:1", "http://a:1/"))
    assert listing.current() == ("http://a:1",)
    assert not listing.may_change


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_changes_is_read_again(file, replaced):
    file.write_text("http://a:1\n")
    listing = ServerListing((), file)
    assert listing.current() == ("http://a:1",)
    if replaced:
        other = file.with_suffix(".new")
        other.write_text("http://b:1\n")
        stat = file.stat()
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size too: the inode alone differs
        other.rename(file)
    else:
        file.write_text("http://a:1\nhttp://b:1\n")
    assert listing.current()[-1] == "http://b:1"


@pytest.mark.parametrize(
    "damage",
    [
        b"not an address\n",
        b"http://a:1\nhttp://user@b:1\n",
        b"\xff\xfe\n",
        b"http://a b\n",
        b"http://a:70000\n",
        b"http://a:0\n",
        b"http://a:80:80\n",
        b"http://:80\n",
        b"http://a:80?x\n",
        b"x" * MAX_FILE_BYTES + b"\n",
    ],
)
def test_a_bad_line_leaves_the_list_as_it_was_and_is_told_once(file, damage, caplog):
    file.write_text("http://a:1\n")
    listing = ServerListing((), file)
    listing.current()
    file.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert listing.current() == ("http://a:1",)
        assert listing.current() == ("http://a:1",)
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(file) in said
    assert "stay: http://a:1" in said


def test_a_file_that_vanishes_leaves_the_list_and_counts_when_it_is_back(file, caplog):
    file.write_text("http://a:1\n")
    listing = ServerListing((), file)
    listing.current()
    file.unlink()
    assert listing.current() == ("http://a:1",)
    assert "cannot be read" in caplog.text
    file.write_text("http://b:1\n")
    assert listing.current() == ("http://b:1",)


def test_a_file_that_is_not_there_yet_lists_nothing(file, caplog):
    listing = ServerListing((), file)
    assert listing.current() == ()
    assert str(file) in caplog.text


def test_a_torn_line_counts_once_it_stays(file):
    file.write_text("http://a:1\n")
    listing = ServerListing((), file)
    listing.current()
    file.write_text("http://a:1\nhttp://b:1")
    assert listing.current() == ("http://a:1",)
    file.write_text("http://a:1\nhttp://b:1234")
    assert listing.current() == ("http://a:1",)
    assert listing.current() == ("http://a:1", "http://b:1234")


def test_the_first_look_at_a_file_without_a_last_line_end_finds_what_is_there(file):
    file.write_text("http://a:1\nhttp://[::1]:1234")
    assert ServerListing((), file).current() == ("http://a:1", "http://[::1]:1234")


@pytest.mark.parametrize(
    "url", ["http://a:0", "http://a:65536", "http://a:1\n", "http://a:1/x", "ftp://a:1", "http://[:1"]
)
def test_a_configuration_takes_the_addresses_that_a_file_may_have(url):
    with pytest.raises(ValidationError, match="urls"):
        ServersConfig(urls=(url,))
    with pytest.raises(ValueError, match="expected an address"):
        server_url(url)
    assert ServersConfig(urls=("https://a.b:65535/",)).urls == ("https://a.b:65535/",)


def test_a_file_that_was_just_emptied_is_no_list_yet(file):
    file.write_text("http://a:1\n")
    listing = ServerListing((), file)
    listing.current()
    file.write_text("")
    assert listing.current() == ("http://a:1",)
    assert listing.current() == ()
