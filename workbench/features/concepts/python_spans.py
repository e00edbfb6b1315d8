"""Concepts of Python source, read by Python itself.

1. `tokenize`: keyword, string, comment, number, operators, delimiters, brackets and their depth, names being defined,
   indentation and its depth, line ends.
2. `ast`: docstring, parameter, called name, attribute, import, decorator, type annotation, keyword argument, assigned
   name, built-in name.

Strings are opaque: what stands between the braces of an f-string is string and nothing else, since only Python 3.12
and later see inside. Depths are concepts of their own: `bracket_depth_2` holds inside exactly two brackets,
`indent_depth_4` in statements four or more levels deep (lines of comment alone have no depth).
"""

import ast
import builtins
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterator

from workbench.features.concepts.spans import Span

DEEPEST_INDENT, DEEPEST_BRACKET = 4, 3
"""Depths from here on are one concept."""
DELIMITERS = {",", ":", ".", ";", "->", "..."}
COMPARISONS = {"==", "!=", "<", ">", "<=", ">="}
OPENING, CLOSING = set("([{"), set(")]}")
BUILTINS = set(dir(builtins))
# f-strings (3.12) and t-strings (3.14) come in pieces.
_PIECES_START = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {None}
_PIECES_END = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}
_FORMATTED = tuple(kind for name in ("JoinedStr", "TemplateStr") if (kind := getattr(ast, name, None)))
_WITHOUT_TEXT = {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


def python_spans(text: str) -> list[Span] | None:
    """The concepts of a source text, or None when it is not valid for the running Python."""
    # Python ends lines at "\r" too; of the same length, so that offsets stay.
    text = text.replace("\r\n", " \n").replace("\r", "\n")
    places = _Places(text)
    try:
        with warnings.catch_warnings():
            # Old code is full of invalid escape sequences.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="\n").readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    return [*_Lexer(places).spans(tokens), *_syntactic(tree, places)]


class _Places:
    """Turns lines and columns into characters of the text."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def at(self, position: tuple[int, int]) -> int:
        """Of tokenize's (line, column in characters)."""
        line, column = position
        return self.starts[min(line - 1, len(self.lines))] + column

    def at_bytes(self, line: int, column: int) -> int:
        """Of ast's line and column in UTF-8 bytes."""
        text = self.lines[line - 1]
        if not text.isascii():
            column = len(text.encode()[:column].decode(errors="ignore"))
        return self.starts[line - 1] + column

    def node(self, node: ast.AST) -> tuple[int, int]:
        """Of a whole node."""
        start = self.at_bytes(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return start, self.at_bytes(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


class _Lexer:
    """What tokens alone say: a state machine over tokenize's tokens, one at a time."""

    def __init__(self, places: _Places) -> None:
        self.places = places
        self.indent = self.depth = 0
        self.pieces = 0
        """f-strings that are open, one inside the other."""
        self.string_start = self.inside_since = 0
        self.line_start: int | None = None
        """Where the logical line began; None before its first token."""
        self.previous = ""
        """The token before, if it was a name."""

    def spans(self, tokens: list[tokenize.TokenInfo]) -> Iterator[Span]:
        for token in tokens:
            start, stop = self.places.at(token.start), self.places.at(token.end)
            yield from self._string_piece(token, start, stop)
            if self.line_start is None and token.type not in _WITHOUT_TEXT and token.type != tokenize.NL:
                self.line_start = start
                yield Span("indentation", start - token.start[1], start)
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                self.indent += 1 if token.type == tokenize.INDENT else -1
            elif self.pieces:
                continue
            elif token.type in (tokenize.NEWLINE, tokenize.NL):
                yield from self._line_end(token, start)
            else:
                yield from _lexeme(token, start, stop, self.previous)
                yield from self._bracket(token, start, stop)
            self.previous = token.string if token.type == tokenize.NAME else ""

    def _string_piece(self, token: tokenize.TokenInfo, start: int, stop: int) -> Iterator[Span]:
        if token.type in _PIECES_START:
            self.string_start = self.string_start if self.pieces else start
            self.pieces += 1
        elif token.type in _PIECES_END:
            self.pieces -= 1
            if not self.pieces:
                yield Span("string", self.string_start, stop)

    def _line_end(self, token: tokenize.TokenInfo, start: int) -> Iterator[Span]:
        yield Span("line_end", start, start + 1)
        if not self.depth:
            if token.type == tokenize.NEWLINE and self.line_start is not None:
                yield Span(f"indent_depth_{min(self.indent, DEEPEST_INDENT)}", self.line_start, start)
            self.line_start = None

    def _bracket(self, token: tokenize.TokenInfo, start: int, stop: int) -> Iterator[Span]:
        if token.type != tokenize.OP or token.string not in OPENING | CLOSING:
            return
        # Brackets themselves stand at the depth outside them.
        edge = stop if token.string in OPENING else start
        if self.depth:
            yield Span(f"bracket_depth_{min(self.depth, DEEPEST_BRACKET)}", self.inside_since, edge)
        self.depth += 1 if token.string in OPENING else -1
        self.inside_since = edge


def _lexeme(token: tokenize.TokenInfo, start: int, stop: int, previous: str) -> Iterator[Span]:
    text = token.string
    if token.type == tokenize.NAME:
        if keyword.iskeyword(text):
            yield Span("keyword", start, stop)
        elif previous == "def":
            yield Span("function_definition_name", start, stop)
        elif previous == "class":
            yield Span("class_definition_name", start, stop)
        if text in ("self", "cls"):
            yield Span("self", start, stop)
    elif token.type == tokenize.STRING:
        yield Span("string", start, stop)
    elif token.type == tokenize.COMMENT:
        yield Span("comment", start, start + len(text.rstrip()))
    elif token.type == tokenize.NUMBER:
        yield Span("number", start, stop)
    elif token.type == tokenize.OP:
        yield Span(_operator(text), start, stop)


def _operator(text: str) -> str:
    if text in OPENING:
        return "open_bracket"
    if text in CLOSING:
        return "close_bracket"
    if text in DELIMITERS:
        return "delimiter"
    if text in COMPARISONS:
        return "comparison_operator"
    return "assignment_operator" if text.endswith("=") else "operator"


def _syntactic(tree: ast.Module, places: _Places) -> Iterator[Span]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield from _of_node(node, places)
        # Positions inside f-strings are wrong before Python 3.12.
        if not isinstance(node, _FORMATTED):
            waiting.extend(ast.iter_child_nodes(node))


def _of_node(node: ast.AST, places: _Places) -> Iterator[Span]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        if ast.get_docstring(node, clean=False) is not None and isinstance(first, ast.Expr):
            yield Span("docstring", *places.node(first.value))
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        for decorator in node.decorator_list:
            yield Span("decorator", *places.node(decorator))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
        yield Span("type_annotation", *places.node(node.returns))
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
        yield Span("type_annotation", *places.node(node.annotation))
    if isinstance(node, ast.arg):
        yield _leading("parameter", node, node.arg, places)
    elif isinstance(node, ast.keyword) and node.arg:
        yield _leading("keyword_argument", node, node.arg, places)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield Span("import", *places.node(node))
    elif isinstance(node, ast.Attribute):
        yield _trailing("attribute", node, places)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield Span("called_name", *places.node(node.func))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield _trailing("called_name", node.func, places)
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Store):
            yield Span("assigned_name", *places.node(node))
        elif node.id in BUILTINS:
            yield Span("builtin_name", *places.node(node))


def _leading(concept: str, node: ast.AST, name: str, places: _Places) -> Span:
    start, _ = places.node(node)
    return Span(concept, start, start + len(name))


def _trailing(concept: str, node: ast.Attribute, places: _Places) -> Span:
    _, stop = places.node(node)
    return Span(concept, stop - len(node.attr), stop)
