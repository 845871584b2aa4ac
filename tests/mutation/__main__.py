"""Mutation testing: changes the package in small ways, one at a time, and checks whether a test fails.

Each change (a mutant) is a comparison, an arithmetic or boolean operator, a constant, a statement, the order of
arguments or branches, or a bound of a slice. A mutant is killed when a test fails with it; a survivor shows what no
test covers. For each, the unit tests of its module run first, then those of its package, then wider ones.

  scripts/mutate                                     300 mutants, spread over the packages
  scripts/mutate --count 60 --package cache          60 mutants of one package
  scripts/mutate --file penstock/cache/tier.py       every mutant of one file
  scripts/mutate --only-survivors                    survivors once more, after you have written tests
  scripts/mutate --file penstock/cache/tier.py --match "_take_place"

Docstrings, annotations, asserts, log lines, messages, `__repr__` and the values of named constants are not changed.
Tests that start another program run it without the mutant.

Mutants run in memory, never in the working tree. Results are stored in .mutation/ by the text of the file, so that an
interrupted run resumes where it stopped, and a changed file is tested again. Write a test for a survivor, unless no
test can see the difference: then add it, with the reason, to tests/mutation/equivalent.toml.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator

from tests.mutation.choice import PACKAGES, Choice
from tests.mutation.forks import Forks, import_dependencies
from tests.mutation.trials import FOLDER, Trials, Verdict

GOAL = 0.95


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/mutate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="number of mutants (300)")
    parser.add_argument(
        "--seed", default="0", help="selects other mutants (0); a larger count extends the selection of a smaller one"
    )
    parser.add_argument("--package", action="append", choices=PACKAGES, help="only of this package; may be repeated")
    parser.add_argument("--file", action="append", help="every mutant of this file; may be repeated")
    parser.add_argument("--match", default="", help="only mutants whose name, as it is printed, contains this text")
    parser.add_argument(
        "--only-survivors", action="store_true", help="run survivors again; print the results of the others"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (the number of cores)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    choice = Choice(options.seed, options.package, options.file, options.match)
    mutants = choice.mutants(options.count)
    if options.list:
        print(*(f"{mutant.file}:{mutant.line} {mutant.id}" for mutant in mutants), sep="\n")
        return 0
    begin = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    for leftover in FOLDER.glob("*.txt"):  # of a run that was killed
        leftover.unlink()
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str((FOLDER / "pycache").resolve())
    warnings.simplefilter("ignore")  # of a fork in a process with threads, which run nothing here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    import_dependencies()
    forks = Forks(options.jobs, FOLDER)
    trials = Trials(forks, mutants, again=options.only_survivors)
    try:
        trials.run()
    finally:
        forks.close()
    print("\n".join(report(trials)))
    print(f"{time.monotonic() - begin:.0f} s")
    return int(trials.share_killed < GOAL)


def report(trials: Trials) -> Iterator[str]:
    """Survivors as diffs, then the figures."""
    for mutant in trials.having(Verdict.LIVES):
        yield f"\nLIVES  {mutant.file}:{mutant.line}  {mutant.id}\n{mutant.diff()}"
    killed, lives = trials.having(Verdict.KILLED), trials.having(Verdict.LIVES)
    equivalent = trials.having(Verdict.EQUIVALENT)
    yield f"{len(killed)} killed, {len(lives)} live, {len(equivalent)} judged equivalent"
    yield f"{trials.share_killed:.1%} of the mutants that are not equivalent were killed; the goal is {GOAL:.0%}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
