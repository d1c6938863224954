r"""Read a written answer and decide whether two of them have the same value.

`parse` turns LaTeX or plain text into a small tree of tuples with our own tokenizer and recursive-descent parser;
`same` compares two trees. Text never reaches eval or a computer algebra system. Numbers are exact rationals; what is
irrational is evaluated in decimal arithmetic at a precision chosen from the sizes met on the way, and letters by random
rational points (Schwartz 1980: a polynomial of degree d vanishes at a random point of a set S with chance d/|S|).
Everything is bounded before it is computed: length, nesting, digits, exponents, factorials, steps.

Nodes: ("n", Fraction) ("s", name) ("+" "*" "/" "^", a, b) ("-" "!" "%" "deg" "±", a) ("f", name, *args) ("inf",)
("text", words) ("list" "set", *items) ("tuple", opener, closer, *items) ("matrix", *rows) ("rel", items, operators)
("union" "minus", a, b) ("ratio", *parts) ("unit", node, unit) ("choice", letter, node) ("time", seconds, half of day).
"""

import math
import random
import re
import unicodedata
import zlib
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction

MAX_CHARS, MAX_DEPTH, MAX_DIGITS, MAX_BITS, MAX_FACTORIAL, MAX_ITEMS = 2000, 24, 1500, 30_000, 3000, 60
MAX_TOKENS = 500


class Unreadable(Exception):
    """The text is outside the grammar, or the value outside the bounds: only the same text is equal to it."""


# ---------------------------------------------------------------- cleaning

