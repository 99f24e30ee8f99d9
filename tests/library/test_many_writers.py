"""Many processes, killed at any moment, full and read-only disks: nothing lost or halved."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from cfm_train.errors import UserError
from cfm_train.library.store import Library

#: A process that adds bricks of the seeds that it is given, over and over.
WRITER = """
import sys
import numpy as np
from safetensors.numpy import save
from cfm_train.library.card import Card
from cfm_train.library.store import Library

library, rounds = Library(sys.argv[1]), int(sys.argv[2])
seeds = [int(seed) for seed in sys.argv[3:]]
print("ready", flush=True)
for _ in range(rounds):
    for seed in seeds:
        value = np.random.default_rng(seed).normal(size=(200, 200)).astype(np.float32)
        files = {"brick.safetensors": save({"a": value})}
        library.add(files, Card(name=f"brick{seed % 3}", kind="lora", run=f"seed {seed}"))
"""


def _start(library: Path, rounds: int, *seeds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(library), str(rounds), *map(str, seeds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_writers_at_once_lose_nothing(tmp_path):
    """Six processes, twelve bricks of three names, each brick written by two of them."""
    root = tmp_path / "library"
    jobs = [_start(root, 3, *(2 * (i // 2) * 2 + k for k in range(4))) for i in range(6)]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
    library = Library(root)
    cards = list(library.cards())
    assert sorted(card.run for card in cards) == sorted(f"seed {seed}" for seed in range(12))
    assert library.names() == ["brick0", "brick1", "brick2"]
    assert library.verify() == []
    for name in library.names():
        lines = (root / name / "refs.jsonl").read_text().splitlines()
        newest = [line.split('"')[3] for line in lines]
        assert set(newest) == set(library.versions(name))
        assert all(a != b for a, b in pairwise(newest)), "only changes are logged"
    assert not (root / ".tmp").exists()


def test_killed_writers_leave_no_half_artifact(tmp_path):
    """Twelve writers, each killed at a random moment; whatever is visible is whole."""
    root = tmp_path / "library"
    generator = random.Random(0)
    library, litter = Library(root), set[str]()
    for attempt in range(12):
        job = _start(root, 1000, *range(10 * attempt, 10 * attempt + 10))
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.0, 0.08))
        job.kill()
        job.communicate()
        assert job.returncode == -signal.SIGKILL
        litter |= set(library.gc(grace=0, dry_run=True))
        assert library.verify() == []
    assert litter, "not one of twelve was killed while it wrote: this test has seen nothing"
    assert set(library.gc(grace=0)) == litter
    assert not (root / ".tmp").exists()
    stored = len(list(library.cards()))
    last = _start(root, 1, *range(120))
    assert last.communicate()[1] == "" and last.returncode == 0
    assert len(list(library.cards())) == 120 > stored
    assert library.verify() == []


def test_gc_leaves_a_living_writer_alone(tmp_path):
    """The folder of a writer that is alive is locked; the same folder is litter once it is dead."""
    root = tmp_path / "library"
    code = (
        "import sys, time\n"
        "from cfm_train.library.local import LocalStorage\n"
        "from pathlib import Path\n"
        "def slow():\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "LocalStorage(Path(sys.argv[1])).commit('n/v', {'a.json': b''}, 'a.json', slow)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "writing\n"
    library = Library(root)
    assert library.gc(grace=0) == []
    job.kill()
    job.communicate()
    assert library.gc() == [], "too young: an hour has not passed"
    assert len(library.gc(grace=0, dry_run=True)) == 1
    assert len(library.gc(grace=0)) == 1
    assert library.gc(grace=0) == []
    assert not (root / ".tmp").exists()


def test_gc_takes_halves_and_orphaned_sidecars_only(library, bricks):
    kept, gone = bricks.add(library, 0), bricks.add(library, 1)
    for card in (kept, gone):
        library.sidecar(card, "d" * 64).write("x.json", b"{}")
    library.remove(gone.ref)
    library.storage.put("sst2/0123456789ab/brick.safetensors", b"half")  # no card: never committed
    library.storage.put("notes/todo.txt", b"a person's own")
    expected = ["sst2/0123456789ab", f"stats/{gone.version}"]
    assert library.gc() == []
    assert library.gc(grace=-60, dry_run=True) == expected
    assert library.gc(grace=-60) == expected
    assert library.sidecar(kept, "d" * 64).names() == ["x.json"]
    assert library.storage.read("notes/todo.txt") == b"a person's own"
    assert library.find("sst2") == kept and library.verify() == []


def test_object_store_halves_are_invisible(bricks, tmp_path):
    """Whatever prefix of the objects has been written, there is no artifact until the card is."""
    whole = Library(f"memory://{tmp_path.name}/whole")
    card = bricks.add(whole, 0)
    half = Library(f"memory://{tmp_path.name}/half")
    for name in card.files:
        half.storage.put(
            f"sst2/{card.version}/{name}", whole.storage.read(f"sst2/{card.version}/{name}")
        )
        assert half.names() == [] and half.versions("sst2") == []
    assert bricks.add(half, 0).version == card.version
    assert half.verify() == []


def test_a_mixed_object_store_folder_is_written_again(bricks, tmp_path):
    """Another writer of the same version overwrites a file between our writes: we notice."""
    library = Library(f"memory://{tmp_path.name}/mixed")
    storage = library.storage
    interfered = []

    def announce() -> None:
        storage.put("n/v/a.json", b"of another writer")
        interfered.append(True)

    storage.commit("n/v", {"a.json": b"mine", "z.json": b"mine too"}, "z.json", announce)
    assert interfered == [True]
    assert storage.read("n/v/a.json") == b"mine" and storage.read("n/v/z.json") == b"mine too"


def test_writers_of_one_version_end_with_one_of_their_cards(bricks, tmp_path):
    """Six threads write the same tensors with different cards to an object store, at once."""
    root = f"memory://{tmp_path.name}/same"

    def add(number: int) -> str:
        return bricks.add(Library(root), 0, run=f"run {number}", recipe={"seed": number}).version

    with ThreadPoolExecutor(6) as pool:
        versions = set(pool.map(add, range(6)))
    library = Library(root)
    assert library.versions("sst2") == list(versions)
    assert library.verify() == []
    card = library.find("sst2")
    assert card.run == f"run {card.recipe['seed']}", "the card is all of one writer"


#: Adds a brick to a library on a mounted file system; prints what happened.
IN_MOUNT = """
import sys
import numpy as np
from pathlib import Path
from safetensors.numpy import save
from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.store import Library

