"""A save that is killed, or fills the disk, leaves either the old checkpoint or the new one, complete."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from btc_jax import load, open_checkpoint, save, verify

KILLS = 100
PROGRAM = """
import sys, itertools
import numpy as np
from pathlib import Path
from tests.test_kill import tree
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.ties import records_of, stored_leaves
from btc_jax.checkpoint.write import write_leaves
from btc_jax.tree import flatten
import os

stored = []
for number in (1, 2):
    paths, leaves, _ = flatten(tree(number))
    stored.append((describe(tree(number), paths), stored_leaves(records_of(paths, leaves), leaves)))
# For each line a child that saves without end; nothing in it starts a thread or calls jax.
for line in sys.stdin:
    path, start, *modes = line.split()
    child = os.fork()
    if child == 0:
        for i in itertools.count():
            write_leaves(Path(path), *stored[(i + int(start)) % 2], eval(modes[(i // 2 + int(start)) % len(modes)]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def tree(number: int):
    """Two trees that every leaf, and the number of leaves, tells apart."""
    leaves = {f"dense{i}": np.full((150, 100), number, np.float32) for i in range(4 + number)}
    return leaves | {"number": number}


def number_of(path: Path) -> int:
    """Which complete tree is there."""
    loaded = {}
    with open_checkpoint(path) as checkpoint:
        loaded = {leaf: checkpoint.read_numpy(leaf) for leaf in checkpoint.records}
    number = loaded.pop("number")
    assert len(loaded) == 4 + number
    assert all((leaf == number).all() for leaf in loaded.values())
    return number


def files_of(path: Path) -> set[str]:
    """The files of a finished checkpoint; all others are leftovers."""
    with open_checkpoint(path) as checkpoint:
        return {checkpoint.path.name} | {file.path.name for file in checkpoint._files}


@pytest.fixture(scope="module")
def parent():
    """A process with two trees ready, which forks a child for each line of input."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate()


@pytest.mark.parametrize(
    ("modes", "kills", "longest"),
    [("None", KILLS, 0.06), ("100_000", KILLS // 4, 0.2), ("None 100_000 200_000", KILLS, 0.1)],
    ids=["file", "files", "both"],
)
def test_killed_saves_leave_one_of_the_trees(parent, tmp_path, modes, kills, longest):
    rng, path, seen, left_over = random.Random(0), tmp_path / "m.safetensors", set(), 0
    save(path, tree(1))
    for start in range(kills):
        parent.stdin.write(f"{path} {start} {modes}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == "dead\n"
        seen.add(number_of(path))
        left_over += len(set(os.listdir(tmp_path)) - files_of(path))
        assert len(os.listdir(tmp_path)) < 30, "temporary files pile up"
    assert seen == {1, 2}
    assert left_over, "no kill came at an interesting moment"
    save(path, tree(2), max_shard_bytes=None if modes == "None" else 100_000)
    assert number_of(path) == 2
    assert set(os.listdir(tmp_path)) == files_of(path)


@pytest.mark.parametrize("before", [None, 100_000], ids=["file", "files"])
@pytest.mark.parametrize("after", [None, 100_000], ids=["file", "files"])
def test_one_more_save_cleans_up(parent, tmp_path, before, after):
    path = tmp_path / "m.safetensors"
    save(path, tree(1), max_shard_bytes=before)
    for name in (".m.safetensors.tmp", ".m.safetensors.index.json.tmp", ".m.safetensors.lock"):
        (tmp_path / name).write_bytes(b"left")
    (tmp_path / "m-01234567-00001-of-00002.safetensors").write_bytes(b"left")
    (tmp_path / ".m-01234567-00002-of-00002.safetensors.tmp").write_bytes(b"left")
    others = {"m-00001-of-00002.safetensors", "mm-01234567-00001-of-00002.safetensors", "m-0.safetensors", ".m.tmp"}
    for name in others:
        (tmp_path / name).write_bytes(b"of somebody else")
    save(path, tree(2), max_shard_bytes=after)
    assert number_of(path) == 2
    assert set(os.listdir(tmp_path)) == files_of(path) | others


FULL = """
import resource, signal, sys
import numpy as np
from btc_jax import save
path, limit, shards = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for size in (100, 3_000, 90_000, 1_000_000):
    if 4 * size < limit:
        continue
    try:
        save(path, {"small": np.ones(9), "a": np.ones(size, np.float32), "b": np.ones(size + 8, np.float32)},
             max_shard_bytes=shards)
    except OSError as error:
        assert path.split("/")[-1].split(".")[0] in str(error), error
        assert str(error).count("could not be written") == 1, error
        assert type(error) is OSError, error
    else:
        raise AssertionError(size)
"""


def fails_cleanly(path: Path, limit: int, shards: int | None) -> None:
    before = {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}
    command = [sys.executable, "-W", "error", "-c", FULL, str(path), str(limit), str(shards)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)} == before
    assert verify(path).ok


@pytest.mark.parametrize("limit", [1, 1000, 70_000, 270_000])
@pytest.mark.parametrize("shards", [None, 100])
def test_a_limit_of_file_size(tmp_path, limit, shards):
    save(tmp_path / "m.safetensors", {"old": np.ones(5)}, max_shard_bytes=shards)
    fails_cleanly(tmp_path / "m.safetensors", limit, shards)


def test_a_full_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and os.getuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder]).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        path = folder / "m.safetensors"
        save(path, {"old": np.ones(10_000)})
        (folder / "fill").write_bytes(bytes(256 * 1024 - 80_000 - 40_000))
        before = set(os.listdir(folder))
        for shards in (None, 30_000):
            with pytest.raises(OSError, match=r"could not be written: No space left on device; what was there is"):
                save(path, {f"new{i}": np.ones(4_000) for i in range(6)}, max_shard_bytes=shards)
            assert set(os.listdir(folder)) == before
            assert load(path)["old"].sum() == 10_000
    finally:
        subprocess.run(["umount", folder], check=True)


def test_no_folder_to_write_in(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be written"):
        save(tmp_path / "none" / "m.safetensors", {"a": 1})
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="could not be written"):
        save(tmp_path / "folder", {"a": 1})
    assert os.listdir(tmp_path) == ["folder"]
