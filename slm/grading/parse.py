r"""Read a written answer, LaTeX or plain text, into a small tree of tuples. Nothing is executed here.

`clean` gives one thing one spelling, `tokenize` cuts the text into tokens, `Parser` is a recursive descent
over them. `parse` does all three. A text outside the grammar or the bounds becomes ("raw", text), which
equals only itself.

Nodes: ("n", Fraction) ("s", name) ("+" "*" "/" "^", a, b) ("-" "!" "%" "deg" "±", a) ("f", name, *args)
("inf",) ("text", words) ("list" "set", *items) ("tuple", opener, closer, *items) ("matrix", *rows)
("rel", nodes, operators) ("union" "meet" "minus", a, b) ("ratio", *parts) ("unit", node, unit) ("choice",
letter, node) ("time", seconds, "a" | "p" | "", hours, minutes) ("raw", text). An unknown function f
is named "?f".
"""

import itertools
import operator
import re
import unicodedata
from fractions import Fraction

from slm.grading.boxes import closing_brace

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS, MAX_DIGITS = 2000, 500, 24, 60, 1500


class Unreadable(Exception):
    """The text is outside the grammar, or the value outside the bounds."""


Node = tuple
FIRST_CHILD = {"f": 2, "choice": 2, "tuple": 3}  # where the children start in a node; else at 1


def children(node: Node) -> Node:
    """The nodes directly below a node."""
    kind = node[0]
    if kind in ("n", "s", "text", "raw", "time", "inf"):
        return ()
    if kind == "matrix":
        return sum(node[1:], ())
    if kind in ("rel", "unit"):
        return node[1] if kind == "rel" else node[1:2]
    return node[FIRST_CHILD.get(kind, 1) :]


def leaves(node: Node) -> tuple[Node, ...]:
    below = children(node)
    return sum(map(leaves, below), ()) if below else (node,)


# ---- cleaning ----------------------------------------------------------------------------------------------

def table(text: str) -> dict[str, str]:
    """{first word: second, third: fourth, ...}"""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


SIGNS = {sign: latex + " " * latex[-1].isalpha() for sign, latex in table(r"""
    √ \sqrt ∛ \sqrt[3] π \pi ∞ \infty
    ≤ \le ≥ \ge ≠ \ne × \cdot · \cdot ⋅ \cdot ∙ \cdot ÷ / ∕ / ⁄ / − - – - — - ∪ \cup ∩ \cap ∈ \in ∅ \emptyset
    ° ^\circ º ^\circ ± \pm ∓ \mp ≈ \approx θ \theta α \alpha β \beta γ \gamma φ \phi λ \lambda ℝ \mathbb{R}
    ⟨ \langle ⟩ \rangle 〈 \langle 〉 \rangle → \to ′ ' ’ ' … \ldots ∠ \angle △ \triangle ∧ \land ∨ \lor
    ， , 。 . ％ %
    € \euro £ \pound ¥ \yen ¢ \text{~cents} ∖ \setminus ≡ =""").items()}