root, size = Path(sys.argv[1]), int(sys.argv[2])
before = sorted(map(str, root.rglob("*")))
for what in (
    lambda: Library(root).check_writable(),
    lambda: Library(root).add(
        {"brick.safetensors": save({"a": np.ones(size, np.float32)})}, Card(name="x", kind="lora")
    ),
):
    try:
        what()
        print("stored")
    except UserError as error:
        print(f"error: {error}")
print("unchanged" if sorted(map(str, root.rglob("*"))) == before else "CHANGED")
"""


def _in_tmpfs(tmp_path: Path, options: str, size: int) -> str:
    """Runs `IN_MOUNT` on a file system of its own, mounted for this one process."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare to mount a file system of its own")
    mount = tmp_path / "mount"
    mount.mkdir()
    shell = (
        f'mount -t tmpfs -o size=1m tmpfs "{mount}" && mkdir "{mount}/library" && '
        f'mount -o remount,{options} "{mount}" && '
        f'exec "{sys.executable}" -c "$0" "{mount}/library" {size}'
    )
    job = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, IN_MOUNT], capture_output=True, text=True, check=False
    )
    if job.returncode != 0 and "Error" not in job.stderr:
        pytest.skip(f"this machine lets nobody mount a file system: {job.stderr.strip()[-200:]}")
    assert job.returncode == 0, job.stderr
    return job.stdout


def test_a_full_disk_gets_a_sentence_and_changes_nothing(tmp_path):
    output = _in_tmpfs(tmp_path, "size=1m", 1_000_000)
    assert output.splitlines()[0].startswith("error: The library")
    assert output.count("the disk is full: free some space") == 2
    assert output.endswith("unchanged\n")


def test_a_read_only_library_gets_a_sentence(tmp_path):
    output = _in_tmpfs(tmp_path, "ro", 10)
    lines = output.splitlines()
    assert all(line.startswith("error: The library") for line in lines[:2])
    assert "read-only file system: choose another" in lines[1]
    assert lines[2] == "unchanged"


def test_a_library_that_may_not_be_written(tmp_path, bricks):
    root = tmp_path / "library"
    root.mkdir(mode=0o500)
    if os.access(root, os.W_OK):
        pytest.skip("this user may write everywhere (root)")
    with pytest.raises(UserError, match="may not read or write there"):
        bricks.add(Library(root))


def test_a_file_where_the_library_should_be(tmp_path, bricks):
    (tmp_path / "library").write_text("a file")
    for root in (tmp_path / "library", tmp_path / "library" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            bricks.add(Library(root))
        with pytest.raises(UserError, match="is a file, not a folder"):
            Library(root).check_writable()
    assert (tmp_path / "library").read_text() == "a file"


def test_a_write_that_fails_leaves_no_empty_library(tmp_path, bricks):
    library = Library(tmp_path / "new")

    def torn():  # type: ignore[no-untyped-def]
        raise OSError(28, "No space left on device")

    class Torn:
        """Reads well while it is checked, and fails while it is copied."""

        calls = 0

        def __call__(self):  # type: ignore[no-untyped-def]
            Torn.calls += 1
            if Torn.calls > 2:
                torn()
            import io

            return io.BytesIO(bricks.files()["brick.safetensors"])

    with pytest.raises(UserError, match="the disk is full"):
        library.add({"brick.safetensors": Torn()}, bricks.card())
    assert not (tmp_path / "new").exists()