UNICODE = {
    **{c: f"^{{{d}}}" for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")},
    **{c: f"_{{{d}}}" for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")},
    **{c: rf"\frac{{{a}}}{{{b}}}" for c, a, b in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")},
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "−": "-", "–": "-", "—": "-",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "≈": r"\approx ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "φ": r"\phi ", "ℝ": r"\mathbb{R}",
    "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "→": r"\to ", "′": "'", "’": "'", "…": r"\ldots ",
    "∠": r"\angle ", "△": r"\triangle ", "∧": r"\land ", "∨": r"\lor ", "，": ",", "。": ".", "％": "%", "λ": r"\lambda ",
    "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ", "¢": r"\text{ cents}", "∖": r"\setminus ", "\u2212": "-", "\u200b": "",
}  # fmt: skip
NOISE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|mathstrut|middle|hfill|centering|boldsymbol)"
                   r"(?![a-zA-Z])\.?|(?<!\\)\\[!,;:> ]|\\(?:q?quad|hspace\*?\{[^{}]*\}|phantom\{[^{}]*\})|~|\\\$(?=\s*$)")
THOUSANDS = re.compile(r"(?<=\d)(?:,\s?(?:\\!)+\s*|\{,\}\s*|\\[,!;: ]\s*|(?<=\d) )(?=\d{3}(?!\d))")
REWRITES = [(re.compile(a), b) for a, b in (
    (r"\\text\s*\{\s*([0-9A-Z]+)\s*\}\s*_|\(([0-9A-Z.]+)\)_(?=[{\d])", r"\1\2_"),  # a numeral in \text or ( ) before its base
    (r"\b([0-9][0-9A-Z]*)\s*\(?(?:\\text\{)?\s*\(?(?:in )?base[ -]?\}?\s*(\d+)\)?\}?\)?", r"\1_{\2}"),
    (r"\\left\s*\\\{\s*(?=\\begin)", ""),  # the brace before a system of equations
    (r"\^\{?(?:\\text\{)?(?:st|nd|rd|th)\}{0,2}(?![a-z])|(?<=\d)(?:st|nd|rd|th)\b", ""),
    (r"(?<=\d)\s*m/s\s*$", " mps"),
    (r"\\text\s*\{\s*\([a-z ]+\)\s*\}\s*$", ""),
    (r"^\s*(?:(?i:option|choice|answer)\s+(?=\(?[A-H]\b)|[=:])|`", ""),
)]  # fmt: skip
DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")


def clean(text: str) -> str:
    """One spelling for the many of one thing: unicode signs as LaTeX, no spacing or sizing commands, no `$`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(UNICODE.get(c, c) for c in text))[: MAX_CHARS + 1]
        text = "".join(UNICODE.get(c, str(unicodedata.decimal(c, c))) for c in text).replace("}^{", "")
    if r"\\" in text and r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z!,;$%{}])", r"\\", text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    while text != (text := THOUSANDS.sub("", text)):
        pass
    text = NOISE.sub(" ", DECIMAL_COMMA.sub(".", text))
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]|^\s*\*\*|\*\*\s*$", " ", text)
    if text.count("$") - text.count(r"\$") != 1:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;: ")


# ---------------------------------------------------------------- units

UNIT_TABLE = """
length: m meter metre 1, cm centimeter centimetre 1/100, mm millimeter millimetre 1/1000, km kilometer kilometre 1000,
 in inch inche 127/5000, ft foot feet 381/1250, yd yard 1143/1250, mi mile 201168/125
mass: g gm gram gramme 1, kg kilogram kilo 1000, mg milligram 1/1000, lb pound 45359237/100000, oz ounce 45359237/1600000, ton 907184.74
time: s sec second 1, min minute 60, h hr hour 3600, day 86400, week 604800, month 2629746, yr year 31556952
money: dollar usd buck 1, cent 1/100
euro: euro eur 1
gbp: quid gbp 1
yen: yen 1
angle: degree deg 1
volume: L l liter litre 1, mL ml milliliter millilitre 1/1000, gallon gal 3.785411784
degree C: celsius 1
degree F: fahrenheit 1
"""
UNITS: dict[str, tuple[str, Fraction]] = {}
for line in UNIT_TABLE.replace("\n ", " ").strip().splitlines():
    dimension, _, rows = line.partition(":")
    for row in rows.split(","):
        *names, factor = row.split()
        UNITS.update({name: (dimension, Fraction(factor)) for name in names})
SHORT_UNITS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "mps": "m/s", "sqft": "ft^2"}
NUMBER_WORDS = {w: n for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen "
                                           "fourteen fifteen sixteen seventeen eighteen nineteen twenty".split())}


def unit_of(words: list[str]) -> tuple | None:
    """(dimensions, factor to the base unit) of words such as `square feet`, `km / h`, `cm ^ 2`; None if one is unknown
    (`eggs`, `ways`): an unknown unit says nothing, two known ones must agree in dimension and, scaled, in value."""
    words = re.findall(r"[a-zA-Z]+|\d+|[/^]", " ".join(SHORT_UNITS.get(w, w) for w in words))
    dims: dict[str, int] = {}
    factor, power, sign = Fraction(1), 1, 1
    for i, word in enumerate(words):
        if word in ("square", "sq", "cubic", "cu"):
            power = 2 if word[0] == "s" else 3
        elif word in ("/", "per"):
            sign = -1
        elif word not in ("^",) and not word.isdigit():
            known = UNITS.get(word) or UNITS.get(word.lower()) or UNITS.get(word.lower().removesuffix("s"))
            if not known:
                return None
            if words[i + 1 : i + 2] == ["squared"] or words[i + 1 : i + 3] == ["^", "2"]:
                power = 2
            elif words[i + 1 : i + 2] == ["cubed"] or words[i + 1 : i + 3] == ["^", "3"]:
                power = 3
            dims[known[0]] = dims.get(known[0], 0) + sign * power
            factor, power = factor * known[1] ** (sign * power), 1
    return (tuple(sorted(dims.items())), factor) if dims else None


# ---------------------------------------------------------------- lexer

FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh ln log lg exp sqrt cbrt abs max "
                "min gcd lcm floor ceil".split())
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
            "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar".split())
TEXT = set("text mbox textbf textit textrm mathrm textnormal operatorname hbox textup textsf mathsf texttt rm mathtt".split())
WRAPPERS = set("mathbf boldsymbol vec hat widehat overrightarrow mathit mathcal bm triangle angle overline bar boxed fbox "
               "underline underbrace tilde mathbb measuredangle boxed color ensuremath textcolor mathord".split())
ALIAS = {"cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=",
         "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "{": "\\{", "}": "\\}", "lbrace": "\\{",
         "rbrace": "\\}", "|": "|", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "colon": ":", "%": "%", "lbrack": "[",
         "rbrack": "]", "lparen": "(", "rparen": ")", "\\": ";", "newline": ";", "and": ",", "land": ",", "lor": ",", "wedge": ",",
         "vee": ",", "or": ",", "approx": "~", "thickapprox": "~", "simeq": "~", "doteq": "~", "dfrac": "frac", "tfrac": "frac",
         "cfrac": "frac", "varnothing": "emptyset", "dots": "ldots", "cdots": "ldots", "degree": "circ", "implies": "=>",
         "Rightarrow": "=>", "to": "=>", "rightarrow": "=>", "Longrightarrow": "=>", "iff": "=>", "infinity": "infty", "inf": "infty",
         "textdollar": "$", "#": "#", "&": "&", "_": "_", "backslash": "setminus", "prime": "'", "dbinom": "binom", "tbinom": "binom",
         "infin": "infty", "oo": "infty", "equiv": "=", "smallsetminus": "setminus"}  # fmt: skip
TOKEN = re.compile(
    r"(?P<based>[0-9][0-9A-Z]*(?:\.[0-9A-Z]+)?_(?:\d{1,2}(?!\d)|\{\s*(?:\\\w+\{)?\s*\w{1,7}\s*\}?\s*\})|[A-Z][0-9A-Z]*[0-9][0-9A-Z]*_\{\d\d\})"
    r"|(?P<repeat>\d*\.\d*\\(?:overline|bar|dot)\s*\{?\d+\}?)"
    r"|(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|\\(?P<cmd>[a-zA-Z]+|.)|(?P<word>[a-zA-Z]+)|(?P<op><=|>=|!=|==|=>|->|\*\*|\S)"
)


def braced(text: str, start: int) -> int:
    """Index just after the brace that closes the one at `start`."""
    depth = 0
    for m in re.compile(r"\\.|[{}]").finditer(text, start):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return m.end()
    raise Unreadable("unbalanced braces")


SHORT_WORDS = set("no on up to is in am pm of by at as it so an if we".split())


def letters(run: str, after_number: bool) -> list[tuple[str, str]]:
    """A run of letters outside \\text: a function, a constant, words, or a product of one-letter variables."""
    if run in FUNCTIONS or run in GREEK or run in ("pi", "infinity", "inf", "oo", "infty", "cup", "pm"):
        return [("cmd", ALIAS.get(run, run))]
    if len(run) == 1 or (run.isupper() and len(run) > 1) or (len(run) == 2 and not (after_number and is_unit(run))
                                                            and run not in SHORT_WORDS):
        return [("sym", run)] if run.isupper() else [("sym", c) for c in run]
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "sqrt", "pi"):
        if run.startswith(name) and len(run) - len(name) <= 1:
            return [("cmd", name), ("sym", run[-1])]
    if len(set(run)) == len(run) <= 4 and any(run in pool for pool in ("abcdef", "uvwxyz", "pqrst", "klmn")):
        return [("sym", c) for c in run]
    return [("word", run)]


def is_unit(word: str) -> bool:
    return word in UNITS or word in SHORT_UNITS or word.removesuffix("s") in UNITS


def tokenize(text: str, prose: bool = False, merge: bool = True) -> list[tuple[str, str]]:
    """Tokens (kind, text) of a cleaned answer. Inside brackets, or with merge off, `1,000` is two numbers."""
    out: list[tuple[str, str]] = []
    open_brackets: list[str] = []
    pos, wordy = 0, bool(re.search("[a-zA-Z]{2}", text)) or text.strip() in set("mgshL")
    while m := TOKEN.search(text, pos):
        kind, tok, pos = m.lastgroup, m[m.lastgroup], m.end()
        if kind == "num" and "," in tok and (not merge or (open_brackets and open_brackets[-1] != "{")):
            tok = re.match(r"\d+", tok)[0]
            pos = m.start() + len(tok)
        if kind == "cmd" and tok in TEXT and text[pos:].lstrip().startswith("{"):
            start = text.index("{", pos)
            pos = braced(text, start)
            inside = text[start + 1 : pos - 1]
            unit = tok != "mathrm" or len(inside.strip()) > 1 or (out and out[-1][0] == "num" and inside.strip() in "mgshL")
            out += tokenize(inside, prose=bool(unit), merge=merge)
            continue
        if kind == "cmd" and tok == "begin":
            end = text.find("}", pos)
            out.append(("begin", text[pos:end].strip("{ *")))
            pos = end + 1
            continue
        if kind == "cmd":
            tok = ALIAS.get(tok, tok)
            kind = "cmd" if tok[0].isalpha() else "op"
        if kind == "word":
            low = tok.lower()
            if low in ("or", "and"):
                out.append(("op", ","))
            elif low == "pi":
                out.append(("cmd", "pi"))
            elif prose:
                out.append(("sym" if len(tok) == 1 and (tok.isupper() or not wordy) else "word", tok))
            else:
                out += letters(tok, bool(out) and out[-1][0] == "num")
            continue
        if kind == "op":
            tok = {"==": "=", "**": "^", "->": "=>", "≡": "="}.get(tok, tok)
            if tok in "([{" or tok == "\\{":
                open_brackets.append(tok)
            elif open_brackets and (tok in ")]}" or tok == "\\}"):
                open_brackets.pop()
        out.append((kind, tok))
        if len(out) > MAX_TOKENS:
            raise Unreadable("too long")
    return out


# ---------------------------------------------------------------- parser

ENDS = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "langle": ("rangle",), "{": ("}",), "]": ("[", "]")}
RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "~", "in", "=>")
ARTICLES = {"a", "an", "the"}
SCALES = {"hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6), "billion": Fraction(10**9),
          "trillion": Fraction(10**12), "dozen": Fraction(12), "percent": None, "half": Fraction(1, 2), "halves": Fraction(1, 2)}
for n, word in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3):
    SCALES |= {word: Fraction(1, n), word + "s": Fraction(1, n)}
SCALES |= {"quarters": Fraction(1, 4), "hundredths": Fraction(1, 100), "thousandths": Fraction(1, 1000)}
COINS = {"$": "money", "euro": "euro", "pound": "gbp", "yen": "yen"}
OPERATOR_WORDS = set("not minus plus times over divided factorial root cubed than neither either between".split())
FOLD = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "lg": "log10"}


def number(text: str) -> tuple:
    if len(text) > MAX_DIGITS or len(text.lower().partition("e")[2]) > 4:
        raise Unreadable("number too long")
    return ("n", Fraction(text.replace(",", "").removesuffix(".")))


def based(text: str) -> tuple:
    """`1101_2`, `2A_{11}`, `0.11_{two}`: the value."""
    digits, _, base = text.partition("_")
    base = re.sub(r"\\\w+|[{} ]", "", base)
    base = NUMBER_WORDS.get(base.lower()) or (int(base) if base.isdigit() else 0)
    whole, _, part = digits.partition(".")
    if not 2 <= base <= 36 or len(digits) > MAX_DIGITS or any(int(d, 36) >= base for d in whole + part):
        raise Unreadable("not a numeral of that base")
    return ("n", Fraction(int(whole + part, base), base ** len(part)))


def repeating(text: str) -> tuple:
    r"""`0.1\overline{6}` = 1/6."""
    head, tail = re.split(r"\\\w+\s*", text)
    tail = tail.strip("{}")
    whole, _, fixed = head.partition(".")
    start, period = int(whole + fixed or 0), int((whole + fixed or "0") + tail)
    return ("n", Fraction(period - start, 10 ** len(fixed) * (10 ** len(tail) - 1)))


class Parser:
    """Recursive descent over the tokens; each method reads one level of the grammar and returns a node."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.pos, self.depth, self.bars, self.money = tokens, 0, 0, 0, None

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        i = self.pos + ahead
        return self.tokens[i] if i < len(self.tokens) else ("end", "")

    def take(self, *ops: str) -> str | None:
        kind, tok = self.peek()
        if tok in ops and kind in ("op", "cmd"):
            self.pos += 1
            return tok
        return None

    def need(self, *ops: str) -> str:
        tok = self.take(*ops)
        if tok is None:
            raise Unreadable(f"expected {ops[0]}")
        return tok

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deep")

    def answer(self) -> tuple:
        """item (separator item)*, to the end of the text."""
        node = self.items(())
        if self.peek()[0] != "end":
            raise Unreadable(f"unexpected {self.peek()[1]}")
        return node

    def items(self, closers: tuple) -> tuple:
        out = []
        while self.peek()[0] != "end" and self.peek()[1] not in closers:
            if not self.take(",", ";", "&"):
                out.append(self.item())
                if len(out) > MAX_ITEMS:
                    raise Unreadable("too many items")
        if not out:
            return ("list",)
        return out[0] if len(out) == 1 else ("list", *out)

    def item(self) -> tuple:
        """A relation chain such as `x = 1 < y`, or words, with a label, unit or letter choice around it."""
        if choice := self.choice():
            return choice
        if self.peek()[0] == "word" and self.peek()[1].lower() not in NUMBER_WORDS:
            return self.words()
        nodes, ops = [], []
        if self.peek() == ("op", "~"):
            self.pos += 1
        nodes.append(self.measured())
        while self.peek()[1] in RELATIONS and self.peek()[0] in ("op", "cmd"):
            ops.append(self.take(*RELATIONS))
            nodes.append(self.measured())
        return ("rel", tuple(nodes), tuple(ops)) if ops else nodes[0]

    def choice(self) -> tuple | None:
        """`(C)` alone is the symbol C; `(C) 12` and `C. 12` are a letter with its text."""
        toks = [self.peek(i) for i in range(4)]
        if toks[0] == ("op", "("):
            toks.pop(0)
            if toks[1] != ("op", ")"):
                return None
        elif toks[1][1] not in (")", "."):
            return None
        if not re.fullmatch("[A-H]", toks[0][1]) or toks[2][0] not in ("num", "word", "cmd") or toks[2][1] in ("in", "cup", "cap"):
            return None
        self.pos += 3 if self.peek()[1] == "(" else 2
        return ("choice", toks[0][1], self.item())

    def words(self) -> tuple:
        """Words up to the next separator: a label before `=` or `:` is dropped, else they are the answer."""
        start = self.pos
        while self.peek()[0] != "end" and self.peek()[1] not in (",", ";", "=", ":", ")", "]", "}", "\\}", "~"):
            self.pos += 1
        if self.take("=", ":", "~"):
            return self.item()
        kinds = [k for k, _ in self.tokens[start : self.pos]]
        if (at := next((i for i, t in enumerate(self.tokens[start : self.pos]) if t[1] in ("is", "are", "equals")), None)) is not None:
            self.pos = start + at + 1
            return self.item()
        if kinds.count("num") == 1 and kinds[-1] == "num" and self.tokens[start][1] in ("about", "approximately", "USD", "exactly"):
            self.pos = start + 1
            return self.item()
        return text_node(" ".join(t for _, t in self.tokens[start : self.pos]))

    def measured(self) -> tuple:
        """An expression with its unit: `5 cm^2`, `$5`, `3 eggs per day`, `2 hours 30 minutes`, `5 million`, `5 percent`."""
        self.money = None
        kind, tok = self.peek()
        if kind == "word" and tok.lower() in NUMBER_WORDS and not self.depth:
            self.pos += 1
            node = ("n", Fraction(NUMBER_WORDS[tok.lower()]))
        else:
            node = self.sum()
        if self.peek() == ("op", ":") and self.bars is not True:
            parts = [node]
            while self.take(":"):
                parts.append(self.sum())
            node = ("ratio", *parts)
        while self.peek()[0] == "word" and self.peek()[1].lower() in SCALES:
            scale = SCALES[self.peek()[1].lower()]
            self.pos += 1
            node = ("*", node, ("n", scale)) if scale else ("%", node)
        money, words = self.money, self.unit_words()
        if not words and not money:
            return node
        unit = (((money, 1),), Fraction(1)) if money else unit_of(words)
        if unit and words and self.peek()[0] == "num":
            rest = self.measured()
            if rest[0] != "unit" or not rest[2] or rest[2][0] != unit[0]:
                raise Unreadable("two measures")
            node, unit = ("+", node, ("*", rest[1], ("n", rest[2][1] / unit[1]))), unit
        return ("unit", node, unit)

    def unit_words(self) -> list[str]:
        words: list[str] = []
        while (t := self.peek())[0] == "word" or (words and t in (("op", "/"), ("op", "^"), ("op", "."))) or (
                words and words[-1] == "^" and t[0] == "num") or (words and words[-1] == "/" and t[0] == "sym"):
            words.append(t[1])
            self.pos += 1
            if t[1] == "^" and self.take("{"):
                words.append(self.peek()[1])
                self.pos += 1
                self.need("}")
            if len(words) > 12 or t[1].lower() in OPERATOR_WORDS:
                raise Unreadable("prose")
        return words

    def sum(self) -> tuple:
        """Terms under + - ± and the set operations."""
        self.deeper()
        sign = self.take("+", "-", "pm", "mp")
        node = self.term()
        node = {"-": ("-", node), "pm": ("±", node), "mp": ("-", ("±", node))}.get(sign, node)
        while op := self.take("+", "-", "pm", "mp", "cup", "cap", "setminus", "bigcup"):
            right = self.term()
            if op in ("cup", "bigcup", "cap", "setminus"):
                node = ({"setminus": "minus", "cap": "cap"}.get(op, "union"), node, right)
            else:
                node = ("+", node, {"+": right, "-": ("-", right), "pm": ("±", right), "mp": ("-", ("±", right))}[op])
        self.depth -= 1
        return node

    def term(self) -> tuple:
        """Factors under explicit and implicit multiplication and division; `2\\frac{1}{3}` is a mixed number."""
        node = self.factor()
        while True:
            last = self.tokens[self.pos - 1] if self.pos else ("", "")
            kind, tok = self.peek()
            if self.take("*"):
                node = product(node, self.factor())
            elif self.take("/"):
                node = ("/", node, self.factor())
            elif last[0] == "num" and node[0] == "n" and node[1].denominator == 1 and (kind == "num" or tok == "frac"):
                part = self.factor()
                if kind == "num":
                    self.need("/")
                    part = ("/", part, self.factor())
                if not (part[0] == "/" and part[1][0] == part[2][0] == "n"):
                    node = product(node, part)
                elif part[1][1] < part[2][1]:
                    node = ("+", node, part)
                else:
                    node = product(node, part)
            elif self.starts_factor(kind, tok) and not kind == last[0] == "num":
                node = product(node, self.factor())
            else:
                return node

    def starts_factor(self, kind: str, tok: str) -> bool:
        if kind in ("sym", "num", "begin") or (kind == "op" and (tok in ("(", "{", "\\{") or (tok == "|" and not self.bars))):
            return True
        return kind == "cmd" and tok not in RELATIONS and tok not in ("cup", "cap", "setminus", "pm", "mp", "bigcup", "end", "rangle",
                                                                    "quad", "infty", "rfloor", "rceil", "circ", "bmod", "pmod", "mod")

    def factor(self) -> tuple:
        """A signed atom with its postfixes: powers, factorial, percent, degrees."""
        if sign := self.take("-", "+", "pm"):
            self.deeper()
            node = self.factor()
            self.depth -= 1
            return node if sign == "+" else ("-" if sign == "-" else "±", node)
        if coin := self.take(*COINS):
            node = self.factor()
            self.money = COINS[coin]
            return node
        node = self.atom()
        while True:
            if self.take("^"):
                node = self.power(node)
            elif self.take("!"):
                if self.peek() == ("op", "!"):
                    raise Unreadable("double factorial")
                node = ("!", node)
            elif self.take("%"):
                node = ("%", node)
            elif self.take("circ"):
                node = ("deg", node)
                if self.peek() in (("sym", "C"), ("sym", "F")) and self.peek(1)[0] == "end":
                    self.money = "degree " + self.peek()[1]
                    self.pos += 1
            elif self.peek() == ("op", "'") and node[0] == "s":
                self.pos += 1
                node = ("s", node[1] + "'")
            elif self.peek()[1] in COINS and self.peek(1)[0] in ("end", "op"):
                self.money = COINS[self.peek()[1]]
                self.pos += 1
            else:
                return node

    def power(self, base: tuple) -> tuple:
        if self.peek() == ("cmd", "circ"):
            return base
        if [self.peek(i)[1] for i in range(3)] == ["{", "circ", "}"]:
            self.tokens[self.pos : self.pos + 3] = [("cmd", "circ")]
            return base
        if sign := self.take("-", "+"):
            exponent = self.argument(whole=True)
            return ("^", base, ("-", exponent) if sign == "-" else exponent)
        exponent = self.argument(whole=True)
        if exponent in (("s", "T"), ("s", "top")) and base[0] in ("matrix", "tuple"):
            return ("matrix", *zip(*base[1:])) if base[0] == "matrix" else base
        return ("^", base, exponent)

    def argument(self, whole: bool = False) -> tuple:
        r"""What a command takes: `{...}` or one token; `\frac12` takes one digit, a power the whole number."""
        kind, tok = self.peek()
        if self.take("{"):
            node = self.items(("}",))
            self.need("}")
            return node
        if kind == "num" and not whole and len(tok) > 1 and tok.isdigit():
            self.tokens[self.pos] = ("num", tok[1:])
            return ("n", Fraction(int(tok[0])))
        if kind == "op" and tok == "(" and whole:
            return self.bracket()
        return self.atom()

    def atom(self) -> tuple:
        kind, tok = self.peek()
        self.pos += 1
        if kind in ("num", "based", "repeat"):
            return {"num": number, "based": based, "repeat": repeating}[kind](tok)
        if kind == "sym":
            return self.symbol(tok)
        if kind == "cmd":
            return self.command(tok)
        if kind == "begin":
            return self.environment(tok)
        if kind == "op" and tok in ENDS:
            self.pos -= 1
            return self.bracket()
        if kind == "op" and tok == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.need("|")
            return ("f", "abs", node)
        raise Unreadable(f"unexpected {tok}")

    def symbol(self, name: str) -> tuple:
        """A variable with its subscript; `f(x)` is a call, `P(1, 2)` a labelled point."""
        if self.take("_"):
            sub = self.argument(whole=True)
            name += "_" + (str(sub[1]) if sub[0] in "ns" else repr(sub))
        if self.peek() == ("op", "("):
            start = self.pos
            inside = self.bracket()
            if inside[0] == "tuple":
                return inside if name.isupper() else ("f", "?" + name, *inside[3:])
            if name[0] in "fgFG" and len(name) < 3:
                return ("f", "?" + name, inside)
            self.pos = start
        return ("s", name)

    def bracket(self) -> tuple:
        """( ) [ ] \\{ \\} and langle: a group, tuple, interval or set."""
        opener = self.take(*ENDS)
        self.deeper()
        bars, self.bars = self.bars, opener == "\\{"  # in a set, | and : stand before a condition
        node = self.items((*ENDS[opener], "|", ":") if opener == "\\{" else ENDS[opener])
        if opener == "\\{" and self.take("|", ":"):
            node = self.items(ENDS[opener])
            self.need("\\}")
            self.bars = bars
            self.depth -= 1
            return node
        closer = self.need(*ENDS[opener])
        self.bars = bars
        self.depth -= 1
        parts = node[1:] if node[0] == "list" else (node,)
        if opener == "\\{" or (opener == "{" and len(parts) > 1):
            return ("set", *parts)
        if opener == "[" and closer == "]" and parts and all(p[0] == "tuple" and p[1] == "[" for p in parts):
            return ("matrix", *(p[3:] for p in parts))
        if len(parts) == 1 and (opener, closer) in (("(", ")"), ("{", "}")):
            return node
        if len(parts) == 1 and opener == "[" and node[0] not in ("list", "tuple", "n"):
            return node
        opener, closer = {"langle": "(", "]": "("}.get(opener, opener), {"rangle": ")", "[": ")"}.get(closer, closer)
        return ("tuple", opener, closer, *parts)

    def command(self, name: str) -> tuple:
        if name == "frac":
            top = self.argument()
            return ("/", top, self.argument())
        if name == "sqrt":
            index = self.bracket() if self.peek() == ("op", "[") else None
            radicand = self.argument(whole=True)
            if index is None:
                return ("f", "root", radicand, ("n", Fraction(2)))
            return ("f", "root", radicand, index[3] if index[0] == "tuple" else index)
        if name == "binom":
            top = self.argument()
            return ("f", "binom", top, self.argument())
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("r" + name[1:])
            return ("f", name[1:].replace("ceil", "ceil"), node)
        if name in FUNCTIONS:
            return self.function(FOLD.get(name, name))
        if name == "infty":
            return ("inf",)
        if name == "emptyset":
            return ("set",)
        if name == "langle":
            self.pos -= 1
            return self.bracket()
        if name in WRAPPERS:
            node = self.argument(whole=True)
            if node == ("s", "R") and name == "mathbb":
                return ("tuple", "(", ")", ("-", ("inf",)), ("inf",))
            return node
        if name in GREEK or name in ("pi", "ldots", "top", "perp"):
            return self.symbol(name) if name in GREEK else ("s", name)
        raise Unreadable(f"unknown command {name}")

    def function(self, name: str) -> tuple:
        """`\\sin^2 3x`, `\\log_2 8`, `sin(x)`: a bare argument runs to the next sign, operator or function."""
        power = base = None
        while op := self.take("^", "_"):
            if op == "^":
                minus = self.take("-")
                power = self.argument(whole=True)
                power = ("-", power) if minus else power
            else:
                base = self.argument(whole=True)
        if self.peek() in (("op", "("), ("op", "{"), ("op", "|")):
            node = self.factor() if self.peek()[1] != "(" else self.bracket()
        else:
            node = self.factor()
            while self.starts_factor(*self.peek()) and self.peek()[1] not in FUNCTIONS and self.peek() != ("op", "("):
                node = product(node, self.factor())
        args = node[3:] if node[0] == "tuple" else node[1:] if node[0] == "list" else (node,)
        if name == "cbrt":
            return ("f", "root", node, ("n", Fraction(3)))
        if name == "log" and base:
            return ("/", ("f", "ln", node), ("f", "ln", base))
        if power == ("-", ("n", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("f", "a" + name, node)
        return ("^", ("f", name, *args), power) if power else ("f", name, *args)

    def environment(self, name: str) -> tuple:
        """Matrices by rows; cases, aligned and the like as a list."""
        if name == "array" and self.take("{"):
            while not self.take("}"):
                if self.peek()[0] == "end":
                    raise Unreadable("unfinished array")
                self.pos += 1
        rows, row, cell = [], [], []
        while not (self.peek() == ("cmd", "end") or self.peek()[0] == "end"):
            if self.take("&"):
                row, cell = row + cell, []
            elif self.take(";"):
                rows, row, cell = [*rows, row + cell], [], []
            elif not self.take(","):
                cell = cell + [self.item()]
            if len(rows) + len(row) + len(cell) > MAX_ITEMS:
                raise Unreadable("too many items")
        rows = [r for r in [*rows, row + cell] if r]
        self.need("end")
        self.need("{")
        self.pos += 1
        while not self.take("}"):
            if self.peek()[0] == "end":
                raise Unreadable("unfinished environment")
            self.pos += 1
        if "matrix" in name or (name == "array" and any(len(r) > 1 for r in rows)):
            if len({len(r) for r in rows}) > 1:
                raise Unreadable("ragged matrix")
            return ("matrix", *map(tuple, rows)) if name != "vmatrix" else ("f", "?det", ("matrix", *map(tuple, rows)))
        flat = [x for r in rows for x in r]
        return flat[0] if len(flat) == 1 else ("list", *flat)


def product(a: tuple, b: tuple) -> tuple:
    """a times b; a scalar goes into a vector or matrix."""
    if b[0] == "tuple":
        return (*b[:3], *(product(a, x) for x in b[3:]))
    if b[0] == "matrix":
        return ("matrix", *(tuple(product(a, x) for x in row) for row in b[1:]))
    return ("*", a, b)


def text_node(text: str) -> tuple:
    words = [w for w in re.findall(r"[^\W_]+|[^\w\s.,'\"!?]", text.lower()) if w not in ARTICLES]
    joined = " ".join(words)
    if joined in ("no solution", "no solutions", "no real solutions", "no real solution", "empty set", "none"):
        return ("set",)
    if joined in ("all real numbers", "all reals", "all real x"):
        return ("tuple", "(", ")", ("-", ("inf",)), ("inf",))
    return ("text", joined)


CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d\d))?(?:\s*:\s*(\d\d))?\s*([ap]\.?\s?m\b\.?)?", re.I)


def clock(text: str) -> tuple | None:
    """`4:30 p.m.`, `05:00`, `9 am`."""
    m = CLOCK.fullmatch(re.sub(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}", r"\1", text).strip())
    if not m or not (m[2] or m[4]):
        return None
    seconds = int(m[1]) * 3600 + int(m[2] or 0) * 60 + int(m[3] or 0)
    return ("time", seconds, m[4][0].lower() if m[4] else "")


def parse(text: str, merge: bool = True) -> tuple:
    """The tree of a written answer. Text outside the grammar becomes ("raw", the text without its spaces)."""
    text = text[: MAX_CHARS + 1]
    cleaned = clean(text)
    if len(text) > MAX_CHARS or len(cleaned) > MAX_CHARS:
        return ("raw", text)
    if (time := clock(cleaned)) is not None:
        return time
    try:
        return Parser(tokenize(cleaned, merge=merge)).answer()
    except (Unreadable, IndexError, ZeroDivisionError):
        return ("raw", re.sub(r"\s+|\\text|[{}]", "", cleaned))


# ---------------------------------------------------------------- values

Pair = tuple[Decimal, Decimal]  # the real and imaginary part of what is not rational


class Evaluator:
    """The value of a tree at one point: a Fraction where it is rational, else a pair of decimals.

    `span` is the largest decimal exponent met, in size: it tells how much precision a comparison needs.
    degree and percent are what those signs multiply by; trigonometric arguments always count degrees as pi/180.
    """

    def __init__(self, point: dict, degree: bool, percent: bool, log10: bool):
        self.point, self.degree, self.percent, self.log10 = point, degree, percent, log10
        self.span, self.steps, self.pi_value = 0, 3000, None

    def note(self, value):
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits > MAX_BITS:
                raise Unreadable("too large")
            self.span = max(self.span, bits * 3 // 10)
        else:
            for part in value:
                if part:
                    self.span = max(self.span, abs(part.adjusted()))
        return value

    def __call__(self, node: tuple):
        self.steps -= 1
        if self.steps < 0:
            raise Unreadable("too much work")
        kind = node[0]
        if kind == "n":
            return self.note(node[1])
        if kind == "s":
            return self.constant(node[1])
        if kind == "+":
            return self.note(add(self(node[1]), self(node[2])))
        if kind == "-":
            return mul(Fraction(-1), self(node[1]))
        if kind == "*":
            return self.note(mul(self(node[1]), self(node[2])))
        if kind == "/":
            return self.note(mul(self(node[1]), inverse(self(node[2]))))
        if kind == "^":
            return self.note(self.power(self(node[1]), self(node[2])))
        if kind == "!":
            n = self(node[1])
            return self.note(Fraction(math.factorial(small(n, MAX_FACTORIAL))))
        if kind == "%":
            return mul(self(node[1]), Fraction(1, 100) if self.percent else Fraction(1))
        if kind == "deg":
            return mul(self(node[1]), div_pi(self.pi(), 180) if self.degree else Fraction(1))
        if kind == "f":
            return self.note(self.function(node[1], node[2:]))
        raise Unreadable(f"no value for {kind}")

    def pi(self) -> Pair:
        if self.pi_value is None:
            self.pi_value = (pi_decimal(), Decimal(0))
        return self.pi_value

    def constant(self, name: str):
        if name == "pi":
            return self.pi()
        if name == "e":
            return (Decimal(1).exp(), Decimal(0))
        if name == "i":
            return (Decimal(0), Decimal(1))
        if name not in self.point:
            raise Unreadable(f"no value for {name}")
        return self.point[name]

    def power(self, base, exponent):
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction):
                if exponent.denominator == 1:
                    n = exponent.numerator
                    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                    if (bits > 1 or base.denominator > 1) and bits * abs(n) > MAX_BITS:
                        raise Unreadable("too large")
                    if abs(n) > 10 * MAX_BITS:
                        n = n % 2
                    return base**n
                return self.root(base ** small(Fraction(exponent.numerator), MAX_BITS, base), exponent.denominator)
            if exponent.denominator == 1 and abs(exponent) <= 400:
                out, n = (Decimal(1), Decimal(0)), abs(exponent.numerator)
                for bit in bin(n)[2:]:
                    out = mul(out, out)
                    out = mul(out, base) if bit == "1" else out
                return inverse(out) if exponent < 0 else out
        if not any(pair(base)):
            raise ZeroDivisionError
        self.steps -= 20
        return exp(mul(exponent, log(base, self.pi())), self.pi())

    def root(self, value, n):
        """The n-th root: rational where it is, the real one of a negative number for odd n, else the principal one."""
        n = small(n, 1000) if isinstance(n, Fraction) else n
        if n == 0:
            raise ZeroDivisionError
        self.steps -= 10
        if isinstance(value, Fraction):
            if value < 0 and n % 2:
                return mul(Fraction(-1), self.root(-value, n))
            if value < 0 and n == 2:
                return mul(self.root(-value, n), (Decimal(0), Decimal(1)))
            top, low = int_root(abs(value.numerator), n), int_root(value.denominator, n)
            if value >= 0 and top is not None and low is not None:
                return Fraction(top, low)
        re_, im = pair(value)
        if im == 0 and re_ >= 0:
            return (re_.sqrt() if n == 2 else re_ ** (1 / Decimal(n)) if re_ else re_, Decimal(0))
        if im == 0 and n % 2:
            return (-((-re_) ** (1 / Decimal(n))), Decimal(0))
        return exp(mul(Fraction(1, n), log(value, self.pi())), self.pi())

    def function(self, name: str, args: tuple):
        self.steps -= 40
        if name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            degree, self.degree = self.degree, True
            x = self(args[0])
            self.degree = degree
            return trig(name, x, self.pi())
        values = [self(a) for a in args]
        x = values[0]
        if name in ("root", "sqrt"):
            return self.root(x, values[1] if len(values) > 1 else Fraction(2))
        if name in ("ln", "log", "log10"):
            value = log(x, self.pi())
            return mul(value, inverse(log(Fraction(10), self.pi()))) if name == "log10" or (name == "log" and self.log10) else value
        if name == "exp":
            return exp(x, self.pi())
        if name == "abs":
            re_, im = pair(x)
            return abs(x) if isinstance(x, Fraction) else (abs(re_) if not im else (re_ * re_ + im * im).sqrt(), Decimal(0))
        if name in ("asin", "acos", "atan"):
            return (inverse_trig(name, real(x), self.pi()[0]), Decimal(0))
        if name in ("sinh", "cosh", "tanh"):
            up, down = exp(x, self.pi()), exp(mul(Fraction(-1), x), self.pi())
            sinh, cosh = mul(Fraction(1, 2), add(up, mul(Fraction(-1), down))), mul(Fraction(1, 2), add(up, down))
            return {"sinh": sinh, "cosh": cosh}.get(name) or mul(sinh, inverse(cosh))
        if name in ("floor", "ceil"):
            return Fraction(math.floor(real(x)) if name == "floor" else math.ceil(real(x)))
        if name in ("max", "min"):
            return (max if name == "max" else min)(values, key=real)
        if name in ("gcd", "lcm"):
            return Fraction(getattr(math, name)(*(int(v) for v in values if isinstance(v, Fraction) and v.denominator == 1)))
        if name == "binom":
            return Fraction(math.comb(small(values[0], MAX_FACTORIAL), small(values[1], MAX_FACTORIAL)))
        seed = name + "".join(str(v) if isinstance(v, Fraction) else "".join(f"{p:.25e}" for p in v) for v in values)
        return Fraction(zlib.crc32(seed.encode()) + 1, 65537)  # an unknown function: any fixed value for each argument


def pair(x) -> Pair:
    return (Decimal(x.numerator) / Decimal(x.denominator), Decimal(0)) if isinstance(x, Fraction) else x


def real(x):
    if not isinstance(x, Fraction) and x[1]:
        raise Unreadable("not real")
    return x if isinstance(x, Fraction) else x[0]


def small(x, limit: int, base: Fraction | None = None) -> int:
    """x as an integer of size at most limit; with a base, such that base**x stays within the same number of bits."""
    bits = 1 if base is None else max(base.numerator.bit_length(), base.denominator.bit_length())
    if not isinstance(x, Fraction) or x.denominator != 1 or abs(x) * bits > limit or (base is None and x < 0):
        raise Unreadable("too large")
    return int(x)


def int_root(value: int, n: int) -> int | None:
    """The exact n-th root of a natural number, or None."""
    if value < 2:
        return value
    if n == 2:
        r = math.isqrt(value)
    else:
        r = round(math.exp(math.log(value) / n)) if value.bit_length() < 900 else 0
    return r if r**n == value else None


def add(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    (ar, ai), (br, bi) = pair(a), pair(b)
    return (ar + br, ai + bi)


def mul(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    if a == 0 or b == 0:
        return Fraction(0)
    (ar, ai), (br, bi) = pair(a), pair(b)
    return (ar * br - ai * bi, ar * bi + ai * br) if ai or bi else (ar * br, ai)


def inverse(a):
    if isinstance(a, Fraction):
        return 1 / a
    size = a[0] * a[0] + a[1] * a[1]
    return (a[0] / size, -a[1] / size)


def div_pi(pi: Pair, n: int) -> Pair:
    return (pi[0] / n, pi[1])


def pi_decimal() -> Decimal:
    """pi by Machin's formula, 16 arctan(1/5) - 4 arctan(1/239), at the precision of the context."""
    from decimal import getcontext
    one = 10 ** (getcontext().prec + 5)

    def arctan_inverse(n: int) -> int:
        power = total = one // n
        k = 1
        while power:
            power = -power // (n * n)
            k += 2
            total += power // k
            if abs(power) <= 1:
                break
        return total

    return Decimal(4 * (4 * arctan_inverse(5) - arctan_inverse(239))) / one


def sin_cos(x: Decimal, pi: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series after reduction to [-pi, pi] and eight halvings."""
    if abs(x) > 10**20:
        raise Unreadable("too large")
    x = (x - 2 * pi * (x / (2 * pi)).to_integral_value()) / 256
    term, sin, cos, k = Decimal(1), Decimal(0), Decimal(1), 0
    while True:
        k += 1
        term = term * x / k
        if k % 2:
            sin += term if k % 4 == 1 else -term
        else:
            cos += term if k % 4 == 0 else -term
        if not term or term.adjusted() < -(len(pi.as_tuple().digits) + 8):
            break
    for _ in range(8):
        sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
    return sin, cos


def trig(name: str, x, pi: Pair):
    if not isinstance(x, Fraction) and x[1]:
        raise Unreadable("trigonometric function of a complex number")
    if x == 0:
        sin, cos = Decimal(0), Decimal(1)
    else:
        sin, cos = sin_cos(pair(x)[0], pi[0])
    tiny = Decimal(10) ** -(len(pi[0].as_tuple().digits) - 15)
    top, low = {"sin": (sin, 1), "cos": (cos, 1), "tan": (sin, cos), "cot": (cos, sin), "sec": (1, cos), "csc": (1, sin)}[name]
    if abs(low) < tiny:
        raise ZeroDivisionError
    return (Decimal(top) / low, Decimal(0))


def atan(x: Decimal) -> Decimal:
    for _ in range(6):
        x = x / (1 + (1 + x * x).sqrt())
    square, power, total, k = x * x, x, x, 1
    while power and power.adjusted() > total.adjusted() - 1 - len(str(total).replace(".", "")):
        power, k = -power * square, k + 2
        total += power / k
        if k > 20_000:
            raise Unreadable("too much work")
    return total * 64


def inverse_trig(name: str, x, pi: Decimal) -> Decimal:
    x = pair(x)[0] if isinstance(x, Fraction) else x
    if name == "atan":
        return atan(x)
    if abs(x) > 1:
        raise Unreadable("outside the domain")
    asin = atan(x / (1 - x * x).sqrt()) if abs(x) < 1 else x * pi / 2
    return asin if name == "asin" else pi / 2 - asin


def exp(x, pi: Pair):
    re_, im = pair(x)
    if not im:
        return (re_.exp(), im)
    sin, cos = sin_cos(im, pi[0])
    return (re_.exp() * cos, re_.exp() * sin)


def log(x, pi: Pair):
    re_, im = pair(x)
    if not im and re_ > 0:
        return (re_.ln(), im)
    size = re_ * re_ + im * im
    angle = pi[0] if not im else pi[0] / 2 if not re_ else atan(abs(im) / abs(re_))
    if im and re_ < 0:
        angle = pi[0] - angle
    return (size.ln() / 2, -angle if im < 0 else angle)


# ---------------------------------------------------------------- comparison of expressions

UNDEFINED = (ZeroDivisionError, DecimalException, OverflowError, ValueError)


def children(node: tuple) -> tuple:
    """The nodes directly below a node."""
    kind = node[0]
    if kind == "matrix":
        return sum(node[1:], ())
    first, last = {"n": (0, 0), "s": (0, 0), "text": (0, 0), "raw": (0, 0), "time": (0, 0), "inf": (0, 0), "f": (2, None), "tuple": (3, None),
                   "unit": (1, 2), "choice": (2, None)}.get(kind, (1, None))
    return node[1] if kind == "rel" else node[first:last]


def names(node: tuple) -> set:
    """The variables, functions ("f:sin") and the signs % and deg of a tree."""
    if node[0] == "s":
        return set() if node[1] in ("pi", "e", "i") else {node[1]}
    own = {node[0]} if node[0] in ("%", "deg") else {"f:" + node[1]} if node[0] == "f" else set()
    return own.union(*map(names, children(node)))


def zero_at(a: tuple, b: tuple, point: dict, modes: tuple) -> bool | None:
    """Is a - b zero at this point? None where it is undefined. First at 60 digits; where the sizes met leave that
    undecided, at a precision above twice their span, so that 10**100 + sqrt(2) is not 10**100 + sqrt(3)."""
    digits, limit = 60, None
    while True:
        with localcontext(Context(prec=digits, Emax=10**9, Emin=-(10**9), traps=[InvalidOperation, DivisionByZero, Overflow])):
            value = Evaluator(point, *modes)
            try:
                x, y = value(a), value(b)
                if isinstance(x, Fraction) and isinstance(y, Fraction):
                    return x == y
                gap = max(map(abs, add(x, mul(Fraction(-1), y)))) if x != y else Decimal(0)
            except UNDEFINED:
                return None
        span = value.span if limit is None else limit
        if gap and gap.adjusted() > span - digits + 15:
            return False
        if limit is not None or span <= 4:
            return not gap or gap.adjusted() <= -(span + 35)
        if span > MAX_DIGITS:
            raise Unreadable("too large")
        limit, digits = span, 60 + 2 * span


def equal_values(a: tuple, b: tuple) -> bool:
    """Equality of two expressions: as written, as rationals, or at random points, positive where roots or logarithms
    of letters occur."""
    if a == b:
        return True
    if a[0] == b[0] == "n":
        return a[1] == b[1]
    try:
        in_a, in_b = names(a), names(b)
        found = in_a | in_b
        letters = sorted(n for n in found if not n.startswith(("f:", "%", "deg")))
        modes = [(False, False, False)]
        if ("deg" in in_a) != ("deg" in in_b):
            modes.append((True, False, False))
        if ("%" in in_a) != ("%" in in_b):
            modes.append((False, True, False))
        if "f:log" in found:
            modes.append((False, False, True))
        return any(agree(a, b, letters, found, mode) for mode in modes)
    except (Unreadable, RecursionError, *UNDEFINED):
        return False


def agree(a: tuple, b: tuple, letters: list, found: set, modes: tuple) -> bool:
    if not letters:
        return bool(zero_at(a, b, {}, modes))
    rng = random.Random(repr((a, b)) if repr(a) < repr(b) else repr((b, a)))
    agreed = 0
    for attempt in range(6):
        point = {n: Fraction(rng.randint(1, 9999), rng.randint(2, 99)) for n in letters}
        if attempt and not found & {"f:root", "f:ln", "f:log", "f:log10"}:
            point = {n: -v if attempt == 1 or rng.random() < 0.5 else v for n, v in point.items()}
        verdict = zero_at(a, b, point, modes)
        if verdict is False:
            return False
        agreed += verdict is True
        if agreed == 3:
            return True
    return False


# ---------------------------------------------------------------- comparison of answers


def same(a: tuple, b: tuple) -> bool:
    """Do two parsed answers have the same value? Symmetric."""
    if a == b:
        return True
    a, b = plain(a), plain(b)
    kinds = {a[0], b[0]}
    if a == b:
        return True
    if "raw" in kinds:
        return False
    if "choice" in kinds:
        return same_choice(a, b)
    if "unit" in kinds:
        return same_units(a, b)
    if "time" in kinds:
        return same_time(a, b)
    if "text" in kinds:
        return words_of(a) == words_of(b) != ""
    if kinds & {"union", "minus", "cap", "rel", "tuple"} or has_inequality(a) or has_inequality(b):
        verdict = same_regions(a, b)
        if verdict is not None:
            return verdict
    if "rel" in kinds:
        return same_relations(a, b)
    if kinds & {"list", "set", "tuple", "matrix"}:
        return same_collections(a, b)
    if "ratio" in kinds:
        a, b = (("/", x[1], x[2]) if x[0] == "ratio" and len(x) == 3 else x for x in (a, b))
        if a[0] == b[0] == "ratio":
            return len(a) == len(b) and all(same(("/", x, a[1]), ("/", y, b[1])) for x, y in zip(a[2:], b[2:]))
    if "inf" in (a[0], b[0]):
        return False
    return equal_values(a, b)


def plain(node: tuple) -> tuple:
    """What an answer stands for: the result of a chain, the two values of ±, the only member of a list."""
    if node[0] == "rel":
        node = plain_relation(node)
    if node[0] not in ("list", "set", "tuple", "matrix", "rel", "raw") and has(node, "±"):
        return ("list", signed(node, 1), signed(node, -1))
    if node[0] in ("list", "set"):
        items = []
        for item in node[1:]:
            item = plain(item)
            items += item[1:] if item[0] == "list" else [item]
        assigned = [assignment(i) for i in items]
        if len(items) > 1 and all(assigned) and len({n for n, _ in assigned}) == 1:
            items = [v for _, v in assigned]
        node = (node[0], *items)
    if node[0] == "list" and len(node) == 3 and node[1] != node[2] and same(node[1], node[2]):
        return node[2]
    if node[0] in ("list", "set") and len(node) == 2 or node[0] == "tuple" and len(node) == 4 and node[1] != "(":
        return plain(node[-1])
    return node


def plain_relation(node: tuple) -> tuple:
    """`x in S` is S, `a = b = c` its consistent result, `2/3 ~ 0.67` the exact side, `... => x = 1` the last step."""
    nodes, ops = list(node[1]), list(node[2])
    while "=>" in ops:
        at = ops.index("=>")
        nodes, ops = nodes[at + 1 :], ops[at + 1 :]
    if "~" in ops:
        at = ops.index("~")
        keep = at + 1 if at or names(nodes[0]) == set() else 2
        nodes, ops = nodes[:keep], ["=" if o == "~" else o for o in ops[: keep - 1]]
    if ops == ["in"]:
        return plain(nodes[1])
    if not ops:
        return plain(nodes[0])
    if len(ops) > 1 and set(ops) == {"="}:
        start = 1 if letters_of(nodes[0]) or nodes[0][0] == "tuple" else 0
        rest = nodes[start:]
        if all(equal_or_rounded(rest[0], n) for n in rest[1:]):
            value = rest[-1] if all(same(rest[0], n) for n in rest[1:]) else rest[0]
            return ("rel", (nodes[0], value), ("=",)) if start else plain(value)
    elif ops == ["="] and not letters_of(nodes[0]) and not letters_of(nodes[1]) and nodes[0][0] not in ("tuple", "text"):
        if equal_or_rounded(nodes[0], nodes[1]):
            return plain(nodes[1] if same(nodes[0], nodes[1]) else nodes[0])
    return ("rel", tuple(nodes), tuple(ops))


def equal_or_rounded(exact: tuple, other: tuple) -> bool:
    """Equal, or the second a decimal to which the first rounds."""
    if same(exact, other):
        return True
    exact, other = (n[1] if n[0] == "unit" else n for n in (exact, other))
    try:
        with localcontext(Context(prec=40)):
            x, y = (pair(Evaluator({}, False, False, False)(n))[0] for n in (exact, other))
        places = -y.normalize().as_tuple().exponent
        return 0 < places < 20 and abs(x - y) <= Decimal(10) ** -places
    except (Unreadable, *UNDEFINED):
        return False


def letters_of(node: tuple) -> set:
    return {n for n in names(node) if not n.startswith(("%", "deg")) and (not n.startswith("f:") or n.startswith("f:?"))}


def has(node: tuple, kind: str) -> bool:
    return node[0] == kind or any(has(c, kind) for c in children(node))


def signed(node: tuple, sign: int) -> tuple:
    """The tree with ± read as + or as -."""
    if node[0] == "±":
        return signed(node[1], sign) if sign > 0 else ("-", signed(node[1], sign))
    below = children(node)
    at = {"f": 2, "tuple": 3, "choice": 2}.get(node[0], 1)
    return (*node[:at], *(signed(c, sign) for c in below), *node[at + len(below) :]) if below else node


def has_inequality(node: tuple) -> bool:
    return node[0] == "list" and len(node) > 1 and all(n[0] == "rel" and n[2] != ("=",) for n in node[1:])


def words_of(node: tuple) -> str:
    return node[1].lower() if node[0] in ("text", "s") else ""


def same_choice(a: tuple, b: tuple) -> bool:
    if a[0] == b[0]:
        return a[1] == b[1]
    if b[0] == "choice":
        a, b = b, a
    return b == ("s", a[1]) or same(a[2], b)


def same_units(a: tuple, b: tuple) -> bool:
    if a[0] == b[0] and a[2] and b[2]:
        if a[2][0] != b[2][0]:
            return False
        return same(*(("*", ("n", x[2][1]), x[1]) if x[2][1] != 1 else x[1] for x in (a, b)))
    return same(*(x[1] if x[0] == "unit" else x for x in (a, b)))


def same_time(a: tuple, b: tuple) -> bool:
    if a[0] != b[0]:
        a, b = (a, b) if a[0] == "time" else (b, a)
        return bool(a[2]) and a[1] % 3600 == 0 and b == ("n", Fraction(a[1] // 3600))
    if a[2] and b[2] and a[2] != b[2]:
        return False
    return a[1] == b[1] or ("p" in (a[2], b[2]) and not (a[2] and b[2]) and abs(a[1] - b[1]) == 43200)


# regions of the real line: intervals, unions, inequalities


def same_regions(a: tuple, b: tuple) -> bool | None:
    """Equality of two sets of intervals; None where one of them is not such a set or both are plain tuples."""
    if all(x[0] in ("tuple", "list", "set") and not has_inequality(x) and (x[0] != "tuple" or (x[1], x[2]) == ("(", ")"))
           for x in (a, b)):
        return None
    try:
        (name_a, ra), (name_b, rb) = region(a), region(b)
        if name_a and name_b and name_a != name_b:
            return False
        ra, rb = merged(ra), merged(rb)
    except Unreadable:
        return None
    return len(ra) == len(rb) and all(
        x[1] == y[1] and x[3] == y[3] and same_end(x[0], y[0]) and same_end(x[2], y[2]) for x, y in zip(ra, rb))


def same_end(x: tuple, y: tuple) -> bool:
    return x == y or (not {place(x), place(y)} & {math.inf, -math.inf} and same(x, y))


def place(node: tuple) -> float | None:
    """Where an end lies on the line; None if it has letters."""
    if node in (("inf",), ("-", ("inf",))):
        return math.inf if node == ("inf",) else -math.inf
    try:
        with localcontext(Context(prec=30)):
            return float(real(pair(Evaluator({}, False, False, False)(node[1] if node[0] == "unit" else node))))
    except (Unreadable, *UNDEFINED):
        return None


LINE = [(("-", ("inf",)), False, ("inf",), False)]


def region(node: tuple) -> tuple[tuple | None, list]:
    """(subject or None, list of (low, closed, high, closed)) of an interval, union, inequality or finite set."""
    node = plain(node)
    kind = node[0]
    if kind == "tuple" and len(node) == 5:
        return None, [(node[3], node[1] == "[" and node[3][-1] != ("inf",), node[4], node[2] == "]" and node[4] != ("inf",))]
    if kind == "union":
        (name, left), (other, right) = region(node[1]), region(node[2])
        return name or other, left + right
    if kind == "set":
        return None, [(x, True, x, True) for x in node[1:]]
    if kind == "minus":
        name, whole = region(node[1])
        for point in region(node[2])[1]:
            if point[0] != point[2]:
                raise Unreadable("difference of intervals")
            whole = without(whole, point[0])
        return name, whole
    if kind == "rel":
        return inequality(node)
    if has_inequality(node):
        parts = [region(n) for n in node[1:]]
        if len({name for name, _ in parts}) > 1:
            raise Unreadable("several subjects")
        pieces = [p for _, r in parts for p in r]
        if len(pieces) == 2 and all(n[2] != ("!=",) for n in node[1:]) and len(merged(pieces)) == 1:
            (lo1, c1, hi1, d1), (lo2, c2, hi2, d2) = sorted(pieces, key=lambda p: place(p[0]) or 0.0)
            return parts[0][0], [(lo2, c2, hi1, d1)]
        for n in node[1:]:
            if n[2] == ("!=",):
                keep = [p for m, (_, r) in zip(node[1:], parts) if m[2] != ("!=",) for p in r] or LINE
                for m in node[1:]:
                    keep = without(keep, m[1][1]) if m[2] == ("!=",) else keep
                return parts[0][0], keep
        return parts[0][0], pieces
    if letters_of(node) or kind in ("list", "tuple", "matrix", "text", "ratio", "f"):
        raise Unreadable("not a region")
    return None, [(node, True, node, True)]


def inequality(node: tuple) -> tuple[tuple, list]:
    nodes, ops = list(node[1]), list(node[2])
    if ops[0] in (">", ">="):
        nodes, ops = nodes[::-1], [{">": "<", ">=": "<=", "<": ">", "<=": ">="}.get(o, o) for o in reversed(ops)]
    if ops == ["!="]:
        return nodes[0], without(LINE, nodes[1])
    if any(o not in ("<", "<=") for o in ops) or len(nodes) > 3:
        raise Unreadable("not an interval")
    if len(nodes) == 2:
        if letters_of(nodes[0]) and not letters_of(nodes[1]) and nodes[0][0] in "sf":
            return nodes[0], [(("-", ("inf",)), False, nodes[1], ops[0] == "<=")]
        if letters_of(nodes[1]) and not letters_of(nodes[0]) and nodes[1][0] in "sf":
            return nodes[1], [(nodes[0], ops[0] == "<=", ("inf",), False)]
        raise Unreadable("not an interval")
    if nodes[1][0] not in "sf":
        raise Unreadable("not an interval")
    return nodes[1], [(nodes[0], ops[0] == "<=" and place(nodes[0]) != -math.inf, nodes[2], ops[1] == "<=" and place(nodes[2]) != math.inf)]


def without(pieces: list, point: tuple) -> list:
    out, at = [], place(point)
    if at is None:
        raise Unreadable("a point with letters")
    for low, a, high, b in pieces:
        lo, hi = place(low), place(high)
        if lo is None or hi is None:
            raise Unreadable("an end with letters")
        if lo < at < hi:
            out += [(low, a, point, False), (point, False, high, b)]
        elif not lo == at == hi:
            out.append((low, a and at != lo, high, b and at != hi))
    return out


def merged(pieces: list) -> list:
    """Sorted, overlapping and touching intervals joined. Ends with letters are left as they are written."""
    ends = [(place(p[0]), place(p[2])) for p in pieces]
    if any(lo is None or hi is None for lo, hi in ends):
        return pieces
    out: list = []
    for (lo, hi), (low, a, high, b) in sorted(zip(ends, pieces), key=lambda e: (e[0][0], not e[1][1])):
        if lo > hi or (lo == hi and not (a and b)):
            raise Unreadable("empty interval")
        if out:
            low0, a0, high0, b0 = out[-1]
            reach = place(high0)
            if lo < reach or (lo == reach and (a or b0)):
                if hi > reach or (hi == reach and b):
                    out[-1] = (low0, a0, high, b)
                continue
        out.append((low, a, high, b))
    return out


# equations and other relations


def assignment(node: tuple) -> tuple | None:
    """(name, value) of `x = 5`, `5 = x`, `f(x) = x + 1`; the name without its subscript."""
    if node[0] != "rel" or node[2] != ("=",):
        return None
    left, right = node[1]
    if left[0] != "s" and right[0] == "s" and not letters_of(left):
        left, right = right, left
    if left[0] == "s" and left[1] not in letters_of(right):
        return left[1].partition("_")[0], right
    if left[0] == "f" and left[1][0] == "?":
        return left[1], right
    return None


def bindings(node: tuple) -> dict | None:
    """{name: value} of `x = 1, y = 2` or `(x, y) = (1, 2)`."""
    if node[0] == "rel" and node[2] == ("=",):
        left, right = node[1]
        if left[0] == right[0] == "tuple" and len(left) == len(right) and all(n[0] == "s" for n in left[3:]):
            return {n[1]: v for n, v in zip(left[3:], right[3:])}
    if node[0] in ("list", "set") and len(node) > 2:
        pairs = [assignment(n) for n in node[1:]]
        if all(pairs) and len({n for n, _ in pairs}) == len(pairs):
            return dict(pairs)
    return None


def same_relations(a: tuple, b: tuple) -> bool:
    one, two = assignment(a), assignment(b)
    if a[0] == b[0] == "rel":
        if one and two and (one[0] == two[0] or len(one[0]) > 1 or len(two[0]) > 1):
            return same(one[1], two[1])
        ba, bb = bindings(a), bindings(b)
        if ba and bb:
            return ba.keys() == bb.keys() and all(same(ba[n], bb[n]) for n in ba)
        return same_chain(a, b)
    if b[0] == "rel":
        a, b, one = b, a, two
    if one:
        return same(one[1], b)
    if bindings(a):
        return same(a[1][1], b) or same_collections(("list", *a[1][0][3:]), b) if b[0] != "list" else same_bindings(bindings(a), b)
    if a[2] == ("=",) and b[0] not in ("list", "set"):
        left, right = a[1]
        linear = left[0] == "*" and left[1][0] == "n" and left[2][0] == "s"
        label = letters_of(left) and not linear and right != ("n", Fraction(0))
        if label and (not letters_of(right) or left[0] in ("f", "/", "^", "*")):
            return same(right, b)
        if left[0] == "tuple":
            return same(right, b)
    return False


def same_chain(a: tuple, b: tuple) -> bool:
    """Equations up to a factor, inequalities up to a positive one, longer chains member by member in either direction."""
    flip = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    (na, oa), (nb, ob) = a[1:], b[1:]
    if len(na) != len(nb):
        return False
    if len(na) == 2:
        da, db = ("+", na[0], ("-", na[1])), ("+", nb[0], ("-", nb[1]))
        if oa == ob and oa[0] in ("=", "!="):
            return proportional(da, db)
        if oa[0] in flip:
            return (oa == ob and proportional(da, db, positive=True)) or (
                flip[oa[0]] == ob[0] and proportional(("-", da), db, positive=True))
        return False
    backwards = tuple(flip.get(o, o) for o in reversed(ob))
    return (oa == ob and all(map(same, na, nb))) or (oa == backwards and all(map(same, na, reversed(nb))))


def proportional(a: tuple, b: tuple, positive: bool = False) -> bool:
    """Is a = c b for one constant c? Tested as a(p) b(q) = a(q) b(p) at random points."""
    letters = sorted(letters_of(a) | letters_of(b))
    if not letters or letters_of(a) != letters_of(b):
        return False
    rng = random.Random(len(repr(a)) * len(repr(b)))
    try:
        with localcontext(Context(prec=60, traps=[InvalidOperation, DivisionByZero, Overflow])):
            for _ in range(3):
                p, q = ({n: Fraction(rng.randint(1, 9999), rng.randint(2, 99)) for n in letters} for _ in range(2))
                ap, aq, bp, bq = (Evaluator(at, False, False, False)(x) for x in (a, b) for at in (p, q))
                left, right = mul(ap, bq), mul(aq, bp)
                if isinstance(left, Fraction) and isinstance(right, Fraction):
                    if left != right or not left:
                        return False
                elif max(map(abs, add(left, mul(Fraction(-1), right)))) > Decimal(10) ** -35 * max(map(abs, pair(left))):
                    return False
                if positive and real(mul(ap, inverse(bp))) < 0:
                    return False
        return True
    except (Unreadable, RecursionError, *UNDEFINED):
        return False


# lists, sets, tuples, matrices


def same_collections(a: tuple, b: tuple) -> bool:
    ba, bb = bindings(a), bindings(b)
    if ba and bb:
        return ba.keys() == bb.keys() and all(same(ba[n], bb[n]) for n in ba)
    if ba or bb:
        return same_bindings(ba or bb, b if ba else a)
    kinds = {a[0], b[0]}
    if kinds == {"matrix"}:
        return len(a) == len(b) and all(len(x) == len(y) and all(map(same, x, y)) for x, y in zip(a[1:], b[1:]))
    if "matrix" in kinds:
        m, other = (a, b) if a[0] == "matrix" else (b, a)
        flat = m[1] if len(m) == 2 else [row[0] for row in m[1:]] if all(len(r) == 1 for r in m[1:]) else None
        return flat is not None and other[0] == "tuple" and len(flat) == len(other) - 3 and all(map(same, flat, other[3:]))
    if not kinds <= {"list", "set", "tuple"}:
        return False
    items_a, items_b = (x[3:] if x[0] == "tuple" else x[1:] for x in (a, b))
    if "tuple" in kinds:
        return "set" not in kinds and len(items_a) == len(items_b) and all(map(same, items_a, items_b))
    if any(has(x, "s") and ("s", "ldots") in x for x in (a, b)):
        return len(items_a) == len(items_b) and all(map(same, items_a, items_b))
    if "set" in kinds:
        items_a, items_b = distinct(items_a), distinct(items_b)
    if len(items_a) != len(items_b):
        return False
    left = list(items_b)
    rest = [x for x in items_a if not (x in left and (left.remove(x) or True))]
    if len(rest) > 16:
        return False
    for x in rest:
        at = next((i for i, y in enumerate(left) if same(x, y)), None)
        if at is None:
            return False
        left.pop(at)
    return True


def distinct(items: tuple) -> list:
    out: list = []
    for x in items:
        if x not in out and not (len(items) <= 12 and any(same(x, y) for y in out)):
            out.append(x)
    return out


def same_bindings(named: dict, other: tuple) -> bool:
    """`y = 2, x = 1` against (1, 2): the values in the alphabetical order of their names."""
    if other[0] not in ("tuple", "list"):
        return False
    values = other[3:] if other[0] == "tuple" else other[1:]
    return len(values) == len(named) and all(same(named[n], v) for n, v in zip(sorted(named), values))


def equal(a: str, b: str) -> bool:
    """Do two written answers have the same value? Symmetric, never raises."""
    if not a.strip() or not b.strip() or a.strip() == b.strip():
        return a.strip() == b.strip()
    try:
        x, y = parse(a), parse(b)
        if same(x, y):
            return True
        if "list" in (x[0], y[0]) and re.search(r"\d,\d{3}", a[:MAX_CHARS] + " " + b[:MAX_CHARS]):
            return same(parse(a, merge=x[0] == "list"), parse(b, merge=y[0] == "list"))
    except RecursionError:  # the caller's stack was nearly full: a verdict all the same
        pass
    return False
