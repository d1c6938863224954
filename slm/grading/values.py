"""The values of expression trees: are two of them equal as numbers, or as functions of their letters?

Rationals are exact. What is irrational is evaluated by mpmath, at a precision chosen from the sizes met on
the way, so that 10**100 + sqrt(2) is not 10**100 + sqrt(3). Letters get random rational values: two
polynomials of degree d that differ agree at a random point of a set S with chance at most d/|S| (Schwartz
1980). Bits, exponents, factorials and steps are bounded before computing; beyond the bounds a tree has no
value, and equals only itself.
"""

import math
import operator
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from functools import lru_cache

from mpmath import MPContext, mpc, mpf

from slm.grading.parse import Node, Unreadable, children

MAX_BITS, MAX_FACTORIAL, MAX_SPAN, MAX_STEPS = 30_000, 3000, 5000, 9000
MAX_EXPONENT, MAX_ANGLE = 2**31, 10**20
BITS = 200  # of the first look at an irrational value
UNDEFINED = (ZeroDivisionError, OverflowError, ValueError)
PLAIN = (False, False, False)  # modes of an Evaluator: do degrees count, do percents, is log to base 10
MARKS = ("%", "deg", "!", "±")  # kinds of nodes that change how a tree is compared
ARITHMETIC = {"+": operator.add, "*": operator.mul, "/": operator.truediv}
NATURAL = {"gcd": math.gcd, "lcm": math.lcm, "mod": operator.mod, "binom": math.comb}  # of natural numbers

Value = Fraction | mpf | mpc


# ---- the bounds --------------------------------------------------------------------------------------------

STEPS_LEFT: ContextVar[list[int]] = ContextVar("steps_left")


@contextmanager
def bounded() -> Iterator[None]:
    """All comparisons inside share one budget of steps."""
    token = STEPS_LEFT.set([MAX_STEPS])
    try:
        yield
    finally:
        STEPS_LEFT.reset(token)


def spend(steps: int) -> None:
    left = STEPS_LEFT.get()
    left[0] -= steps
    if left[0] < 0:
        raise Unreadable("too much work")


@lru_cache(maxsize=64)
def context(bits: int) -> MPContext:
    """mpmath at one precision. Nobody changes it again, so threads may share it."""
    made = MPContext()
    made.prec = bits
    return made


# mpmath keeps the longest value of a constant that it has computed. While it computes a longer one, it is not
# safe in threads. So the longest that the bounds allow is computed here.
for constant in ("pi", "e", "ln2", "ln10"):
    +getattr(context(2 * MAX_SPAN + 2000), constant)


# ---- parts of values ---------------------------------------------------------------------------------------

def real(x: Value) -> Value:
    if not isinstance(x, Fraction) and x.imag:
        raise Unreadable("not real")
    return x if isinstance(x, Fraction) else x.real


def natural(x: Value, limit: int) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= limit:
        raise Unreadable("too large, or no natural number")
    return int(x)


