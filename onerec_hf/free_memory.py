"""How much memory a process may still take."""

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# Of a container, by version: the file of its limit, and what its statistics call memory that cannot be given back.
_CONTAINERS = [("memory.max", "memory.stat", "anon"), ("memory/memory.limit_in_bytes", "memory/memory.stat", "rss")]


def free_memory() -> int:
    """What this process may still take [bytes]: what the machine has free, or less under a limit of the process or of
    its container."""
    free = [psutil.virtual_memory().available]
    process = psutil.Process()
    if hasattr(psutil, "RLIMIT_AS"):  # on Linux
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free.append(limit - process.memory_info().vms)
    for limit_file, statistics_file, kept in _CONTAINERS:
        try:
            limit = (_CGROUPS / limit_file).read_text(encoding="utf-8").strip()
            lines = (_CGROUPS / statistics_file).read_text(encoding="utf-8").splitlines()
        except OSError:  # no such file here
            continue
        if limit != "max":
            free.append(int(limit) - int(dict(line.split() for line in lines)[kept]))
    return max(0, min(free))
