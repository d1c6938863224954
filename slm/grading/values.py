"""The values of expression trees: are two of them equal as numbers, or as functions of their letters?

Rationals are exact. What is irrational is evaluated in decimal arithmetic, at a precision chosen from the
sizes met on the way, so that 10**100 + sqrt(2) is not 10**100 + sqrt(3). Letters get random rational
values: two polynomials of degree d that differ agree at a random point of a set S with chance at most
d/|S| (Schwartz 1980). Bits, exponents, factorials and steps are bounded before computing; beyond the
bounds a tree has no value, and equals only itself.
"""

import builtins
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import (
    Context,
    Decimal,
    DecimalException,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    getcontext,
    localcontext,
)
from fractions import Fraction

from slm.grading.parse import Unreadable, children

MAX_BITS, MAX_FACTORIAL, MAX_SPAN, MAX_STEPS = 30_000, 3000, 1500, 9000
UNDEFINED = (ZeroDivisionError, DecimalException, OverflowError, ValueError)
ZERO, MINUS = Decimal(0), Fraction(-1)
PLAIN = (False, False, False)  # modes of an Evaluator: do degrees count, do percents, is log to base 10

SIGNS = ("%", "deg", "!")

Value = Fraction | tuple[Decimal, Decimal]  # a rational, or the real and imaginary part of what is not


BUDGET: ContextVar[list[int] | None] = ContextVar("budget", default=None)


@contextmanager
def bounded() -> Iterator[None]:
    """All comparisons of one answer share one budget of steps."""
    token = BUDGET.set([MAX_STEPS])
    try:
        yield
    finally:
        BUDGET.reset(token)


@contextmanager
def precision(digits: int) -> Iterator[None]:
    traps = [InvalidOperation, DivisionByZero, Overflow]
    with localcontext(Context(prec=digits, Emax=10**9, Emin=-(10**9), traps=traps)):
        yield


# ---- arithmetic of values ----------------------------------------------------------------------------------

def parts(x: Value) -> tuple[Decimal, Decimal]:
    return (Decimal(x.numerator) / x.denominator, ZERO) if isinstance(x, Fraction) else x


def real(x: Value) -> Fraction | Decimal:
    if not isinstance(x, Fraction) and x[1]:
        raise Unreadable("not real")
    return x if isinstance(x, Fraction) else x[0]


def decimal(x: Value) -> Decimal:
    real(x)
    return parts(x)[0]


def add(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    (ar, ai), (br, bi) = parts(a), parts(b)
    return ar + br, ai + bi


def mul(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    (ar, ai), (br, bi) = parts(a), parts(b)
    return (ar * br - ai * bi, ar * bi + ai * br) if ai or bi else (ar * br, ZERO)


def inverse(a: Value) -> Value:
    if isinstance(a, Fraction):
        return 1 / a
    size = a[0] * a[0] + a[1] * a[1]
    return a[0] / size, -a[1] / size


def integer(x: Value, limit: int) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= limit:
        raise Unreadable("too large, or no natural number")
    return int(x)


def bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def whole_root(value: int, n: int) -> int | None:
    """The exact n-th root of a natural number, or None."""
    root = value if value < 2 else math.isqrt(value) if n == 2 else 0
    if value > 1 and n > 2 and value.bit_length() < 900:
        root = round(math.exp(math.log(value) / n))
    return root if root**n == value else None


# ---- functions, at the precision of the context ------------------------------------------------------------

def machin() -> Decimal:
    """pi = 16 arctan(1/5) - 4 arctan(1/239), in integers."""
    one = 10 ** (getcontext().prec + 5)

    def arctan_of_inverse(n: int) -> int:
        power = total = one // n
        k = 1
        while abs(power) > 1:
            power, k = -power // (n * n), k + 2
            total += power // k
        return total
    return Decimal(4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))) / one