def bits_of(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def magnitudes(x: Value) -> list[int]:
    """About log2 of the real and of the imaginary part, without those that are 0."""
    return [part.exp + part.bc for part in (x.real, x.imag) if part]


def whole_root(value: int, n: int) -> int | None:
    """The exact n-th root of a natural number, or None."""
    root = value if value < 2 else math.isqrt(value) if n == 2 else 0
    if value > 1 and n > 2 and value.bit_length() < 900:
        root = round(math.exp(math.log(value) / n))
    return root if root**n == value else None


# ---- the value of a tree -----------------------------------------------------------------------------------

class Evaluator:
    """The value of a tree at a point {letter: Fraction}. only_real: roots and logarithms of negative numbers
    are undefined. `span` is the largest binary exponent met, in size."""

    def __init__(self, point: dict[str, Fraction], modes: tuple = PLAIN, only_real=False, bits: int = BITS):
        self.point, self.only_real, self.mp = point, only_real, context(bits)
        self.degree, self.percent, self.log10 = modes
        self.span = 0

    def __call__(self, node: Node) -> Value:
        spend(1)
        value = self.evaluate(node)
        if isinstance(value, Fraction):
            if bits_of(value) > MAX_BITS:
                raise Unreadable("too large")
            self.span = max(self.span, bits_of(value))
        else:
            self.span = max([self.span, *map(abs, magnitudes(value))])
        return value

    def inexact(self, x: Value) -> Value:
        return self.mp.convert(x) if isinstance(x, Fraction) else x

    def transcendental(self) -> None:
        spend(30 * (self.mp.prec // BITS) ** 2)

    def evaluate(self, node: Node) -> Value:
        kind = node[0]
        if kind == "n":
            return node[1]
        if kind == "s":
            return self.letter(node[1])
        if kind == "f":
            return self.function(node[1], node[2:])
        if kind not in ("+", "-", "*", "/", "^", "!", "%", "deg"):
            raise Unreadable(f"no value for {kind}")
        x, *rest = map(self, node[1:])
        if kind == "^":
            return self.power(x, *rest)
        if kind in ARITHMETIC:
            return self.arithmetic(kind, x, *rest)
        if kind == "-":
            return -x
        if kind == "!":
            return Fraction(math.factorial(natural(x, MAX_FACTORIAL)))
        if kind == "%":
            return x / 100 if self.percent else x
        return self.inexact(x) * self.mp.pi / 180 if self.degree else x

    def arithmetic(self, kind: str, x: Value, y: Value) -> Value:
        if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
            x, y = self.inexact(x), self.inexact(y)
        return ARITHMETIC[kind](x, y)

    def series(self, kind: str, letter: Node, low: Node, high: Node, term: Node) -> Value:
        """A sum or product over the natural numbers from low to high. A term spends steps for its size."""
        outside, result = self.point, Fraction(kind == "*")
        for k in range(natural(self(low), MAX_STEPS), natural(self(high), MAX_STEPS) + 1):
            self.point = outside | {letter[1]: Fraction(k)}
            result = self.arithmetic(kind, result, self(term))
            spend(4 + (bits_of(result) // 100 if isinstance(result, Fraction) else 0))
        self.point = outside
        return result

    def letter(self, name: str) -> Value:
        if name in self.point:
            return self.point[name]
        if name not in ("i", "pi", "e"):
            raise Unreadable(f"no value for {name}")
        self.transcendental()
        return +getattr(self.mp, "j" if name == "i" else name)

    def power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction):
            n = exponent.numerator
            if isinstance(base, Fraction):
                if base in (1, -1, 0) and n >= 0:
                    n = n % 2 + 2 * (n > 0)
                if bits_of(base) * abs(n) > MAX_BITS:
                    raise Unreadable("too large")
                return self.root(base**n, exponent.denominator)
            if exponent.denominator == 1 and abs(n) <= 400:
                return base**n
        self.transcendental()
        return self.exp(exponent * self.log(base))

    def root(self, value: Value, n: int) -> Value:
        """The n-th root: the real one of a negative number if n is odd, else the principal one."""
        if n == 1:
            return value
        spend(10)
        if self.only_real and not n % 2 and real(value) < 0:
            raise ValueError("not real")
        if isinstance(value, Fraction):
            if value < 0 and (n % 2 or n == 2):
                positive = self.root(-value, n)
                return -positive if n % 2 else positive * self.mp.j
            top, low = whole_root(abs(value.numerator), n), whole_root(value.denominator, n)
            if value >= 0 and top is not None and low is not None:
                return Fraction(top, low)
        x = self.inexact(value)
        if x.imag or n > 2:
            self.transcendental()
        if x.imag or (x.real < 0 and not n % 2):
            return self.exp(self.log(x) / n)
        size = self.mp.sqrt(abs(x.real)) if n == 2 else self.mp.root(abs(x.real), n)
        return -size if x.real < 0 else size

    def exp(self, x: Value) -> Value:
        x = self.inexact(x)
        if abs(x.real) > MAX_EXPONENT or abs(x.imag) > MAX_ANGLE:
            raise Unreadable("too large")
        return self.mp.exp(x)

    def log(self, x: Value) -> Value:
        """The principal value."""
        if not x:
            raise ZeroDivisionError
        return self.mp.ln(self.inexact(x))

    def function(self, name: str, args: tuple) -> Value:
        if not args:
            raise Unreadable("of nothing")
        if name in ("sum", "prod"):
            return self.series("+" if name == "sum" else "*", *args)
        spend(20)
        if name not in ("root", "abs", "floor", "ceil") and name[0] != "?":
            self.transcendental()
        degree, self.degree = self.degree, self.degree or name in ("sin", "cos")
        x, *more = values = [self(a) for a in args]
        self.degree = degree
        if name == "root":
            return self.root(x, max(natural(more[0], 1000), 1))
        if name == "abs":
            return abs(x)
        if name in ("ln", "log", "log10"):
            if self.only_real and real(x) < 0:
                raise ValueError("not real")
            common = name == "log10" or (name == "log" and self.log10)
            return self.log(x) / self.mp.ln(10) if common else self.log(x)
        if name == "exp":
            return self.exp(x)
        if name in ("sinh", "cosh"):
            up = self.exp(x)
            return (up + 1 / up) / 2 if name == "cosh" else (up - 1 / up) / 2
        if name in NATURAL:
            limit = MAX_FACTORIAL if name == "binom" else 10**100
            return Fraction(NATURAL[name](*(natural(v, limit) for v in values)))
        if name[0] == "?":
            key = name + "".join(str(v) if isinstance(v, Fraction) else self.mp.nstr(v, 26) for v in values)
            return Fraction(zlib.crc32(key.encode()) + 1, 65537)  # one value for each argument
        return self.real_function(name, list(map(real, values)))

    def real_function(self, name: str, values: list[Value]) -> Value:
        """floor, ceil, max and min of rationals stay exact; sin, cos, atan, asin and acos do not."""
        if name == "max":
            return max(values, key=self.inexact)
        if name == "min":
            return min(values, key=self.inexact)
        x = values[0]
        if name in ("floor", "ceil") and isinstance(x, Fraction):
            return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
        x = self.inexact(x)
        if max(magnitudes(x), default=0) > MAX_BITS or (name in ("sin", "cos") and abs(x) > MAX_ANGLE):
            raise Unreadable("too large")
        if name in ("floor", "ceil"):
            return Fraction(int(getattr(self.mp, name)(x)))
        if name in ("asin", "acos") and abs(x) > 1:
            if abs(x) > 1.001:  # else it is 1, but for rounding
                raise ValueError("not real")
            x = self.mp.sign(x)
        return getattr(self.mp, name)(x)


# ---- equality ----------------------------------------------------------------------------------------------

def names(node: Node) -> set[str]:
    """The letters, functions ("f:sin") and marks of a tree."""
    if node[0] == "s":
        return set() if node[1] in ("pi", "e", "i") else {node[1]}
    own = {node[0]} if node[0] in MARKS else {"f:" + node[1]} if node[0] == "f" else set()
    return own.union(*map(names, children(node)))


def letters(node: Node) -> set[str]:
    """The letters and unknown functions of a tree."""
    return {n for n in names(node) if n not in MARKS and (n[:2] != "f:" or n[2] == "?")}


def real_value(node: Node) -> Fraction | None:
    """The real value of a tree without letters, to BITS bits; None if it has none within the bounds."""
    try:
        value = real(Evaluator({})(node))
        if isinstance(value, Fraction):
            return value
        if abs(value.exp) > MAX_BITS:
            return None
        size = int(value.man) * Fraction(2) ** value.exp
        return -size if value < 0 else size
    except (Unreadable, *UNDEFINED):
        return None


def zero_at(a: Node, b: Node, point: dict, modes: tuple, only_real: bool) -> bool | None:
    """Is a - b zero here? None if it is undefined. If BITS bits cannot decide, since the values met are large
    or small, it looks once more, at a precision above twice their span."""
    bits, span = BITS, None
    while True:
        value = Evaluator(point, modes, only_real, bits)
        try:
            x, y = value(a), value(b)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return x == y
            gap = value.inexact(x) - value.inexact(y)
        except UNDEFINED:
            return None
        size = max(magnitudes(gap)) if gap else -math.inf
        first, span = span is None, value.span if span is None else span
        if size > span - bits + 50:
            return False
        if not first or span <= 16:
            return size <= -(span + 116)
        if span > MAX_SPAN:
            raise Unreadable("too large")
        bits = (BITS + 2 * span) // 32 * 32 + 32  # few precisions, so that context() knows most of them


def random_point(rng: random.Random, variables: list[str], whole: int = 0) -> dict[str, Fraction]:
    """Random rationals, or natural numbers up to `whole` that grow with the alphabet: n choose k."""
    if whole:
        return {n: Fraction(rng.randint(1, whole) + whole * i) for i, n in enumerate(variables)}
    return {n: Fraction(rng.randint(1, 9999), rng.randint(500, 2500)) for n in variables}


def seeded(a: Node, b: Node) -> random.Random:
    """The same random numbers for (a, b) as for (b, a)."""
    return random.Random("".join(sorted((repr(a), repr(b)))))


def agree(a: Node, b: Node, found: set[str], modes: tuple) -> bool:
    """Equality at three random points or more: natural ones if factorials occur; and if roots or logarithms
    do, no difference at negative ones with real values. found: the names in both trees."""
    variables = sorted(n for n in found if n[:2] != "f:" and n not in MARKS)
    if not variables:
        return bool(zero_at(a, b, {}, modes, False))
    rng, agreed = seeded(a, b), 0
    roots = bool(found & {"f:root", "f:ln", "f:log", "f:log10"})
    whole = 8 if found & {"f:sum", "f:prod"} else 40 if found & {"!", "f:binom"} else 0
    for attempt in range(6):
        point = random_point(rng, variables, whole)
        only_real = roots and attempt > 2
        if not whole and (only_real if roots else attempt):
            point = {n: -v if attempt == 1 or rng.random() < 0.5 else v for n, v in point.items()}
        zero = zero_at(a, b, point, modes, only_real)
        if zero is False:
            return False
        agreed += zero is True
        if agreed == 3 and not roots:
            return True
    return agreed > 2


def equal_values(a: Node, b: Node) -> bool:
    """Equality of two expressions. A degree or percent sign that only one of them has may be read either way,
    and a logarithm without a base as the natural or the common one."""
    if a == b or a[0] == b[0] == "n":
        return a == b
    in_a, in_b = names(a), names(b)
    modes = [PLAIN]
    if ("deg" in in_a) != ("deg" in in_b):
        modes.append((True, False, False))
    if ("%" in in_a) != ("%" in in_b):
        modes.append((False, True, False))
    if "f:log" in in_a | in_b:
        modes.append((False, False, True))
    try:
        return any(agree(a, b, in_a | in_b, mode) for mode in modes)
    except (Unreadable, *UNDEFINED):
        return False


def proportional(a: Node, b: Node, positive: bool = False) -> bool:
    """Is a = c b for one constant c (above zero)? Tested as a(p) b(q) = a(q) b(p) at random points p, q."""
    variables = sorted(letters(a))
    if not variables or letters(b) != letters(a):
        return False
    rng = seeded(a, b)
    try:
        for _ in range(3):
            at_p, at_q = (Evaluator(random_point(rng, variables)) for _ in range(2))
            ap, aq, bp, bq = at_p(a), at_q(a), at_p(b), at_q(b)
            left, right = ap * bq, aq * bp
            gap = left - right
            noise = max(magnitudes(at_p.inexact(left)), default=0) - 116
            if not left or (gap and (isinstance(gap, Fraction) or max(magnitudes(gap)) > noise)):
                return False
            if positive and real(at_p.inexact(ap) / bp) < 0:
                return False
        return True
    except (Unreadable, *UNDEFINED):
        return False
