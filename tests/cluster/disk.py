"""A run whose checkpoints are on a disk that fills up and is then mounted read-only."""

from pathlib import Path
from typing import Any

from hosts import wait_for
from jobs import Job, Training

from horovod_megdet.engine import checkpoint

SIZE = "300m"
"""Enough for the checkpoints that are kept, but not for more."""


def failing_disk(training: Training, launcher: str = "mpirun") -> dict[str, Any]:
    """Resumes the run on such a disk, to its end, and returns the result; fails if training does not continue.

    While the disk is full, and while it is read-only, the newest checkpoint has to stay intact.
    """
    host, folder = training.members[0], training.run_dir / "checkpoints"
    newest = checkpoint.newest(training.run_dir, report=print).path
    kept = training.run_dir.parent / "kept"
    newest.rename(kept)
    host.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)])
    host.run(["cp", "-r", str(kept), str(folder / newest.name)])
    kept.rename(newest)
    job = training.start(launcher, **{"output.keep_checkpoints": "1"})
    try:
        job.wait_for_output("^Resuming after")
        filler = folder / "filler"
        host.run(["sh", "-c", 'cat /dev/zero > "$1" 2>/dev/null; test -s "$1"', "sh", str(filler)])
        job.wait_for_output("the checkpoint cannot be written: .* Training goes on and tries again")
        seen = whole_checkpoint(host.path(folder))
        host.run(["rm", str(filler)])
        wait_for_newer(job, host.path(folder), seen)
        read_only = ["mount", "-o", "remount,ro", str(folder)]
        # Refused while a file is being written.
        wait_for(lambda: host.run(read_only, check=False).returncode == 0, "the disk to be remounted")
        job.wait_for_output("Read-only file system.* Training goes on and tries again")
        whole_checkpoint(host.path(folder))
        host.run(["mount", "-o", "remount,rw", str(folder)])
        assert job.wait() == 0, job.output
        found = checkpoint.newest(host.path(training.run_dir), report=print)
        return {"name": found.path.name, **found.bits()}
    finally:
        job.end()
        host.run(["umount", str(folder)])


def whole_checkpoint(folder: Path) -> str:
    """Name of the newest checkpoint, whose checksums are right."""
    return checkpoint.newest(folder.parent, report=print).path.name


def wait_for_newer(job: Job, folder: Path, name: str) -> None:
    """Waits until a newer checkpoint than this one is there."""
    wait_for(lambda: max(path.name for path in folder.glob("step_*")) > name, "a checkpoint", lambda: job.output, 60)
