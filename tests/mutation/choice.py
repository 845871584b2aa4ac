"""`Choice`: which mutants of which files to run.

Owns the packages and the order in which their mutants are drawn. The order follows from the seed and each mutant's
name: changes of one file do not affect the choice in other files. Runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from tests.mutation.operators import Mutant, mutants

PACKAGES: Mapping[str, Sequence[str]] = {
    "scheduling": ("penstock/scheduling/*.py",),
    "cache": ("penstock/cache/*.py",),
    "engine": ("penstock/engine/**/*.py", "penstock/api/*.py", "penstock/facades/*.py"),
    "speculation": ("penstock/optimizers/speculation/*.py",),
    "sampler": tuple(
        f"penstock/models/{name}.py"
        for name in ("sampler", "choice", "scoring", "rules", "filters", "vocabulary", "randomness")
    ),
}


class Choice:
    """Mutants of `packages`, or of `files`, whose names contain `match`."""

    def __init__(
        self, seed: str, packages: Sequence[str] | None, files: Sequence[str] | None, match: str, root: Path = Path()
    ) -> None:
        self._seed = seed
        self._groups = [tuple(files)] if files else [PACKAGES[name] for name in packages or PACKAGES]
        self._whole = bool(files)
        self._match = match
        self._root = root

    def mutants(self, count: int) -> list[Mutant]:
        """At most `count`, equally many of each package; for files all of their mutants."""
        groups = [self._drawn(group) for group in self._groups]
        if self._whole:
            return list(itertools.chain.from_iterable(groups))
        return list(itertools.islice(self._in_turn(groups), count))

    def _in_turn(self, groups: Sequence[Iterator[Mutant]]) -> Iterator[Mutant]:
        for round_ in itertools.zip_longest(*groups):
            yield from (mutant for mutant in round_ if mutant is not None)

    def _drawn(self, patterns: Sequence[str]) -> Iterator[Mutant]:
        paths = sorted(path for pattern in patterns for path in self._root.glob(pattern))
        every = [
            mutant
            for path in paths
            for mutant in mutants(path.relative_to(self._root).as_posix(), path.read_text())
            if self._match in mutant.id
        ]
        every = every if self._whole else sorted(every, key=lambda mutant: self._rank(mutant.id))
        return (mutant for mutant in every if mutant.is_valid)

    def _rank(self, name: str) -> bytes:
        return blake2b(f"{self._seed}:{name}".encode()).digest()