def sin_cos(x: Decimal, pi: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series, after reduction to [-pi, pi] and eight halvings."""
    if abs(x) > 10**20:
        raise Unreadable("too large")
    x = (x - 2 * pi * (x / (2 * pi)).to_integral_value()) / 256
    term, sin, cos, k, last = Decimal(1), ZERO, Decimal(1), 0, -getcontext().prec - 8
    while term and term.adjusted() > last:
        k += 1
        term = term * x / k
        if k % 2:
            sin += term if k % 4 == 1 else -term
        else:
            cos += term if k % 4 == 0 else -term
    for _ in range(8):
        sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
    return sin, cos


def atan(x: Decimal) -> Decimal:
    for _ in range(6):
        x = x / (1 + (1 + x * x).sqrt())
    power, total, k = x, x, 1
    while power and power.adjusted() > total.adjusted() - getcontext().prec - 2:
        power, k = -power * x * x, k + 2
        total += power / k
    return total * 64


def exp(x: Value, pi: Decimal) -> Value:
    re, im = parts(x)
    sin, cos = sin_cos(im, pi) if im else (ZERO, Decimal(1))
    return re.exp() * cos, re.exp() * sin


def log(x: Value, pi: Decimal) -> Value:
    """The principal value."""
    re, im = parts(x)
    if not im and re > 0:
        return re.ln(), ZERO
    angle = pi if not im else pi / 2 if not re else atan(abs(im) / abs(re))
    angle = pi - angle if im and re < 0 else angle
    return (re * re + im * im).ln() / 2, -angle if im < 0 else angle


class Evaluator:
    """The value of a tree at a point {letter: Fraction}. `span` is the largest decimal exponent met, in
    size."""

    def __init__(self, point: dict[str, Fraction], modes: tuple = PLAIN, real=False, budget=None):
        self.point, self.real, self.budget = point, real, budget or [MAX_STEPS]
        self.degree, self.percent, self.log10 = modes
        self.span, self.known_pi = 0, None

    @property
    def pi(self) -> Decimal:
        self.known_pi = self.known_pi or machin()
        return self.known_pi

    def work(self, steps: int) -> None:
        self.budget[0] -= steps
        if self.budget[0] < 0:
            raise Unreadable("too much work")

    def transcendental(self) -> None:
        self.work(30 * (getcontext().prec // 60) ** 2)

    def __call__(self, node: tuple) -> Value:
        self.work(1)
        value = self.evaluate(node)
        if isinstance(value, Fraction):
            if bits(value) > MAX_BITS:
                raise Unreadable("too large")
            self.span = max(self.span, bits(value) * 3 // 10)
        else:
            self.span = max(self.span, *(abs(part.adjusted()) for part in value if part), 0)
        return value

    def evaluate(self, node: tuple) -> Value:
        kind = node[0]
        if kind == "n":
            return node[1]
        if kind == "s":
            return self.letter(node[1])
        if kind == "f":
            return self.function(node[1], node[2:])
        if kind not in ("+", "-", "*", "/", "^", "!", "%", "deg"):
            raise Unreadable(f"no value for {kind}")
        x, y = self(node[1]), self(node[2]) if len(node) > 2 else None
        if kind == "+":
            return add(x, y)
        if kind == "-":
            return mul(MINUS, x)
        if kind == "*":
            return mul(x, y)
        if kind == "/":
            return mul(x, inverse(y))
        if kind == "^":
            return self.power(x, y)
        if kind == "!":
            return Fraction(math.factorial(integer(x, MAX_FACTORIAL)))
        if kind == "%":
            return mul(x, Fraction(1, 100)) if self.percent else x
        return mul(x, (self.pi / 180, ZERO)) if self.degree else x

    def letter(self, name: str) -> Value:
        if name == "i":
            return ZERO, Decimal(1)
        if name == "pi":
            return self.pi, ZERO
        if name == "e":
            self.transcendental()
            return Decimal(1).exp(), ZERO
        if name not in self.point:
            raise Unreadable(f"no value for {name}")
        return self.point[name]

    def power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction):
            n = exponent.numerator
            if isinstance(base, Fraction):
                if base in (1, -1, 0) and n >= 0:
                    n = n % 2 + 2 * (n > 0)
                if bits(base) * abs(n) > MAX_BITS:
                    raise Unreadable("too large")
                return self.root(base**n, exponent.denominator) if exponent.denominator > 1 else base**n
            if exponent.denominator == 1 and abs(n) <= 400:
                out: Value = Fraction(1)
                for bit in bin(abs(n))[2:]:
                    out = mul(out, out)
                    out = mul(out, base) if bit == "1" else out
                return inverse(out) if n < 0 else out
        if not any(parts(base)):
            raise ZeroDivisionError
        self.transcendental()
        return exp(mul(exponent, log(base, self.pi)), self.pi)

    def root(self, value: Value, n: int) -> Value:
        """The n-th root: rational where it is, the real one of a negative number for odd n, else the
        principal."""
        self.work(10)
        if self.real and not n % 2 and real(value) < 0:
            raise ValueError("not real")
        if isinstance(value, Fraction):
            if value < 0 and (n % 2 or n == 2):
                return mul(self.root(-value, n), MINUS if n % 2 else (ZERO, Decimal(1)))
            top, low = whole_root(abs(value.numerator), n), whole_root(value.denominator, n)
            if value >= 0 and top is not None and low is not None:
                return Fraction(top, low)
        re, im = parts(value)
        if im or n > 2:
            self.transcendental()
        if not im and (re >= 0 or n % 2):
            size = abs(re).sqrt() if n == 2 else abs(re) ** (1 / Decimal(n)) if re else re
            return size.copy_sign(re), ZERO
        return exp(mul(Fraction(1, n), log(value, self.pi)), self.pi)

    def function(self, name: str, args: tuple) -> Value:
        if not args:
            raise Unreadable("of nothing")
        self.work(20)
        if name not in ("root", "abs", "floor", "ceil"):
            self.transcendental()
        degree, self.degree = self.degree, self.degree or name in ("sin", "cos")
        values = [self(a) for a in args]
        self.degree = degree
        x = values[0]
        if name in ("sin", "cos"):
            return sin_cos(decimal(x), self.pi)[name == "cos"], ZERO
        if name == "root":
            return self.root(x, max(integer(values[1], 1000), 1))
        if name in ("ln", "log", "log10"):
            if self.real and real(x) < 0:
                raise ValueError("not real")
            base10 = name == "log10" or (name == "log" and self.log10)
            return mul(log(x, self.pi), inverse(log(Fraction(10), self.pi))) if base10 else log(x, self.pi)
        if name == "exp":
            return exp(x, self.pi)
        if name == "abs":
            return abs(x) if isinstance(x, Fraction) else ((x[0] * x[0] + x[1] * x[1]).sqrt(), ZERO)
        if name == "atan":
            return atan(decimal(x)), ZERO
        if name in ("asin", "acos"):
            y = decimal(x)
            angle = atan(y / (1 - y * y).sqrt()) if abs(y) < 1 else y * self.pi / 2
            return angle if name == "asin" else self.pi / 2 - angle, ZERO
        if name in ("sinh", "cosh"):
            up = exp(x, self.pi)
            return mul(add(up, mul(MINUS if name == "sinh" else Fraction(1), inverse(up))), Fraction(1, 2))
        if name in ("floor", "ceil"):
            return Fraction(getattr(math, name)(real(x)))
        if name in ("max", "min"):
            return getattr(builtins, name)(values, key=decimal)
        if name in ("gcd", "lcm", "mod"):
            numbers = [integer(v, 10**100) for v in values]
            return Fraction(numbers[0] % numbers[1] if name == "mod" else getattr(math, name)(*numbers))
        if name == "binom":
            return Fraction(math.comb(*(integer(v, MAX_FACTORIAL) for v in values)))
        key = name + "".join(str(v) if isinstance(v, Fraction) else f"{v[0]:.25e}{v[1]:.25e}" for v in values)
        return Fraction(zlib.crc32(key.encode()) + 1, 65537)  # unknown: one value for each argument


# ---- equality ----------------------------------------------------------------------------------------------

def names(node: tuple) -> set[str]:
    """The letters, functions ("f:sin") and signs of a tree."""
    if node[0] == "s":
        return set() if node[1] in ("pi", "e", "i") else {node[1]}
    own = {node[0]} if node[0] in SIGNS else {"f:" + node[1]} if node[0] == "f" else set()
    return own.union(*map(names, children(node)))


def letters(node: tuple) -> set[str]:
    """The letters and unknown functions of a tree."""
    return {n for n in names(node) if n not in SIGNS and (n[:2] != "f:" or n[2] == "?")}


def number(node: tuple, digits: int = 40) -> Fraction | Decimal | None:
    """The real value of a tree without letters; None where there is none within the bounds."""
    try:
        with precision(digits):
            return real(Evaluator({})(node))
    except (Unreadable, *UNDEFINED):
        return None


def zero_at(a: tuple, b: tuple, point: dict, modes: tuple, real: bool, budget: list) -> bool | None:
    """Is a - b zero here? None where it is undefined. At 60 digits; where the sizes met leave that undecided,
    once more at a precision above twice their span."""
    digits, span = 60, None
    while True:
        with precision(digits):
            value = Evaluator(point, modes, real, budget)
            try:
                x, y = value(a), value(b)
                if isinstance(x, Fraction) and isinstance(y, Fraction):
                    return x == y
                gap = max(map(abs, parts(add(x, mul(MINUS, y)))))
            except UNDEFINED:
                return None
        first, span = span is None, value.span if span is None else span
        if gap and gap.adjusted() > span - digits + 15:
            return False
        if not first or span <= 4:
            return not gap or gap.adjusted() <= -(span + 35)
        if span > MAX_SPAN:
            raise Unreadable("too large")
        digits = 60 + 2 * span


def random_point(rng: random.Random, variables: list[str], whole: bool = False) -> dict[str, Fraction]:
    """Random rationals, or natural numbers that grow with the alphabet: n choose k."""
    if whole:
        return {n: Fraction(rng.randint(1, 40) + 40 * i) for i, n in enumerate(variables)}
    return {n: Fraction(rng.randint(1, 9999), rng.randint(500, 2500)) for n in variables}


def agree(a: tuple, b: tuple, variables: list[str], found: set[str], modes: tuple, budget: list) -> bool:
    """Equality at three random points or more: natural ones where factorials occur; and where roots or
    logarithms do, no difference at negative ones with real values."""
    if not variables:
        return bool(zero_at(a, b, {}, modes, False, budget))
    rng, agreed = random.Random("".join(sorted((repr(a), repr(b))))), 0
    roots, whole = bool(found & {"f:root", "f:ln", "f:log", "f:log10"}), bool(found & {"!", "f:binom"})
    for attempt in range(6):
        point = random_point(rng, variables, whole)
        real = roots and attempt > 2
        if not whole and (real if roots else attempt):
            point = {n: -v if attempt == 1 or rng.random() < 0.5 else v for n, v in point.items()}
        verdict = zero_at(a, b, point, modes, real, budget)
        if verdict is False:
            return False
        agreed += verdict is True
        if agreed == 3 and not roots:
            return True
    return agreed > 2


def equal_values(a: tuple, b: tuple) -> bool:
    """Equality of two expressions. A degree or percent sign that only one of them has may be read either way,
    and a logarithm without a base as the natural or the common one."""
    if a == b or a[0] == b[0] == "n":
        return a == b
    in_a, in_b = names(a), names(b)
    found = in_a | in_b
    modes = [PLAIN]
    if ("deg" in in_a) != ("deg" in in_b):
        modes.append((True, False, False))
    if ("%" in in_a) != ("%" in in_b):
        modes.append((False, True, False))
    if "f:log" in found:
        modes.append((False, False, True))
    variables = sorted(n for n in found if n[:2] != "f:" and n not in SIGNS)
    budget = BUDGET.get() or [MAX_STEPS]
    try:
        return any(agree(a, b, variables, found, mode, budget) for mode in modes)
    except (Unreadable, *UNDEFINED):
        return False


def proportional(a: tuple, b: tuple, positive: bool = False) -> bool:
    """Is a = c b for one constant c (above zero)? Tested as a(p) b(q) = a(q) b(p) at random points p, q."""
    variables = sorted(letters(a))
    if not variables or letters(b) != letters(a):
        return False
    rng = random.Random("".join(sorted((repr(a), repr(b)))))
    try:
        for _ in range(3):
            p, q = (random_point(rng, variables) for _ in range(2))
            with precision(60):
                ap, aq, bp, bq = (Evaluator(at)(x) for x in (a, b) for at in (p, q))
                left, right = mul(ap, bq), mul(aq, bp)
                gap, size = max(map(abs, parts(add(left, mul(MINUS, right))))), max(map(abs, parts(left)))
                if gap > (0 if isinstance(left, Fraction) else size.scaleb(-35)) or not size:
                    return False
                if positive and real(mul(ap, inverse(bp))) < 0:
                    return False
        return True
    except (Unreadable, *UNDEFINED):
        return False
