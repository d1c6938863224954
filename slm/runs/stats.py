"""The statistics of an evaluation: intervals, pass@k, two runs compared on the same problems.

Every interval is the 95 % one. Not covered: correction for many comparisons, correlated problems. Imports
numpy, no torch.
"""

from math import comb, sqrt
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # a 95 % interval of a normal: this many standard deviations each way


def wilson(k: int, n: int) -> tuple[float, float]:
    """Score interval of a proportion, k right of n (Wilson 1927, JASA 22, eq. for p1 and p2).

    >>> tuple(round(x, 4) for x in wilson(8, 10))
    (0.4902, 0.9433)
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, Z * Z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z * sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return max(0.0, middle - half) if k else 0.0, min(1.0, middle + half) if k < n else 1.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples drawn without replacement from n, c of them right, is right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def paired(a: list, b: list) -> tuple[float, float, float]:
    """(difference, low, high) of accuracy b - a on the same problems, item i of both being problem i.

    Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10: Wilson intervals of both rates, joined
    with a continuity-corrected correlation of the paired answers. Sound for small n and rates near 0 and 1.

    >>> a, b = [1] * 8 + [0] * 13, [1] + [0] * 7 + [1] + [0] * 12  # 1 both, 7 only a, 1 only b, 12 neither
    >>> tuple(round(x, 3) for x in paired(a, b))
    (-0.286, -0.507, -0.026)
    """
    n, (both, only_a, only_b) = len(a), _table(a, b)
    neither = n - both - only_a - only_b
    pa, pb = (both + only_a) / n, (both + only_b) / n
    (la, ua), (lb, ub) = wilson(both + only_a, n), wilson(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0)
    phi = cross / sqrt(product) if product else 0.0
    down, up = (pb - lb, ua - pa), (ub - pb, pa - la)
    low, high = (sqrt(max(0.0, x * x - 2 * phi * x * y + y * y)) for x, y in (down, up))
    return pb - pa, pb - pa - low, pb - pa + high


def mcnemar(a: list, b: list) -> float:
    """Exact two-sided p-value that a and b are equally often right (McNemar 1947, binomial form).

    >>> round(mcnemar([True] * 1 + [False] * 7, [False] * 1 + [True] * 7), 4)  # 1 : 7
    0.0703
    """
    _, only_a, only_b = _table(a, b)
    m = only_a + only_b
    tail = sum(comb(m, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** m)


def bootstrap(values: list[float], rounds: int = 10_000) -> tuple[float, float]:
    """Interval of the mean of one value a problem (its share right of k samples, its pass@k, a difference).

    Problems are drawn again with replacement, their samples stay together; bias-corrected percentiles
    (Efron 1987, JASA 82, with acceleration 0).
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0 or np.ptp(x) == 0:
        return (float(x[0]), float(x[0])) if x.size else (0.0, 1.0)
    rng = np.random.default_rng(0)
    kinds, counts = np.unique(x, return_counts=True)  # few different values: draw counts, not problems
    means = rng.multinomial(x.size, counts / x.size, size=rounds) @ kinds / x.size
    below = np.mean(means < x.mean()) + np.mean(means == x.mean()) / 2
    shift = NormalDist().inv_cdf(min(max(below, 1 / rounds), 1 - 1 / rounds))
    ends = [NormalDist().cdf(2 * shift + s * Z) for s in (-1, 1)]
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def interval(shares: list[float]) -> tuple[float, float]:
    """95 % of an accuracy, given each problem's share of right samples: wilson for one sample a problem, else
    bootstrap over problems."""
    if all(share in (0, 1) for share in shares):
        return wilson(int(sum(shares)), len(shares))
    return bootstrap(shares)


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(difference, low, high) of accuracy b - a, item i of both being problem i: paired for one sample a
    problem, else bootstrap over problems."""
    if all(share in (0, 1) for share in [*a, *b]):
        return paired(a, b)
    gains = [y - x for x, y in zip(a, b, strict=True)]
    return sum(gains) / len(gains), *bootstrap(gains)


def estimate(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high), given one value a problem."""
    return sum(values) / len(values), *interval(values)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(estimate: tuple[float, float, float]) -> str:
    """A share with its interval, in percent.

    >>> percent((0.6, 0.354, 0.879))
    '60.0 (35.4-87.9)'
    """
    return f"{100 * estimate[0]:.1f} ({span(*estimate[1:])})"


def span(low: float, high: float) -> str:
    """An interval of a share in percent.

    >>> span(0.354, 0.879)
    '35.4-87.9'
    """
    return f"{100 * low:.1f}-{100 * high:.1f}"


def points(difference: float, low: float, high: float) -> str:
    """A difference of two shares in points of percent, with its interval.

    >>> points(0.25, -0.062, 0.5)
    '+25.0 [-6.2, +50.0]'
    """
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


# ---- figures in a table ----------------------------------------------------------------------------------

WIDTHS = {"problems": 9, "over the first": 23, "p": 8, "truncated %": 12, "no box %": 9, "no answer %": 12,
          "tokens": 7, "seconds": 8}  # else 18


def line(name: str, cells: dict[str, str], markdown: bool = False) -> str:
    """A line of a table; cells: heading -> text."""
    if markdown:
        return f"| {' | '.join([name, *cells.values()])} |"
    return f"{shorten(name):28}" + "".join(f"{text:>{WIDTHS.get(h, 18)}}" for h, text in cells.items())


def shorten(name: str) -> str:
    return name if len(name) < 28 else "..." + name[-24:]


def _table(a, b) -> tuple[int, int, int]:
    """How many problems (both, only a, only b) got right."""
    both = sum(bool(x and y) for x, y in zip(a, b, strict=True))
    return both, sum(map(bool, a)) - both, sum(map(bool, b)) - both
