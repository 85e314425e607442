"""A process that submits jobs to a pool and writes down what it gets, to be killed: FOLDER COUNT WORKERS."""

import os
import sys
from pathlib import Path

from esper.workers.foreman import PoolConfig
from esper.workers.pool import ProcessPool
from tests.workers.jobs import payload


def main() -> None:
    folder, count, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    seen_file = folder / "seen"
    seen = {line.split()[0] for line in seen_file.read_text().splitlines()} if seen_file.exists() else set()
    config = PoolConfig(beat_s=0.2, lease_s=20.0, patience_s=60.0)
    with (
        ProcessPool("t", "tests.workers.jobs", workers, folder=folder, config=config) as pool,
        seen_file.open("a") as out,
    ):
        for number in range(count):
            if f"key{number}" not in seen:
                pool.submit(f"key{number}", "sleep", payload("sleep", seconds=0.05 * (number % 4)))
        print("ready", flush=True)
        while len(seen) < count:
            for result in pool.poll(1.0):
                if result.key not in seen:
                    seen.add(result.key)
                    out.write(f"{result.key} {result.state} {result.result.decode()}\n")
                    out.flush()
                    os.fsync(out.fileno())


if __name__ == "__main__":
    main()
