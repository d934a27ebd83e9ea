r"""Reads expressions: from tokens to a tree of sums, products, powers and functions.

Products without a sign bind tighter than `/`, so 1/2x is 1/(2x). `\frac12` takes one digit each, `x^12` and
`\sqrt12` take the whole number. An integer before a fraction of integers is a mixed number. i is the
imaginary unit, e and \pi are constants, and every other letter is a variable. Anything else raises
Unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence

from rosd_jax.rewards.maths.cursor import Cursor, Node, number, read_number
from rosd_jax.rewards.maths.latex import Token, Unreadable
from rosd_jax.rewards.maths.words import is_typed_word

_MAX_DEPTH = 60

_FUNCTIONS = frozenset(
    r"""\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \arccot \arcsec \arccsc \sinh \cosh \tanh \coth
    \log \ln \lg \exp \max \min \gcd \lcm \arsinh \arcosh \artanh \Re \Im \arg \deg""".split()
)
ANGLED = frozenset(r"\sin \cos \tan \cot \sec \csc".split())
_MANY = frozenset(r"\max \min \gcd \lcm".split())
_ACCENTS = frozenset(
    r"""\overline \dot \ddot \vec \hat \tilde \widehat \widetilde \underline \overrightarrow
    \overleftrightarrow \mathcal \mathbb \mathfrak \mathscr \bmod""".split()
)
# Commands with a meaning that is not computed here, so they must not be read as variables.
_UNREAD = frozenset(
    r"""\sum \prod \int \iint \iiint \oint \lim \limsup \liminf \sup \inf \det \to \Rightarrow \rightarrow
    \implies \iff \mapsto \neg \forall \exists \pmod \mod \pm \mp \in \notin \cup \cap \setminus \subset
    \subseteq \land \lor \leq \geq \neq \approx \equiv \sim \cong \propto \parallel \perp \begin \end
    \partial \nabla \circ \RR \ZZ \NN \QQ \CC \emptyset \\ \& \} \] \) \rangle \rfloor \rceil \over \choose
    \underbrace \overbrace \substack \stackrel \left \right \ref \cite \item \therefore \because""".split()
)
_APPLIED = frozenset("f g F G \\phi \\psi \\Phi \\Psi \\Gamma \\zeta \\delta u".split())
_CLOSERS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


def read_expression(tokens: Sequence[Token]) -> Node:
    """The tree of all the tokens. Raises Unreadable if they are not an expression."""
    reader = _Reader(list(tokens))
    node = reader.sum()
    if reader.at < len(reader.tokens):
        raise Unreadable(f"{reader.peek()} is out of place")
    return node


class _Reader(Cursor):
    """A cursor over tokens. Each method reads one level of precedence."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self.depth = 0
        self.in_angle = False  # inside a trigonometric function, where ° is pi/180
        self.bars = 0
        self.splits = False  # inside the argument of a command that takes one digit

    def enter(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable("nested too deep")

    def sum(self) -> Node:
        self.enter()
        terms = [self.term()]
        while self.peek() in ("+", "-"):
            sign = self.take().text
            term = self.term()
            terms.append(Node("neg", (term,)) if sign == "-" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def term(self) -> Node:
        node = self.signed()
        while self.peek() in ("*", "/", ":") and self.kind() == "sign":
            sign = self.take().text
            factor = self.signed()
            node = Node("mul" if sign == "*" else "div", (node, factor))
        return node

    def signed(self) -> Node:
        signs = 0
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take().text == "-"
            signs += 1
        if signs > 4:
            raise Unreadable("too many signs")
        node = self.juxtaposed()
        return Node("neg", (node,)) if negative else node

    def juxtaposed(self) -> Node:
        """Factors without a sign between them."""
        factors = [self.powered()]
        while self.starts_factor():
            if self.kind() == "num":
                raise Unreadable("a number after a factor")
            factors.append(self.powered())
        return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    def starts_factor(self) -> bool:
        text = self.peek()
        kind = self.kind()
        if kind in ("num", "let", "text"):
            return True
        if text == "|":
            return not self.bars
        return text in ("(", "{", "[") or (kind == "cmd" and text not in _UNREAD)

    def powered(self) -> Node:
        node = self.primary()
        while True:
            text = self.peek()
            if text == "^" and self.is_prime_group():
                self.script()
                node = Node("sym", text=f"{_name(node)}'")
            elif text == "^":
                self.take()
                node = Node("pow", (node, self.exponent()))
            elif text == "{" and self.peek(1) == "}":
                self.at += 2
            elif text == "°":
                self.take()
                node = Node("angle", (node,)) if self.in_angle else node
            elif text == "!":
                self.take()
                if self.peek() == "!":
                    raise Unreadable("a double factorial")
                node = Node("fact", (node,))
            elif text == "%":
                self.take()
                node = Node("div", (node, number("100")))
            elif text == "'":
                self.take()
                node = Node("sym", text=f"{_name(node)}'")
            elif text == "_":
                node = Node("sym", text=f"{_name(node)}_{self.script()}")
            else:
                return self.applied(node) if node.kind == "sym" and text == "(" else node

    def is_prime_group(self) -> bool:
        return self.peek(1) == "'" or (self.peek(1) == "{" and self.peek(2) == "'")

    def applied(self, node: Node) -> Node:
        """A variable before parentheses: a function's value if it looks like one, else the variable."""
        stop = self.matching(self.at)
        inside = self.tokens[self.at + 1 : stop]
        lone = len(inside) == 1 and (inside[0].kind in ("num", "cmd") or len(inside[0].text) == 1)
        if not lone and node.text.strip("'") not in _APPLIED:
            return node
        self.at += 1
        arguments = self.arguments(")")
        return Node("apply", arguments, text=node.text)

    def arguments(self, closer: str) -> tuple[Node, ...]:
        found = [self.sum()]
        while self.peek() in (",", ";"):
            self.take()
            found.append(self.sum())
        self.take(closer)
        return tuple(found)

    def exponent(self) -> Node:
        self.enter()
        negative = self.peek() == "-"
        if negative or self.peek() == "+":
            self.take()
        node = self.argument(split=False)
        while self.peek() == "^":
            self.take()
            node = Node("pow", (node, self.exponent()))
        self.depth -= 1
        return Node("neg", (node,)) if negative else node

    def argument(self, split: bool) -> Node:
        """The argument of a command: a group or one token; of a number one digit if `split`, else all."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else Token("", "")
        if token.kind == "num" and split and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unreadable("a decimal without braces")
            self.tokens[self.at] = token._replace(text=token.text[1:])
            return number(token.text[0])
        if token.kind == "let":
            return _variable(self.one_letter())
        outer = self.splits
        self.splits = split
        node = self.primary()
        self.splits = outer
        return node

    def primary(self) -> Node:
        text = self.peek()
        kind = self.kind()
        if kind == "num":
            return self.mixed(read_number(self))
        if text in ("(", "[", "{", r"\lfloor", r"\lceil"):
            return self.group()
        if text in ("|", r"\|"):
            return self.between_bars()
        if kind == "let":
            return self.letters()
        if kind == "text":
            token = self.take()
            return _variable(token.text)
        if kind != "cmd" or text in _UNREAD:
            raise Unreadable(f"{text or 'nothing'} is no term")
        return self.command()

    def group(self) -> Node:
        opener = self.take().text
        outer = self.bars, self.splits
        self.bars = 0
        self.splits = False
        inside = self.sum()
        self.take(_CLOSERS[opener])
        self.bars, self.splits = outer
        rounding = {r"\lfloor": "floor", r"\lceil": "ceil"}.get(opener)
        return Node(rounding, (inside,)) if rounding else inside

    def between_bars(self) -> Node:
        bar = self.take().text
        self.bars += 1
        inside = self.sum()
        self.take(bar)
        self.bars -= 1
        return Node("abs" if bar == "|" else "norm", (inside,))

    def letters(self) -> Node:
        token = self.tokens[self.at]
        return _variable(self.take().text) if is_typed_word(token.text) else _variable(self.one_letter())

    def mixed(self, whole: Node) -> Node:
        """1 1/2 and 1\frac12, with integers only."""
        if not whole.text.isdigit():
            return whole
        start = self.at
        tokens = list(self.tokens)
        if self.peek() == r"\frac":
            fraction = self.command()
        elif (
            self.kind() == "num"
            and self.tokens[self.at].gap
            and self.peek(1) == "/"
            and self.kind(2) == "num"
        ):
            upper = number(self.take().text)
            self.take("/")
            fraction = Node("div", (upper, number(self.take().text)))
        else:
            return whole
        if fraction.kind == "div" and all(part.text.isdigit() for part in fraction.parts):
            return Node("add", (whole, fraction))
        self.at = start
        self.tokens = tokens
        return whole

    def command(self) -> Node:
        text = self.take().text
        if text == r"\frac":
            return self.fraction()
        if text == r"\sqrt":
            return self.root()
        if text == r"\binom":
            return Node("binom", (self.argument(split=True), self.argument(split=True)))
        if text in _FUNCTIONS:
            return self.function(text)
        if text == r"\overline" and self.peek() == "{" and self.kind(1) == "num":
            return Node("conj", (self.group(),))
        if text in _ACCENTS:
            return Node("sym", text=text + self.accented())
        if text in (r"\pi", r"\infty"):
            return Node("const", text=text)
        return Node("sym", text=text)

    def accented(self) -> str:
        if self.peek() != "{":
            return self.one_letter() if self.kind() == "let" else self.take().text
        stop = self.matching(self.at)
        text = " ".join(token.text for token in self.tokens[self.at + 1 : stop])
        self.at = stop + 1
        return text

    def fraction(self) -> Node:
        if derivative := self.derivative():
            return derivative
        upper = self.argument(split=True)
        lower = self.argument(split=True)
        if self.kind() == "num":
            raise Unreadable("a number after a fraction")
        return Node("div", (upper, lower))

    def derivative(self) -> Node | None:
        r"""`\frac{dy}{dx}` as one name, since d is not a factor."""
        if self.peek() != "{":
            return None
        middle = self.matching(self.at)
        if middle + 1 >= len(self.tokens) or self.tokens[middle + 1].text != "{":
            return None
        stop = self.matching(middle + 1)
        groups = self.tokens[self.at + 1 : middle], self.tokens[middle + 2 : stop]
        if not all(group and (group[0].text[0] == "d" or group[0].text == r"\partial") for group in groups):
            return None
        if groups[1][0].text == "d" and len(groups[1]) == 1:
            return None
        if any(token.text in ("+", "-", "*", "/") for token in groups[1]):
            return None
        upper, lower = ("".join(token.text for token in group) for group in groups)
        self.at = stop + 1
        return Node("sym", text=f"{upper}/{lower}")

    def root(self) -> Node:
        index = number("2")
        if self.peek() == "[":
            self.take()
            index = self.sum()
            self.take("]")
        return Node("pow", (self.argument(split=self.splits), Node("div", (number("1"), index))))

    def function(self, name: str) -> Node:
        base: tuple[Node, ...] = ()
        power = None
        for _ in range(2):
            if self.peek() == "_" and name in (r"\log", r"\lg"):
                self.take()
                base = (self.argument(split=True),)
            elif self.peek() == "^" and power is None:
                self.take()
                power = self.exponent()
        outer = self.in_angle
        self.in_angle = name in ANGLED
        arguments = self.function_arguments(name)
        self.in_angle = outer
        if power and power.kind == "neg" and power.parts[0].value == 1 and name in ANGLED:
            return Node("call", arguments, text=name.replace("\\", r"\arc"))
        node = Node("call", (*arguments, *base), text=name)
        return Node("pow", (node, power)) if power else node

    def function_arguments(self, name: str) -> tuple[Node, ...]:
        if name in _MANY:
            self.take("(" if self.peek() != r"\{" else r"\{")
            return self.arguments(_CLOSERS[self.tokens[self.at - 1].text])
        if self.peek() in ("(", "{", "["):
            return (self.postfixed_group(),)
        negative = self.peek() == "-"
        self.at += negative
        factors = [self.powered()]
        while (
            self.starts_factor()
            and self.peek() not in _FUNCTIONS
            and self.kind() != "num"
            and self.peek() != "("
        ):
            factors.append(self.powered())
        node = factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
        has_pi = any(factor.text == r"\pi" for factor in factors)
        if has_pi and self.peek() == "/":
            self.take()
            node = Node("div", (node, self.powered()))
        return (Node("neg", (node,)) if negative else node,)

    def postfixed_group(self) -> Node:
        r"""`(30)^\circ` is an angle. Any other power after the group belongs to the function."""
        node = self.group()
        if self.peek() == "°":
            self.take()
            node = Node("angle", (node,)) if self.in_angle else node
        return node


def _variable(name: str) -> Node:
    return Node("const", text=name) if name in ("i", "e") else Node("sym", text=name)


def _name(node: Node) -> str:
    if node.kind in ("sym", "const"):
        return node.text
    if node.kind == "apply":
        return f"{node.text}({','.join(_name(part) for part in node.parts)})"
    raise Unreadable("a subscript or a prime on what is no name")
