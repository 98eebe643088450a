"""What may stand at the place of a file or a folder that is to be written.

Each is a context for a path: it puts something there and yields how a writer is refused, or None where it writes. Then
it looks at what became of it.
"""

import contextlib
import os
import select
import stat
import threading
from pathlib import Path

import pytest

BEFORE = "before"


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def is_new(path):
    assert path.is_file()
    assert path.read_bytes() not in (b"", BEFORE.encode())


@contextlib.contextmanager
def nothing(path):
    yield None
    is_new(path)
    assert mode_of(path) == 0o666 & ~umask()


def umask():
    os.umask(now := os.umask(0))
    return now


def a_file(mode):
    @contextlib.contextmanager
    def place(path):
        path.write_text(BEFORE)
        path.chmod(mode)
        yield None
        is_new(path)
        assert mode_of(path) == mode

    return place


@contextlib.contextmanager
def a_link(path):
    target = path.parents[1] / "target"
    target.write_text(BEFORE)
    path.symlink_to(target)
    yield None
    assert path.readlink() == target
    is_new(target)


@contextlib.contextmanager
def a_link_to_nothing(path):
    path.symlink_to("../target")
    yield None
    assert path.readlink() == Path("../target")
    is_new(path.parents[1] / "target")


@contextlib.contextmanager
def a_link_to_itself(path):
    path.symlink_to(path.name)
    yield "Too many levels of symbolic links"
    assert path.is_symlink()


@contextlib.contextmanager
def one_of_two_names(path):
    other = path.parents[1] / "other"
    other.write_text(BEFORE)
    os.link(other, path)
    yield None
    is_new(path)
    assert other.read_text() == BEFORE


@contextlib.contextmanager
def a_pipe(path):
    """One that is read meanwhile."""
    os.mkfifo(path)
    handle, came, ended = os.open(path, os.O_RDWR | os.O_NONBLOCK), [], threading.Event()

    def read():
        is_last = False
        while select.select([handle], [], [], 0.005)[0] or not is_last:
            with contextlib.suppress(BlockingIOError):
                came.append(os.read(handle, 1 << 16))
            is_last = ended.is_set()  # what was written before is there when it looks once more

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield None
    finally:
        ended.set()
        reader.join()
        os.close(handle)
    assert b"".join(came)
    assert stat.S_ISFIFO(path.stat().st_mode)


def a_device(minor, refused):
    @contextlib.contextmanager
    def place(path):
        device(path, minor)
        yield refused
        assert stat.S_ISCHR(path.stat().st_mode)

    return place


@contextlib.contextmanager
def a_folder(path):
    path.mkdir()
    (path / "mine").write_text(BEFORE)
    yield "[Ii]s a directory|new or empty folder"
    assert [one.name for one in path.iterdir()] == ["mine"]


@contextlib.contextmanager
def below_a_file(path):
    path.parent.rmdir()
    path.parent.write_text(BEFORE)
    yield "Not a directory|must (lie in|be|hold) a |is a file"
    assert path.parent.read_text() == BEFORE


PLACES = {
    "nothing": (nothing, "written"),
    "a file of mode 0600": (a_file(0o600), "replaced, with its mode"),
    "a read-only file": (a_file(0o444), "replaced, with its mode"),
    "a link to a file": (a_link, "the link stays, its target is replaced"),
    "a link to nothing": (a_link_to_nothing, "the link stays, its target is made"),
    "a link to itself": (a_link_to_itself, "refused in one line"),
    "one of two names of a file": (one_of_two_names, "replaced; the other name keeps what it had"),
    "a pipe that is read": (a_pipe, "written into, and stays one"),
    "a device such as /dev/null": (a_device(3, None), "written into, and stays one"),
    "a device that is full": (a_device(7, "No space left on device; a part of it may"), "refused in one line"),
    "a folder": (a_folder, "refused in one line"),
    "a file in the place of its folder": (below_a_file, "refused in one line"),
}


@contextlib.contextmanager
def no_folder(out):
    yield None
    assert any(out.iterdir())


@contextlib.contextmanager
def an_empty_folder(out):
    out.mkdir()
    out.chmod(0o700)
    yield None
    assert any(out.iterdir())
    assert mode_of(out) == 0o700


@contextlib.contextmanager
def a_link_to_a_folder(out):
    (out.parents[1] / "target").mkdir()
    out.symlink_to("../target")
    yield None
    assert out.readlink() == Path("../target")
    assert any(out.iterdir())


@contextlib.contextmanager
def a_link_to_no_folder(out):
    out.symlink_to("../target")
    yield None
    assert out.readlink() == Path("../target")
    assert any(out.iterdir())


def taken(make, refused="must be a|is a file|Too many levels|Not a directory"):
    """What is not replaced, and stays as it was."""

    @contextlib.contextmanager
    def place(out):
        make(out)
        before = seen(out)
        yield refused
        assert seen(out) == before

    return place


def seen(out):
    found = [out, *out.parent.parent.rglob("*")]
    return {str(one): os.lstat(one)[:7] for one in found if os.path.lexists(one)}


def device(path, minor):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, minor))
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no permission to make a device: {error}")


def linked_file(out):
    (out.parents[1] / "target").write_text(BEFORE)
    out.symlink_to("../target")


def full_folder(out):
    out.mkdir()
    (out / "mine").write_text(BEFORE)


def file_above(out):
    out.parent.rmdir()
    out.parent.write_text(BEFORE)


FREE = {
    "no folder": (no_folder, "made"),
    "an empty folder": (an_empty_folder, "filled, with its mode"),
    "a link to an empty folder": (a_link_to_a_folder, "the link stays, its target is filled"),
    "a link to no folder": (a_link_to_no_folder, "the link stays, its target is made"),
}
TAKEN = {
    "a file": lambda out: out.write_text(BEFORE),
    "a link to a file": linked_file,
    "a link to itself": lambda out: out.symlink_to(out.name),
    "a pipe that nobody reads": os.mkfifo,
    "a device": lambda out: device(out, 3),
    "a folder with something in it": full_folder,
    "a file in the place of the folder that it lies in": file_above,
}
