"""The process that runs one exported file for `process.py`: `python -m convmixer.exported.worker PATH THREADS BYTES`.

It stays within its memory limit, and ends when its parent ends.
"""

import os
import sys
import threading
import time
from pathlib import Path

from convmixer.errors import RequestError
from convmixer.exported.process import receive, send


def main(path: str, threads: str, memory_bytes: str) -> None:
    """Load a file, send its metadata, then answer batches until standard input is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a runtime's output must not mix with the answers
    limit_memory(int(memory_bytes))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    from convmixer.exported.load import facts_of, open_exported

    try:
        exported = open_exported(Path(path), int(threads))
    except RequestError as error:
        return send(answers, {"refused": str(error)})
    except MemoryError:
        return send(answers, {"refused": f"{path} needs more than {int(memory_bytes) / 2**30:.1f} GiB of memory"})
    send(answers, facts_of(exported))
    while True:
        try:
            _, (batch,) = receive(sys.stdin.buffer)
        except EOFError:
            return None
        try:
            logits, maps = exported.run(batch)
            send(answers, {}, [logits] if maps is None else [logits, maps])
        except Exception as error:  # each runtime has its own exceptions
            send(answers, {"error": (str(error).splitlines() or [type(error).__name__])[0][:500]})


def limit_memory(count: int) -> None:
    """Limit the bytes that this process may allocate, if the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (count, count))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # Windows; a lower limit is set already
        pass


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