SIGNS |= {c: f"^{{{d}}}" for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")}
SIGNS |= {c: f"_{{{d}}}" for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
FRACTIONS = zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")
SIGNS |= {c: rf"\frac{{{top}}}{{{low}}}" for c, top, low in FRACTIONS}
SIGNS |= dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")

EUROPEAN = re.compile(r"^([^([,]*(?<![\d.]))([1-9]\d?\d?(?:\.\d{3})+|0(?=,\d{3}\D*$)),(?=\d+(?![\d.,]))")
THOUSANDS = re.compile(r"(?<=\d)(?:,\s?(?:\\!)+\s*|\s?\{,\s?\}\s*|\\[,!;: ]\s*|(?<!_\d)[ ~])(?=\d{3}(?!\d))")
REWRITES = [(re.compile(old), new) for old, new in (
    # the base of a numeral: \text{A5}_{11}, (12)_3, 12 (base 3)
    (r"\\text\s*\{\s*([0-9A-Z]+)\s*\}\s*_|\(([0-9A-Z.]+)\)_(?=[{\d])", r"\1\2_"),
    (r"\b([0-9][0-9A-Z]*)\s*\(?(?:\\text\{)?\s*\(?(?:in )?base[ -]?\}?\s*(\d+)\)?\}?\)?", r"\1_{\2}"),
    (r"\\left\s*\\\{\s*(?=\\begin)", ""),  # the brace before a system of equations
    (r"\^\{?\s*(?:\\(?:text|mathrm|textrm|rm)\s*\{?)?\s*(?:st|nd|rd|th)\}{0,2}(?![a-z])"  # 5th
     r"|(?<=\d)(?:(?:st|nd|rd|th)\b|\s*\\(?:text|mathrm|textrm)\s*\{\s*(?:st|nd|rd|th)\s*\})", ""),
    (r"\^\s*(\\circ|\\degree|\{\s*\\(?:circ|degree)\s*\})(?![a-z])", r"\\circ "),
    (r"\\not\s*=", r"\\ne "),
    (r"&\s*(?==|<|>|\\[lg]e)", ""),  # the alignment of a relation
    (r"\\frac\s*\{\\(?:text|mathrm)\{([^{}]*)\}\}\s*\{\\(?:text|mathrm)\{([^{}]*)\}(\^\d)?\}",
     r"\\text{\1/\2}\3"),
    (r"(?<=\d)\s*m/s\b", " mps"),
    (r"^\s*\\text(?:bf)?\s*\{\s*(?:[oO]ption|[cC]hoice)\s+\(?([A-H])\)?\s*\}", r"\1"),
    (r"^\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?([A-H])[).:]{0,2}\s*\}?\s*$", r"\1"),
    (r"\\mathbf(?=\s*\{\s*\([A-H]\))", r"\\textbf"),
    (r"(?<=\d) ([mshgL])$", r"\\text{\1}"),
    (r"\\text\s*\{\s*\([a-z ]+\)\s*\}\s*$|(?<=\d)\s+\([a-z]{3,}\)$", ""),  # 5 \text{ (five)}
    (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\(\s*(?:\\bmod|\\mod|mod|\\text\{mod\}|\\mathrm\{mod\})([^()]*)\)", r"\\pmod{\1}"),  # 3 (mod 7)
    (r"\\mathbb\s*\{?R\}?\s*(?:[_^]\{?\+\}?|_\{\s*>\s*0\s*\})", r"(0,\\infty)"),
    (r"^\s*(?:(?i:option|choice|answer)\s+(?=\(?[A-H]\b)|[=:])|`", ""),
    (r"(?<=\d)\{,\}(?=\d)", "."),  # a decimal comma, thousands being joined by now
    (r"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|textstyle|limits|hfill|centering|bf|it|small|[lL]arge"
     r"|LARGE|therefore|checkmark|blacksquare|bigstar)(?![a-zA-Z])\.?|(?<!\\)\\[!,;:> ]|~|\\\$(?=\s*$)"
     r"|\\(?:q?quad|(?:hspace\*?|phantom|(?:text)?color(?:box)?)\{[^{}]*\})", " "),
    (r"\\\(|\\\)|\\\[|\\\]|^\s*(?:\*\*|\x22)|(?:\*\*|\x22)\s*$", " "))]


def clean(text: str) -> str:
    """One spelling for the many of one thing: unicode signs as LaTeX, no spacing, no sizing, no `$`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(SIGNS.get(c, c) for c in text))[: MAX_CHARS + 1]
        text = "".join(SIGNS.get(c, str(unicodedata.decimal(c, c))) for c in text).replace("}^{", "")
    if r"\\" in text and r"\begin" not in text:  # a response that escaped its backslashes
        text = re.sub(r"\\\\(?=[a-zA-Z!,;$%{}])", r"\\", text)
    text = EUROPEAN.sub(lambda m: m[1] + m[2].replace(".", "") + ".", text)  # 1.234,5 and 0,125
    while text != (text := THOUSANDS.sub("", text)):
        pass
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if text.count("$") - text.count(r"\$") != 1:  # one alone is a currency sign
        text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;: ")


# ---- units and number words --------------------------------------------------------------------------------

UNIT_TABLE = """length: m meter metre 1, cm centimeter centimetre 1/100, mm millimeter millimetre 1/1000,
 km kilometer kilometre 1000, in inch inche 127/5000, ft foot feet 381/1250, yd yard 1143/1250,
 mi mile 201168/125
mass: g gm gram gramme 1, kg kilogram kilo 1000, mg milligram 1/1000, lb pound 45359237/100000,
 oz ounce 45359237/1600000, ton 907184.74
time: s sec second 1, min minute 60, h hr hour 3600, day 86400, week 604800, month 2629746, yr year 31556952
money: dollar usd buck 1, cent 1/100
euro: euro eur 1
gbp: quid gbp 1
yen: yen 1
angle: degree deg 1
volume: L l liter litre 1, mL ml milliliter millilitre 1/1000, gallon gal 3.785411784
degree C: celsius 1
degree F: fahrenheit 1"""
UNITS: dict[str, tuple[str, Fraction]] = {}
for line in UNIT_TABLE.replace("\n ", " ").splitlines():
    dimension, _, entries = line.partition(":")
    for *spellings, size in map(str.split, entries.split(",")):
        UNITS |= dict.fromkeys(spellings, (dimension, Fraction(size)))
SHORT_UNITS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "mps": "m/s", "sqft": "ft^2"}
COINS = {"$": "money", "euro": "euro", "pound": "gbp", "yen": "yen"}
NUMBER_WORDS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty".split())}
SCALES = {word: Fraction(n) for word, n in table("""hundred 100 thousand 1000 million 1000000
    dozen 12 billion 1000000000 trillion 1000000000000 half 1/2 halves 1/2 quarters 1/4
    hundredths 1/100 thousandths 1/1000""").items()}
for n, word in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3):
    SCALES |= {word: Fraction(1, n), word + "s": Fraction(1, n)}
OPERATOR_WORDS = set("""not minus plus times over divided factorial root cubed than neither either
    between wrong incorrect false unless except possibly maybe perhaps""".split())


def known_unit(word: str) -> tuple[str, Fraction] | None:
    return UNITS.get(word) or UNITS.get(word.lower()) or UNITS.get(word.lower().removesuffix("s"))


def unit_of(words: list[str]) -> tuple | None:
    """(dimensions, factor to the base unit) of `square feet`, `km / h`, `cm ^ 2`; None if a word is unknown.
    An unknown unit (`eggs`) says nothing. Two known ones must agree in dimension and, scaled, in value."""
    words = re.findall(r"[a-zA-Z]+|-?\d+|[/^]", " ".join(SHORT_UNITS.get(w, w) for w in words))
    dims: dict[str, int] = {}
    factor, power, sign = Fraction(1), 1, 1
    for i, word in enumerate(words):
        if word in ("square", "sq", "cubic", "cu"):
            power = 2 if word[0] == "s" else 3
        elif word in ("/", "per"):
            sign = -1
        elif word not in ("^", "squared") and not word[-1].isdigit():
            if not (known := known_unit(word)):
                return None
            after = words[i + 1 : i + 3]
            if after[:1] == ["^"] or after[:1] == ["squared"]:
                power = int(after[1]) if after[-1][-1].isdigit() else 2
            power = sign * max(-9, min(power, 9))
            dims[known[0]] = dims.get(known[0], 0) + power
            factor, power = factor * known[1] ** power, 1
    return (tuple(sorted(dims.items())), factor) if dims else None


# ---- tokens ------------------------------------------------------------------------------------------------

FUNCTIONS = set("""sin cos tan cot sec csc arcsin arccos arctan asin acos atan ln log lg exp sqrt cbrt abs
    floor ceil sinh cosh tanh coth sech csch arccot arcsec arccsc cis gcd lcm max min""".split())
GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell
    hbar""".split())
TEXT = set("""text mbox textbf textit textrm mathrm textnormal operatorname hbox textup textsf mathsf texttt
    rm mathtt""".split())
WRAPPERS = set("""mathbf boldsymbol vec hat widehat overrightarrow mathit mathcal bm triangle angle overline
    bar boxed fbox framebox underline tilde mathbb measuredangle ensuremath""".split())
ALIAS = table(r"""cdot * times * ast * div / le <= leq <= leqslant <= ge >= geq >= geqslant >= lt < gt > ne !=
    neq != { \{ } \} lbrace \{ rbrace \} vert | lvert | rvert | mid | colon : lbrack [ rbrack ] lparen (
    rparen ) \ ; newline ; and , land , lor , wedge , vee , or , approx ~ thickapprox ~ simeq ~ doteq ~ dfrac
    frac tfrac frac cfrac frac varnothing emptyset dots ldots cdots ldots degree circ implies => Rightarrow =>
    to => rightarrow => Longrightarrow => iff => infinity infty inf infty infin infty oo infty textdollar $
    backslash setminus smallsetminus setminus prime ' dbinom binom tbinom binom equiv = == = ** ^ -> =>""")
SHORT_WORDS = set("no on up to is in am pm of by at as it so an if we".split())
TOKEN = re.compile(
    r"(?P<based>[0-9][0-9A-Z]*(?:\.[0-9A-Z]+)?_(?:\d{1,2}(?!\d)|\{\s*(?:\\\w+\{)?\s*\w{1,7}\s*\}?\s*\})"
    r"|[A-Z][0-9A-Z]*[0-9][0-9A-Z]*_\{\d\d\}|0(?:[xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)(?![0-9a-zA-Z]))"
    r"|(?P<repeat>\d*\.\d*\\(?:overline|bar|dot)\s*\{?\d+\}?)"
    r"|(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|\\begin\s*\{(?P<begin>[a-zA-Z]+)\*?\}(?:\s*\{[clr|\s]*\})?|(?P<close>\\end\s*\{[a-zA-Z]+\*?\})"
    r"|\\(?P<cmd>[a-zA-Z]+|.)|(?P<word>[a-zA-Z]+)|(?P<op><=|>=|!=|==|=>|->|\*\*|\S)")
UNIT = re.compile(r"\s*(?:\d[\d.]*\s+)?(?![ie]\s*$)(?:[a-zA-Z]{1,3}(?![a-zA-Z])[\s/^{}\d-]*)+")  # m, m s^{-2}
AFTER = [("op", ")")], [("op", "}")]  # where a unit may stand


def run_of_letters(run: str, after_number: bool) -> list[tuple[str, str]]:
    r"""Letters outside \text: a function, a constant, a name in capitals, a word, a product of variables."""
    commands = FUNCTIONS | GREEK | {"pi", "infinity", "inf", "oo", "infty", "cup", "pm"}
    if run in commands and not (after_number and run == "min"):
        return [("cmd", ALIAS.get(run, run))]
    if run.isupper() or len(run) == 1:
        return [("sym", run)]
    if len(run) == 2 and run not in SHORT_WORDS and not (after_number and known_unit(run)):
        return [("sym", c) for c in run]
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "sqrt", "pi"):
        if run.startswith(name) and len(run) == len(name) + 1:
            return [("cmd", name), ("sym", run[-1])]
    if len(run) <= 4 and (any(run in alphabet for alphabet in ("abcdef", "uvwxyz", "pqrst", "klmn"))
                          or any(set(run) <= set(some) for some in ("abc", "xyz", "pqr"))):
        return [("sym", c) for c in run]
    return [("word", run)]


def text_word(word: str, wordy: bool, unit: bool) -> tuple[str, str]:
    if word in FUNCTIONS and not unit:
        return ("cmd", word)
    return ("sym" if len(word) == 1 and not unit and (word.isupper() or not wordy) else "word", word)


def tokenize(text: str, prose: bool = False, merge: bool = True, unit: bool = False) -> list[tuple[str, str]]:
    r"""Tokens (kind, text) of a cleaned answer; prose: the inside of \text. Directly inside brackets, or with
    merge off, `1,000` is two numbers."""
    out: list[tuple[str, str]] = []
    brackets: list[str] = []
    wordy = bool(re.search("[a-zA-Z]{2}", text))
    pos = 0
    while m := TOKEN.search(text, pos):
        kind, tok, pos = m.lastgroup, m[m.lastgroup], m.end()
        if len(tok) > MAX_DIGITS or len(out) > MAX_TOKENS:
            raise Unreadable("too long")
        if kind == "num" and "," in tok and (not merge or (brackets and brackets[-1] != "{")):
            tok = tok.split(",")[0]
            pos = m.start() + len(tok)
        elif kind == "cmd" and tok in TEXT and text[pos:].lstrip().startswith("{"):
            start = text.index("{", pos)
            pos = closing_brace(text, start)
            if pos is None:
                raise Unreadable("unbalanced braces")
            inside = text[start + 1 : pos - 1]
            letter = tok == "mathrm" and len(inside.strip()) == 1  # \mathrm{e}, but 5 \mathrm{~m}
            measured = inside.strip()[:1].isdigit() or out[-1:] in AFTER or (out and out[-1][0] == "num")
            unit = bool(measured and UNIT.fullmatch(inside))
            out += tokenize(inside, prose=unit or not letter, merge=merge, unit=unit)
            continue
        elif kind == "word":
            if tok.lower() in ("or", "and"):
                out.append(("op", "," if tok.lower() == "and" else "or"))
            elif tok.lower() == "pi":
                out.append(("cmd", "pi"))
            elif prose and tok == "A" and re.match(r" (?!and|or|is)[a-z]", text[pos:]):
                out.append(("word", tok))  # A circle
            else:
                after_number = bool(out) and out[-1][0] == "num"
                out += [text_word(tok, wordy, unit)] if prose else run_of_letters(tok, after_number)
            continue
        elif kind in ("cmd", "op"):
            tok = ALIAS.get(tok, tok) if kind == "cmd" or len(tok) == 2 else tok
            kind = "cmd" if tok[0].isalpha() and kind == "cmd" else "op"
            if tok in ("(", "[", "{", r"\{"):
                brackets.append(tok)
            elif brackets and tok in (")", "]", "}", r"\}"):
                brackets.pop()
        out.append((kind, tok))
    return out


def decimal(text: str) -> Node:
    if len(text.lower().partition("e")[2]) > 4:
        raise Unreadable("number too long")
    return ("n", Fraction(text.replace(",", "").removesuffix(".")))


def based(text: str) -> Node:
    """`1101_2`, `2A_{11}`, `0.11_{two}`, `0x1F`: the value."""
    if "_" not in text:
        return ("n", Fraction(int(text, 0)))
    digits, _, base = text.partition("_")
    base = re.sub(r"\\\w+|[{} ]", "", base).lower()
    radix = NUMBER_WORDS.get(base) or (int(base) if base.isdigit() else 0)
    whole, _, part = digits.partition(".")
    if not 2 <= radix <= 36 or any(int(d, 36) >= radix for d in whole + part):
        raise Unreadable("not a numeral of that base")
    return ("n", Fraction(int(whole + part, radix), radix ** len(part)))


def repeating(text: str) -> Node:
    r"""`0.1\overline{6}` = 1/6."""
    head, tail = re.split(r"\\\w+\s*", text)
    tail = tail.strip("{}")
    whole, _, fixed = head.partition(".")
    start, period = int(whole + fixed or 0), int(whole + fixed + tail)
    return ("n", Fraction(period - start, 10 ** len(fixed) * (10 ** len(tail) - 1)))


# ---- parser ------------------------------------------------------------------------------------------------

ENDS = {"(": (")", "]"), "[": ("]", ")"), r"\{": (r"\}",), "{": ("}",), "]": ("[", "]"),
        "langle": ("rangle",)}
RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "~", "in", "=>")
NOT_FACTORS = set("cup cap bigcup setminus pm mp end rangle infty rfloor rceil circ bmod pmod mod".split())
NOT_FACTORS |= set(RELATIONS)
CHOICES = set("ABCDEFGH")
SET_OPERATIONS = {"cup": "union", "bigcup": "union", "cap": "meet", "setminus": "minus"}
FOLD = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "lg": "log10"}
RATIOS = {"tan": ("sin", "cos"), "cot": ("cos", "sin"), "sec": (None, "cos"), "csc": (None, "sin"),
          "tanh": ("sinh", "cosh"), "coth": ("cosh", "sinh"), "sech": (None, "cosh"), "csch": (None, "sinh")}
