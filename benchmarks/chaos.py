"""Hurt a forge at work beside a run, again and again: `python benchmarks/chaos.py [--rounds N] [--write FILE]`.

Each round is a training run in which a graft is planted, with a forge of its own: broker, services, and workers with
real jobs. At a random moment one of seven things happens: a worker or a process of its job is killed; the workers of
both pools are killed; the forge is killed, and with it the bus; a worker is stopped and never continued; the small disk
that the forge's folder is on is filled up; a record of the store, or a file of an artifact, is damaged.

The run must end with the graft and the losses of a run without any forge (the same bits where the graft is eager; to
1e-5 where it is a compiled kernel). Another forge is then started in the same folder and must answer everything that
was asked for. After that: every VALIDATED kernel passes the loader's checks and is what it was, or is refused because
of the very damage that was done; no job that is marked as done lacks its result; `esper doctor --store` names the
damage and nothing else; no process is left.

    python benchmarks/chaos.py                                   # 50 rounds of each kind: hours
    python benchmarks/chaos.py --rounds 3 --kinds disk record
    python benchmarks/chaos.py --resume --write benchmarks/results/chaos.md
    python benchmarks/chaos.py --resume --rounds 0               # only the table of what was played
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = ("worker", "pool", "bus", "stopped", "disk", "record", "artifact")
Row = dict[str, Any]
"""An `Outcome` as plain data."""


def campaign(folder: Path, kinds: list[str], rounds: int, at_once: int, compile_every: int) -> list[Row]:
    """Play the rounds that the folder's list has not got yet, and return all that it has then.

    Args:
        folder: for everything.
        kinds: what is done.
        rounds: rounds of each kind.
        at_once: rounds that are played at the same time.
        compile_every: in one of so many rounds a kernel is compiled besides; 0 for none.
    """
    from benchmarks.chaos_round import play
    from benchmarks.chaos_stage import Stage, compiled

    file = folder / "rounds.jsonl"
    done = {(row["kind"], row["number"]): row for row in _read(file)}
    missing = [(kind, number) for number in range(rounds) for kind in kinds if (kind, number) not in done]
    if not missing:
        return list(done.values())
    stage = Stage(folder / "stage", compiled(folder / "kernel"))
    with ThreadPoolExecutor(at_once) as pool:
        futures = [
            pool.submit(play, stage, kind, number, compiling=bool(compile_every) and (number + 1) % compile_every == 0)
            for kind, number in missing
        ]
        try:
            for future in as_completed(futures):
                row = future.result().as_dict()
                done[row["kind"], row["number"]] = row
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(_told(row), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return list(done.values())


def _possible(kinds: Iterable[str]) -> list[str]:
    """Return the kinds that can be played here, and say why another cannot."""
    from benchmarks.chaos_round import why_no_disk

    with tempfile.TemporaryDirectory() as place:
        reason = why_no_disk(Path(place)) if "disk" in kinds else ""
    if reason:
        print(f"disk is left out: {reason}", file=sys.stderr)
    return [kind for kind in kinds if not (kind == "disk" and reason)]


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def failures(row: Row) -> list[str]:
    """Return what was wrong in a round."""
    return [text for name in ("run", "wrong", "lost", "left", "doctor") for text in row[name]]


def _told(row: Row) -> str:
    verdict = "; ".join(failures(row)) or "well"
    return f"{row['kind']} {row['number']}: {row['what']}: {verdict} ({row['seconds']} s, {row['cpu_s']} CPU-s)"


def table(rows: list[Row]) -> str:
    """Return the results as Markdown: one line per kind, and every failure below."""
    names = ("kind", "rounds", "finished", "wrong VALIDATED", "lost", "left behind", "doctor wrong", "median s")
    lines = ["| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]
    for kind in KINDS:
        lines += [_line(kind, mine)] if (mine := [row for row in rows if row["kind"] == kind]) else []
    lines.append(_line("**all**", rows))
    text = "\n".join(lines) + "\n"
    return text + "".join(
        f"\n- {row['kind']} {row['number']}, {row['what']}: {failure}" for row in rows for failure in failures(row)
    )


def _line(name: str, rows: list[Row]) -> str:
    finished = sum(not row["run"] for row in rows)
    bad = [sum(bool(row[what]) for row in rows) for what in ("wrong", "lost", "left", "doctor")]
    cells = [name, len(rows), finished, *bad, round(median(row["seconds"] for row in rows))]
    return "| " + " | ".join(map(str, cells)) + " |"


def report(rows: list[Row]) -> str:
    """Return the whole document."""
    compiled = sum(row["kernel"] == "compiled" for row in rows)
    answers = [answer for row in rows for answer in row["answers"].values()]
    good = sum(answer == "VALIDATED" for answer in answers)
    slow = sum("-standard-" in name and "-cpu." in name for row in rows for name in row["answers"])
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n    python")[0]
    return (
        "# A forge that is hurt at work\n\n"
        f"Command: `python benchmarks/chaos.py`, {_counts(rows)}. Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores.\n\n{about}\n\n"
        f"In {compiled} of the {len(rows)} runs the graft was a compiled kernel, in the others an eager one. In {slow} "
        f"rounds another kernel\nwas compiled besides. Of {len(answers)} requests {good} ended VALIDATED and "
        f"{len(answers) - good} with a reason, as those for a GPU must on a\nmachine without one.\n\n"
        f"{table(rows)}\n"
    )


def _counts(rows: list[Row]) -> str:
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    different = sorted(set(filter(None, counts.values())))
    if len(different) == 1:
        return f"{different[0]} rounds of each kind"
    return "of which so far were played: " + ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)


def main(arguments: Iterable[str] | None = None) -> int:
    """Play, print the table, and write it; exit status 1 if anything failed."""
    sys.path.insert(0, str(ROOT))  # A script finds its neighbours, and so do the processes that it starts.
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help="rounds of each kind (default: 50)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--at_once", type=int, default=1, help="rounds that are played at the same time (default: 1)")
    parser.add_argument("--compile_every", type=int, default=10, help="rounds of a kind per compilation; 0: none (10)")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/chaos", help="for everything (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rounds that were played before")
    parser.add_argument("--write", type=Path, help="Markdown file for the results")
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.resume:
        (given.folder / "rounds.jsonl").unlink(missing_ok=True)
    kinds = _possible(given.kinds)
    rows = campaign(given.folder.resolve(), kinds, given.rounds, given.at_once, given.compile_every)
    print(table(rows))
    if given.write:
        given.write.write_text(report(rows), encoding="utf-8")
    return int(any(map(failures, rows)))


if __name__ == "__main__":
    sys.exit(main())
