"""What the system refused, with the place it is about and, only where the cause is known, a hint."""

from __future__ import annotations

import errno

from nvlm_deploy.errors import MachineError

_HINTS = {
    errno.EACCES: "`ls -ld {place}` shows who may read and write it",
    errno.EPERM: "`ls -ld {place}` shows who may read and write it",
    errno.ENOSPC: "`df -h {place}` shows its disk: free space there",
    errno.EDQUOT: "`quota` shows your limit on its disk: free space there",
    errno.EROFS: "it is on a disk that can only be read: choose another place",
    errno.EMFILE: "`ulimit -n 65536` in this shell lets a process open more files",
}
# of two files these are about the second, the target; the first is the source, which is sound
_OF_THE_TARGET = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def machine_error(problem: OSError) -> MachineError:
    """The error for whatever no part of ours foresaw."""
    place = problem.filename
    if problem.errno in _OF_THE_TARGET and problem.filename2:
        place = problem.filename2
    reason = problem.strerror or type(problem).__name__
    hint = _HINTS.get(problem.errno or 0) if place else None
    return MachineError(f"{place}: {reason}" if place else reason, hint=hint and hint.format(place=place))
