"""Covering arrays: few rows of levels in which every pair of levels that goes together occurs.

Pairwise testing: Kuhn, Wallace, Gallo 2004, IEEE Trans. Software Eng. 30(6). The array is
allpairspy's, which ends before every pair is in it where some pairs are forbidden; the others are
added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations, product

from allpairspy import AllPairs

Row = dict[str, str]
Level = tuple[str, str]
"""(option, its level)"""
Together = Callable[[Level, Level], bool]
"""Whether two levels, in the order of their options, go together."""


def covering(options: dict[str, list[str]], together: Together) -> list[Row]:
    """The rows, in each of which all levels go together two by two."""
    names = list(options)

    def legal(values: list[str]) -> bool:
        *others, last = zip(names, values, strict=False)
        return all(together(other, last) for other in others)

    found = AllPairs(list(options.values()), filter_func=legal)
    rows = [dict(zip(names, row, strict=True)) for row in found]
    wanted = (
        ((one, a), (other, b))
        for one, other in combinations(names, 2)
        for a, b in product(options[one], options[other])
    )
    missing = {pair for pair in wanted if together(*pair)} - set().union(*map(_pairs, rows))
    used = Counter(level for row in rows for level in row.items())
    for pair in sorted(missing):
        if pair in missing and (row := _completed(pair, options, together, missing, used)):
            rows.append(row)
            missing -= _pairs(row)
            used.update(row.items())
    return rows


def _pairs(row: Row) -> set[tuple[Level, Level]]:
    return set(combinations(row.items(), 2))


def _completed(
    pair: tuple[Level, Level],
    options: dict[str, list[str]],
    together: Together,
    missing: Iterable[tuple[Level, Level]],
    used: Counter[Level],
) -> Row | None:
    """A row with this pair: of the levels that go with those chosen the one of most missing pairs,
    then the one that was used least; None where an option has none.
    """
    chosen, names = dict(pair), list(options)

    def both(level: Level) -> list[tuple[Level, Level]]:
        place = names.index(level[0])
        others = ((level_of, names.index(level_of[0]) < place) for level_of in chosen.items())
        return [(other, level) if before else (level, other) for other, before in others]

    for name in names:
        if name not in chosen:
            levels = [(name, value) for value in options[name]]
            fit = [level for level in levels if all(together(*two) for two in both(level))]
            if not fit:
                return None
            gained = {level: sum(two in missing for two in both(level)) for level in fit}
            chosen[name] = max(fit, key=lambda level: (gained[level], -used[level]))[1]
    return {name: chosen[name] for name in names}