CO = {"arccot": "atan", "arcsec": "acos", "arccsc": "asin"}  # of the inverse
ONE, EITHER, LINE = ("n", Fraction(1)), ("text", "or"), ("tuple", "(", ")", ("-", ("inf",)), ("inf",))


class Parser:
    """Recursive descent: each method reads one level of the grammar and returns a node.

    bars: how many | are open, or True if a | or : would start the condition of a set. money: the currency of
    the measure that is being read. bound: the letters of the sums around."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens = tokens + 5 * [("end", "")]  # as far as anybody looks ahead
        self.pos, self.depth, self.bars, self.money = 0, 0, 0, None
        self.bound: list[Node] = []

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.pos + ahead]

    def take(self, *ops: str) -> str | None:
        """The next token, and go on, if it is one of these; else None."""
        kind, tok = self.tokens[self.pos]
        if tok not in ops or kind not in ("op", "cmd"):
            return None
        self.pos += 1
        return tok

    def need(self, *ops: str) -> str:
        if (tok := self.take(*ops)) is None:
            raise Unreadable(f"expected {ops[0]}")
        return tok

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deep")

    # lists, relations, words

    def answer(self) -> Node:
        node = self.items(())
        if self.peek()[0] != "end" or node == ("list",):
            raise Unreadable(f"unexpected {self.peek()[1]}")
        return node

    def items(self, closers: tuple) -> Node:
        """Members between separators. "or" is as good as "and" between numbers, but not between words."""
        out: list[tuple] = []
        while self.peek()[0] != "end" and self.peek()[1] not in closers:
            if self.take("or"):
                out += [EITHER] * (EITHER not in out and any(x[0] == "text" for x in out))
            elif not self.take(",", ";", "&"):
                out.append(self.item())
            if len(out) > MAX_ITEMS:
                raise Unreadable("too many items")
        return out[0] if len(out) == 1 else ("list", *out)

    def item(self) -> Node:
        """A relation chain such as `x = 1 < y`, words, or a letter choice with its text."""
        if choice := self.choice():
            return choice
        if self.peek()[0] == "word" and self.peek()[1].lower() not in NUMBER_WORDS:
            return self.words()
        self.take("~")
        nodes, ops = [self.measured()], []
        while op := self.take(*RELATIONS):
            ops.append(op)
            nodes.append(self.measured())
        return ("rel", tuple(nodes), tuple(ops)) if ops else nodes[0]

    def choice(self) -> tuple | None:
        """`(C) 12` or `C. 12`: a letter with its text. `(C)` alone is the symbol C."""
        start = self.pos + 1 if self.peek() == ("op", "(") else self.pos
        (_, letter), (_, mark), (kind, after) = self.tokens[start : start + 3]
        if letter not in CHOICES or mark not in ((")",) if start > self.pos else (")", ".", ":")):
            return None
        if kind not in ("num", "word", "cmd") or after in NOT_FACTORS:
            return None
        self.pos = start + 2
        return ("choice", letter, self.item())

    def words(self) -> Node:
        """Words up to the next separator: a label, dropped, before `=`, `:` or "is"; else the answer."""
        start = self.pos
        while self.peek()[0] != "end" and self.peek()[1] not in (*",;=:~)]}", r"\}", "or"):
            self.pos += 1
        if self.take("=", ":", "~"):
            return self.item()
        words = [tok for _, tok in self.tokens[start : self.pos]]
        label = next((i for i, w in enumerate(words) if w in ("is", "are", "equals")), None)
        leading = words[0] in ("about", "approximately", "USD", "exactly", "the")
        if leading and self.tokens[start + 1][0] == "num":
            label = label or 0
        if label is not None:
            self.pos = start + label + 1
            return self.item()
        return text_node(" ".join(words))

    def measured(self) -> Node:
        """An expression with its unit: `5 cm^2`, `$5`, `3 eggs per day`, `2 hours 30 minutes`, `5 dozen`."""
        self.money = None
        kind, tok = self.peek()
        if kind == "word" and tok.lower() in NUMBER_WORDS and not self.depth:
            self.pos += 1
            node = ("n", Fraction(NUMBER_WORDS[tok.lower()]))
        else:
            node = self.sum()
        if self.peek() == ("op", ":") and self.bars is not True:
            node = ("ratio", node)
            while self.take(":"):
                node = (*node, self.sum())
        if self.take("bmod", "mod"):
            node = ("f", "mod", node, self.term())
        if self.take("pmod"):
            return ("unit", node, (((f"mod {self.argument(whole=True)!r}", 1),), Fraction(1)))
        while self.peek()[0] == "word" and (word := self.peek()[1].lower()) in (*SCALES, "percent"):
            self.pos += 1
            node = ("*", node, ("n", SCALES[word])) if word in SCALES else ("%", node)
        money, words = self.money, self.unit_words()
        if not words and not money:
            return node
        unit = (((money, 1),), Fraction(1)) if money else unit_of(words)
        if unit and words and self.peek()[0] == "num":
            rest = self.measured()
            if rest[0] != "unit" or not rest[2] or rest[2][0] != unit[0]:
                raise Unreadable("two measures")
            node = ("+", node, ("*", rest[1], ("n", rest[2][1] / unit[1])))
        return ("unit", node, unit, " ".join(words))

    def unit_words(self) -> list[str]:
        words: list[str] = []
        while (t := self.peek())[0] == "word" or (words and (t[1] in ("/", "^", ".") or (words[-1], t[0]) in (
                ("^", "num"), ("/", "sym")))):
            words.append(t[1])
            self.pos += 1
            if t[1] == "^" and self.take("{"):
                words.append((self.take("-") or "") + self.peek()[1])
                self.pos += 1
                self.need("}")
            if len(words) > 8 or len(t[1]) > 20 or t[1].lower() in OPERATOR_WORDS or words == ["squared"]:
                raise Unreadable("prose")
        return words

    # expressions

    def sum(self) -> Node:
        """Terms under + - ± and the set operations."""
        self.deeper()
        sign = self.take("+", "-", "pm", "mp") or "+"
        node = self.signed(sign, self.term())
        while op := self.take("+", "-", "pm", "mp", *SET_OPERATIONS):
            right = self.term()
            op = "setminus" if op == "-" and right[0] == "set" else op
            sets = op in SET_OPERATIONS
            node = (SET_OPERATIONS[op], node, right) if sets else total(node, self.signed(op, right))
        self.depth -= 1
        return node

    @staticmethod
    def signed(sign: str, node: Node) -> Node:
        if sign == "-" and (node[0] == "matrix" or node[:3] == ("tuple", "(", ")")):
            return product(("n", Fraction(-1)), node)
        return {"+": node, "-": ("-", node), "pm": ("±", node), "mp": ("-", ("±", node))}[sign]

    def term(self) -> Node:
        r"""Factors, multiplied or divided, with or without a sign. Mixed numbers: `2\frac{1}{3}`, `2 1/3`."""
        node = self.factor()
        while True:
            after_number = self.tokens[self.pos - 1][0] == "num"
            kind, tok = self.peek()
            if self.take("*"):
                node = product(node, self.factor())
            elif self.take("/"):
                node = ("/", node, self.factor())
            elif after_number and node[0] == "n" and node[1] % 1 == 0 and (kind == "num" or tok == "frac"):
                part = self.factor()
                if kind == "num":
                    self.need("/")
                    part = ("/", part, self.factor())
                percent, part = part[0] == "%", part[1] if part[0] == "%" else part
                mixed = part[0] == "/" and part[1][0] == part[2][0] == "n" and part[1][1] < part[2][1]
                node = ("+", node, part) if mixed else product(node, part)
                node = ("%", node) if percent else node
            elif self.starts_factor() and not (kind == "num" and after_number):
                node = product(node, self.factor())
            else:
                return node

    def starts_factor(self) -> bool:
        kind, tok = self.peek()
        if kind == "op":
            return tok in ("(", "{", r"\{") or (tok == "|" and not self.bars)
        return kind in ("sym", "num", "begin") or (kind == "cmd" and tok not in NOT_FACTORS)

    def factor(self) -> Node:
        """A signed atom with its postfixes: powers, factorial, percent, degrees, currency."""
        if sign := self.take("-", "+", "pm"):
            self.deeper()
            node = self.signed(sign, self.factor())
            self.depth -= 1
            return node
        if coin := self.take(*COINS):
            node = self.factor()
            self.money = COINS[coin]
            return node
        node = self.atom()
        while True:
            after = self.peek(1)
            if self.take("^"):
                node = self.power(node)
            elif self.peek() == ("op", "!") and after != ("op", "!") and self.take("!"):
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
            elif after[0] in ("end", "op") and (coin := self.take(*COINS)):
                self.money = COINS[coin]
            else:
                return node

    def power(self, base: Node) -> Node:
        sign = self.take("-", "+") or "+"
        exponent = self.argument(whole=True)
        if exponent in (("s", "T"), ("s", "top")) and base[0] in ("matrix", "tuple"):
            return ("matrix", *zip(*base[1:])) if base[0] == "matrix" else base
        return ("^", base, self.signed(sign, exponent))

    def argument(self, whole: bool = False) -> Node:
        r"""What a command takes: `{...}` or one token. A power takes the whole number, and so does the lower
        part of \frac: models write \frac919 for 9/19."""
        kind, tok = self.peek()
        if self.take("{"):
            node = self.items(("}",))
            self.need("}")
            return node
        if kind == "num" and not whole and len(tok) > 1 and tok.isdigit():
            self.tokens[self.pos] = ("num", tok[1:])
            return ("n", Fraction(int(tok[0])))
        return self.atom()

    def atom(self) -> Node:
        kind, tok = self.peek()
        if kind in ("op", "cmd") and tok in ENDS:
            return self.bracket()
        self.pos += 1
        if kind in ("num", "based", "repeat"):
            return {"num": decimal, "based": based, "repeat": repeating}[kind](tok)
        if kind == "sym":
            return self.symbol(tok)
        if kind == "cmd":
            return self.command(tok)
        if kind == "begin":
            return self.environment(tok)
        if tok == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.need("|")
            return ("f", "abs", node)
        raise Unreadable(f"unexpected {tok}")

    def symbol(self, name: str) -> Node:
        """A variable with its subscript; `f(x)` is a call, `P(1, 2)` a labelled point."""
        if self.take("_"):
            sub = self.argument(whole=True)
            if any(x in self.bound for x in leaves(sub)):
                return ("f", f"?{name}_", sub)
            name += f"_{sub[1]}" if sub[0] in ("n", "s") else f"_{sub!r}"
        if self.peek() == ("op", "("):
            start = self.pos
            inside = self.bracket()
            if inside[0] == "tuple":
                return inside if name.isupper() else ("f", "?" + name, *inside[3:])
            if name[0] in "fgFG" and len(name) < 3:
                return ("f", "?" + name, inside)
            self.pos = start
        return ("s", name)

    def bracket(self) -> Node:
        r"""( ) [ ] \{ \} and \langle: a group, tuple, interval or set; a set may carry a condition."""
        opener = self.take(*ENDS)
        self.deeper()
        bars, self.bars = self.bars, opener == r"\{"
        node = self.items((*ENDS[opener], "|", ":") if self.bars else ENDS[opener])
        condition = self.bars and self.take("|", ":")
        if condition:
            node = self.items(ENDS[opener])
        closer = self.need(*ENDS[opener])
        self.bars, self.depth = bars, self.depth - 1
        members = node[1:] if node[0] == "list" else (node,)
        if condition:
            return node
        if opener == r"\{" or (opener == "{" and len(members) > 1):
            return ("set", *members)
        if opener == "[" and closer == "]" and members and all(m[:2] == ("tuple", "[") for m in members):
            return ("matrix", *(m[3:] for m in members))
        if len(members) == 1 and ((opener, closer) in (("(", ")"), ("{", "}")) or (
                opener == "[" and node[0] not in ("list", "tuple", "n"))):
            return node
        opener = "(" if opener in ("langle", "]") else opener
        return ("tuple", opener, ")" if closer in ("rangle", "[") else closer, *members)

    def command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top, low = self.argument(), self.argument(whole=name == "frac")
            return ("/", top, low) if name == "frac" else ("f", "binom", top, low)
        if name == "sqrt":
            index = self.bracket() if self.peek() == ("op", "[") else ("n", Fraction(2))
            return ("f", "root", self.argument(whole=True), index[3] if index[0] == "tuple" else index)
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("r" + name[1:])
            return ("f", name[1:], node)
        if name in ("sum", "prod"):
            return self.series(name)
        if name in FUNCTIONS:
            return self.function(FOLD.get(name, name))
        if name in WRAPPERS:
            node = self.argument(whole=True)
            return LINE if name == "mathbb" and node == ("s", "R") else node
        if name in GREEK:
            return self.symbol(name)
        if name in ("pi", "ldots", "top", "perp", "infty", "emptyset"):
            return {"infty": ("inf",), "emptyset": ("set",)}.get(name, ("s", name))
        raise Unreadable(f"unknown command {name}")

    def series(self, name: str) -> Node:
        r"""`\sum_{k=1}^{n} a_k`: ("f", "sum", k, 1, n, a_k), a_k as a function of k. Finite sums only."""
        start, stop = (self.need(mark) and self.argument(whole=True) for mark in "_^")
        if start[0] != "rel" or start[2] != ("=",) or start[1][0][0] != "s" or stop == ("inf",):
            raise Unreadable("not a finite sum")
        self.bound.append(start[1][0])
        term = self.term()
        return ("f", name, self.bound.pop(), start[1][1], stop, term)

    def function(self, name: str) -> Node:
        r"""`\sin^2 3x`, `\log_2 8`, `sin(x)`: a bare argument runs to the next sign, operator or function."""
        power = base = None
        while op := self.take("^", "_"):
            if op == "^":
                power = self.signed(self.take("-") or "+", self.argument(whole=True))
            else:
                base = self.argument(whole=True)
        if self.peek() == ("op", "("):
            node = self.bracket()
        else:
            braces = self.peek() == ("op", "{")
            node = self.factor()
            while not braces and self.starts_factor() and self.peek()[1] not in (*FUNCTIONS, "("):
                node = product(node, self.factor())
        if name == "cbrt" or name == "root":
            return ("f", "root", node, ("n", Fraction(3)))
        if name in CO:
            return ("f", CO[name], ("/", ONE, node))
        if name == "cis":
            return ("+", ("f", "cos", node), ("*", ("s", "i"), ("f", "sin", node)))
        if name in ("gcd", "lcm", "max", "min"):
            at = {"tuple": 3, "set": 1}.get(node[0])
            return ("f", name, *(node[at:] if at else (node,)))
        if name == "log" and base:
            return ("/", ("f", "ln", node), ("f", "ln", base))
        if power == ("-", ONE) and name in ("sin", "cos", "tan"):
            return ("f", "a" + name, node)
        top, low = RATIOS.get(name, (name, None))
        value = ("f", top, node) if top else ONE
        value = ("/", value, ("f", low, node)) if low else value
        return ("^", value, power) if power else value

    def environment(self, name: str) -> Node:
        """Matrices by rows; cases, aligned and the like as a list."""
        rows, row = [], []
        while self.peek()[0] not in ("close", "end"):
            if self.take(";"):
                rows, row = [*rows, row], []
            elif not self.take("&", ",", "or"):
                row = [*row, self.item()]
            if len(rows) + len(row) > MAX_ITEMS:
                raise Unreadable("too many items")
        rows = [r for r in [*rows, row] if r]
        self.pos += self.peek()[0] == "close"
        if "matrix" in name or (name == "array" and any(len(r) > 1 for r in rows)):
            if len({len(r) for r in rows}) > 1:
                raise Unreadable("ragged matrix")
            node = ("matrix", *map(tuple, rows))
            return ("f", "?det", node) if name == "vmatrix" else node
        flat = [x for r in rows for x in r]
        return flat[0] if len(flat) == 1 else ("list", *flat)


def total(a: Node, b: Node) -> Node:
    """a plus b; vectors and matrices entry by entry."""
    if a[0] == b[0] == "matrix" and len(a) == len(b) and len(a[1]) == len(b[1]):
        return ("matrix", *(tuple(map(total, *rows)) for rows in zip(a[1:], b[1:])))
    vectors = a[:3] == b[:3] == ("tuple", "(", ")") and len(a) == len(b)
    return (*a[:3], *map(total, a[3:], b[3:])) if vectors else ("+", a, b)


def rational(node: Node) -> Fraction | None:
    """The value of 2, -2 and 2/3."""
    if node[0] in ("-", "/"):
        x, y = rational(node[1]), rational(node[-1])
        return None if None in (x, y) or not y else x / y if node[0] == "/" else -x
    return node[1] if node[0] == "n" else None


def product(a: Node, b: Node) -> Node:
    """a times b; a scalar goes into a vector or matrix. Two matrices are multiplied if they are rational."""
    if a[0] == b[0] == "matrix" and len(a[1]) == len(b) - 1:
        rows, columns = [list(map(rational, r)) for r in a[1:]], [list(map(rational, c)) for c in zip(*b[1:])]
        if any(None in v for v in rows + columns):
            return ("*", a, b)
        entries = (("n", sum(map(operator.mul, r, c))) for r, c in itertools.product(rows, columns))
        return ("matrix", *zip(*[entries] * len(columns)))
    if b[0] == "matrix":
        return ("matrix", *(tuple(map(product, itertools.repeat(a), row)) for row in b[1:]))
    return (*b[:3], *map(product, itertools.repeat(a), b[3:])) if b[0] == "tuple" else ("*", a, b)


def text_node(text: str) -> Node:
    words = [w for w in re.findall(r"[^\W_]+|[^\w\s.,'\"!?]", text.lower()) if w not in ("a", "an", "the")]
    joined = " ".join(words)
    if joined.removesuffix("s") in ("none", "empty set", "no solution", "no real solution"):
        return ("set",)
    if joined == "infinity":
        return ("inf",)
    return LINE if joined in ("all real numbers", "all reals", "all real x") else ("text", joined)


CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d\d))?(?:\s*:\s*(\d\d))?\s*([ap]\.?\s?m\b\.?)?", re.I)


def clock(text: str) -> tuple | None:
    """`4:30 p.m.`, `05:00`, `9 am`."""
    m = CLOCK.fullmatch(re.sub(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}", r"\1", text).strip())
    if not m or not (m[2] or m[4]):
        return None
    hours, minutes, seconds = (Fraction(part or 0) for part in m.groups()[:3])
    half = m[4][0].lower() if m[4] else ""
    return ("time", hours * 3600 + minutes * 60 + seconds, half, ("n", hours), ("n", minutes))


OPERATOR = re.compile(r"\\(?:sum|prod|i+nt|lim|partial|det|text|operatorname)(?![a-z])")  # its value counts


def parse(text: str, merge: bool = True) -> Node:
    """The tree of a written answer; ("raw", text) if nobody can read it. merge: `1,000` may be a number."""
    cleaned = clean(text[: MAX_CHARS + 1])
    if max(len(text), len(cleaned)) > MAX_CHARS:
        return ("raw", text)
    if time := clock(cleaned):
        return time
    try:
        return Parser(tokenize(cleaned, merge=merge)).answer()
    except (Unreadable, IndexError, ZeroDivisionError):
        head, _, rest = cleaned.rpartition("=")
        if OPERATOR.search(head) and rest.count("{") == rest.count("}"):
            return parse(rest, merge)
        return ("raw", re.sub(r"\s+|\\text|[{}]", "", cleaned))
