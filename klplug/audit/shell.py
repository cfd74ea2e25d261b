"""A shell script read as a shell would expand it, without running any of it.

The grammar is tree-sitter's; what is here walks its tree: assignments, quotes, ``${VAR:-default}``,
arrays, here-documents, functions. What only a run could tell (``$(...)``, a variable that the
script never sets, one set in a branch) stays in the text as written and carries its reason.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from klplug.audit.errors import AuditError

if TYPE_CHECKING:
    from tree_sitter import Node, Parser


@dataclass(frozen=True)
class Word:
    """One argument after expansion.

    Attributes:
        text: what the program would get; parts that can't be known stand as written.
        line: line of the script, counted from 1; ``None`` for a command line.
        unknown: why parts of the text can't be known; empty where all is known.
    """

    text: str
    line: int | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A simple command: its words, the first being the program, and the lines it covers."""

    words: tuple[Word, ...]
    line: int
    last_line: int


@dataclass(frozen=True)
class Cut:
    """Settings that a broken line continuation keeps from the command above them."""

    line: int
    reason: str
    lost: tuple[Word, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of text on one line, on its way to become part of a word."""

    text: str
    line: int
    splits: bool = False  # an unquoted expansion: blanks in it part words
    unknown: str | None = None
    boundary: bool = False  # between the elements of "${ARRAY[@]}"


Value = list[Piece]


@dataclass
class _Array:
    elements: list[Value]


@dataclass
class _Scope:
    """Names and their values; a branch has a scope of its own over the one around it."""

    outer: _Scope | None = None
    names: dict[str, Value | _Array] = field(default_factory=dict)
    positional: list[Value] | None = None  # None: the script's own, which nobody knows

    def get(self, name: str) -> Value | _Array | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None

    def elements(self, name: str) -> list[Value]:
        value = self.get(name)
        if isinstance(value, _Array):
            return value.elements
        return [] if value is None else [value]

    def text(self, name: str) -> Value | None:
        """A variable's value, or the first element of an array."""
        value = self.get(name)
        if isinstance(value, _Array):
            return value.elements[0] if value.elements else None
        return value

    def branch(self) -> _Scope:
        return _Scope(self, {}, self.positional)


# Bound to keep a script that calls itself from being walked for ever.
_MAX_DEPTH = 20


@cache
def _parser() -> Parser:
    try:
        import tree_sitter
        import tree_sitter_bash
    except ImportError as error:
        raise AuditError(
            f"reading a shell script needs {error.name}: pip install 'klplug[cli]'"
        ) from None
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


class Script:
    """A script, read: its simple commands in order, expanded.

    Raises:
        AuditError: quotes, brackets or keywords that are never closed.
    """

    def __init__(self, source: str) -> None:
        # A backslash at the very end continues nothing, and the grammar stumbles over it.
        source = re.sub(r"\\\s*\Z", "\n", source)
        self._bytes = source.encode()
        self._lines = source.split("\n")
        self.commands: list[Command] = []
        self.sourced: list[int] = []
        self._functions: dict[str, Node] = {}
        self._scope = _Scope()
        self._depth = 0
        root = _parser().parse(self._bytes).root_node
        if root.has_error:
            _refuse_broken(root, self._lines)
        self._run(root)

    def cut_after(self, command: Command) -> Cut | None:
        """What a comment, a blank line, or a blank after the backslash cut off, if anything."""
        last = self._lines[command.last_line - 1]
        below = command.last_line  # index of the next line
        if re.search(r"\\[ \t]+$", last):
            reason = "a blank follows the backslash, which ends the command there"
        elif last.endswith("\\") and below < len(self._lines):
            following = self._lines[below].strip()
            if following.startswith("#"):
                reason = "a comment line follows the backslash, which ends the command there"
            elif not following:
                reason = "an empty line follows the backslash, which ends the command there"
            else:
                return None
        else:
            return None
        lost = []
        for number, line in enumerate(self._lines[below:], start=below + 1):
            text = line.strip().rstrip("\\").strip()
            if not text or text.startswith("#"):
                continue
            if not re.match(r"(\+{0,2}[\w@]+\.[\w@./]+=|--[a-z])", text):
                break
            lost.append(Word(text, number))
        return Cut(command.last_line, reason, tuple(lost)) if lost else None

    # Statements.

    def _run(self, node: Node) -> None:
        handler = self._STATEMENTS.get(node.type)
        if handler is not None:
            handler(self, node)
            return
        for child in node.named_children:
            self._run(child)

    def _assignment(self, node: Node) -> None:
        name_node = node.child_by_field_name("name")
        value = node.child_by_field_name("value")
        if name_node is None:
            return
        name = _text(name_node)
        appends = any(child.type == "+=" for child in node.children)
        line = node.start_point.row + 1
        if name_node.type == "subscript":
            name = name.partition("[")[0]
            why = f"${{{name}[@]}} is set one by one (line {line}), which is not followed"
            self._scope.names[name] = _Array([[Piece(f"${{{name}[@]}}", line, unknown=why)]])
            return
        if value is not None and value.type == "array":
            elements = [
                element
                for child in value.named_children
                if child.type != "comment"
                for element in _fields(self._expand(child))
            ]
            before = self._scope.elements(name) if appends else []
            self._scope.names[name] = _Array(before + elements)
            return
        pieces = (self._scope.text(name) or [] if appends else []) + (
            [] if value is None else self._expand(value)
        )
        self._scope.names[name] = _compact(pieces, line)

    def _command(self, node: Node) -> None:
        scope = self._scope
        words: list[Value] = []
        for child in node.children:
            if child.type == "variable_assignment":
                if not words:
                    # For this command alone, but nothing in its own words sees it.
                    continue
                words.extend(_fields(self._expand(child)))
            elif child.is_named and child.type not in ("comment", "file_redirect"):
                words.extend(_fields(self._expand(child)))
        if not words:
            return
        expanded = tuple(_word(value) for value in words)
        name = expanded[0].text
        if name in self._functions and self._depth < _MAX_DEPTH:
            self._depth += 1
            outer, scope.positional = scope.positional, words[1:]
            self._run(self._functions[name])
            scope.positional = outer
            self._depth -= 1
            return
        if name in ("source", "."):
            self.sourced.append(node.start_point.row + 1)
        nested = _nested(expanded)
        if nested is not None and self._depth < _MAX_DEPTH:
            self._depth += 1
            self._run_text(nested)
            self._depth -= 1
            return
        self.commands.append(Command(expanded, node.start_point.row + 1, node.end_point.row + 1))

    def _run_text(self, word: Word) -> None:
        """``bash -c TEXT`` and ``eval TEXT``: a script in a word."""
        inner = Script(word.text)
        self.commands.extend(
            replace(
                command,
                words=tuple(replace(w, line=word.line, unknown=w.unknown) for w in command.words),
                line=word.line or command.line,
                last_line=word.line or command.last_line,
            )
            for command in inner.commands
        )

    def _redirected(self, node: Node) -> None:
        body = node.child_by_field_name("body")
        heredoc = next((c for c in node.children if c.type == "heredoc_redirect"), None)
        if body is None:
            return
        if heredoc is not None and body.type == "command":
            words = [_word(v) for c in body.named_children for v in _fields(self._expand(c))]
            if words and words[0].text == "read":
                names = [w.text for w in words[1:] if w.text and not w.text.startswith("-")]
                if names:
                    self._scope.names[names[-1]] = _trimmed(self._heredoc(heredoc))
                return
        self._run(body)

    def _heredoc(self, redirect: Node) -> Value:
        start = next((c for c in redirect.children if c.type == "heredoc_start"), None)
        body = next((c for c in redirect.children if c.type == "heredoc_body"), None)
        if body is None:
            return []
        if start is not None and _text(start)[:1] in "'\"\\":
            return _literal(_text(body), body.start_point.row + 1, lambda text: text)
        return self._span(body, body.start_byte, body.end_byte, _HEREDOC)

    def _function(self, node: Node) -> None:
        name = node.child_by_field_name("name")
        body = node.child_by_field_name("body")
        if name is not None and body is not None:
            self._functions[_text(name)] = body

    def _branches(self, node: Node) -> None:
        """``if`` and ``case``: each branch on a copy; where they differ, the value is unknown."""
        if node.type == "case_statement":
            items = [c for c in node.named_children if c.type == "case_item"]
            exhaustive = any(_text(c).lstrip("(").startswith("*") for c in items)
            branches = [c.named_children[1:] for c in items]
        else:
            branches, body, exhaustive = [], [], False
            condition = node.child_by_field_name("condition")
            for child in node.named_children:
                if child.type in ("elif_clause", "else_clause"):
                    branches.append(child.named_children)
                    exhaustive = exhaustive or child.type == "else_clause"
                elif condition is None or child.id != condition.id:
                    body.append(child)
            branches.insert(0, body)
        self._alternatives(branches, exhaustive, node.start_point.row + 1)

    def _loop(self, node: Node) -> None:
        line = node.start_point.row + 1
        variable = node.child_by_field_name("variable")
        if variable is not None:
            name = _text(variable)
            why = f"${name} is a loop variable (line {line})"
            self._scope.names[name] = [Piece(f"${name}", line, unknown=why)]
        body = node.child_by_field_name("body")
        self._alternatives([[body] if body is not None else []], False, line)

    def _list(self, node: Node) -> None:
        left, *rest = node.named_children
        self._run(left)
        sometimes = left.type in ("test_command", "negated_command") or any(
            child.type == "||" for child in node.children
        )
        if sometimes:
            self._alternatives([list(rest)], False, node.start_point.row + 1)
        else:
            for child in rest:
                self._run(child)

    def _subshell(self, node: Node) -> None:
        outer, self._scope = self._scope, self._scope.branch()
        for child in node.named_children:
            self._run(child)
        self._scope = outer

    def _alternatives(self, branches: Iterable[list[Node]], exhaustive: bool, line: int) -> None:
        start = self._scope
        ends = [] if exhaustive else [start]
        for branch in branches:
            self._scope = start.branch()
            for statement in branch:
                self._run(statement)
            ends.append(self._scope)
        self._scope = start
        start.names |= _merged(ends, start, line)

    _STATEMENTS: ClassVar[dict[str, Callable[[Script, Node], None]]] = {
        "variable_assignment": _assignment,
        "command": _command,
        "redirected_statement": _redirected,
        "function_definition": _function,
        "if_statement": _branches,
        "case_statement": _branches,
        "for_statement": _loop,
        "c_style_for_statement": _loop,
        "while_statement": _loop,
        "list": _list,
        "subshell": _subshell,
        "comment": lambda self, node: None,
        "test_command": lambda self, node: None,
    }

    # Words.

    def _expand(self, node: Node, quoted: bool = False) -> Value:
        line = node.start_point.row + 1
        kind = node.type
        if kind == "string":
            inner = self._span(node, node.start_byte + 1, node.end_byte - 1, _DOUBLE)
            # "" and "$EMPTY" are words of their own; "$@" and "${EMPTY[@]}" need not be.
            listed = re.search(r"\$(@|\{\w+\[@\]|\{@)", _text(node))
            return inner or ([] if listed else [Piece("", line)])
        if kind == "raw_string":
            return _literal(_text(node)[1:-1], line, lambda text: text)
        if kind == "ansi_c_string":
            return _literal(codecs.decode(_text(node)[2:-1], "unicode_escape"), line, lambda t: t)
        if kind == "simple_expansion":
            return self._variable(_text(node)[1:], _text(node), line, quoted)
        if kind == "expansion":
            return self._expansion(node, quoted)
        if kind == "arithmetic_expansion":
            return self._arithmetic(node, line)
        if kind == "command_substitution":
            return self._substitution(node, quoted, line)
        if kind == "process_substitution":
            return [Piece(_text(node), line, unknown=f"{_text(node)} is the output of a command")]
        if kind in ("concatenation", "command_name", "variable_assignment", "word", "number"):
            return self._span(node, node.start_byte, node.end_byte, _UNQUOTED, quoted)
        return _literal(_text(node), line, _UNQUOTED)

    def _span(
        self,
        node: Node,
        start: int,
        end: int,
        unescape: Callable[[str], str],
        quoted: bool | None = None,
        splits: bool = False,
    ) -> Value:
        """The expansion of a stretch of ``node``: its children, and the text between them."""
        inside_quotes = unescape is _DOUBLE if quoted is None else quoted
        pieces: Value = []
        position, line = start, node.start_point.row + 1
        for child in node.named_children:
            if child.start_byte < start or child.type not in _EXPANDED:
                continue
            gap = self._bytes[position : child.start_byte].decode()
            gap_line = child.start_point.row + 1 - gap.count("\n")
            pieces += _literal(gap, gap_line, unescape, splits)
            pieces += self._expand(child, inside_quotes)
            position, line = child.end_byte, child.end_point.row + 1
        if position == start:
            line += self._bytes[node.start_byte : start].count(b"\n")
        return pieces + _literal(self._bytes[position:end].decode(), line, unescape, splits)

    def _variable(self, name: str, written: str, line: int, quoted: bool) -> Value:
        known = self._lookup(name)
        if known is None:
            why = f"{written} is not set in the script"
            return [Piece(written, line, splits=not quoted, unknown=why)]
        return [replace(piece, splits=not quoted) for piece in known]

    def _lookup(self, name: str) -> Value | None:
        """The value of a variable, or ``None`` where the script does not say."""
        positional = self._scope.positional
        if name in ("@", "*"):
            # The script's own arguments: nothing, when nobody gives any.
            return _joined(positional or [])
        if name.isdigit():
            if positional is None or name == "0":
                return None
            return positional[int(name) - 1] if int(name) <= len(positional) else []
        return self._scope.text(name)

    def _expansion(self, node: Node, quoted: bool) -> Value:
        line, written = node.start_point.row + 1, _text(node)
        if rest := re.fullmatch(r"\$\{@:(\d+)\}", written):
            given = self._scope.positional or []
            return [
                replace(piece, splits=not quoted)
                for piece in _joined(given[max(int(rest[1]) - 1, 0) :])
            ]
        match = re.match(r"\$\{(\w+|[@*])(?:\[([^\]]*)\])?(:?[-=+?])?", written)
        if match is None or (match[3] is None and match[0] + "}" != written):
            why = f"{written} is an expansion that only a shell computes"
            return [Piece(written, line, splits=not quoted, unknown=why)]
        name, index, action = match.groups()
        value = self._element(name, index) if index is not None else self._lookup(name)
        if value is None and index in ("@", "*") and action is None:
            why = f"{written} is not set in the script"
            return [Piece(written, line, splits=not quoted, unknown=why)]
        if action is None:
            return self._given(value, written, line, quoted)
        empty = value is not None and not any(p.text or p.unknown for p in value)
        missing = value is None or (action.startswith(":") and empty)
        if action.endswith("+"):
            return [] if missing else self._default(node, match.end(), quoted)
        if action.endswith("?") or not missing:
            return self._given(value, written, line, quoted)
        default = self._default(node, match.end(), quoted)
        if action.endswith("="):
            self._scope.names[name] = _compact(default, line)
        return default

    def _given(self, value: Value | None, written: str, line: int, quoted: bool) -> Value:
        if value is None:
            why = f"{written} is not set in the script"
            return [Piece(written, line, splits=not quoted, unknown=why)]
        return [replace(piece, splits=not quoted) for piece in value]

    def _element(self, name: str, index: str) -> Value | None:
        if self._scope.get(name) is None:
            return None
        elements = self._scope.elements(name)
        if index in ("@", "*"):
            return _joined(elements)
        if index.isdigit() and int(index) < len(elements):
            return elements[int(index)]
        return None

    def _default(self, node: Node, offset: int, quoted: bool) -> Value:
        start = node.start_byte + len(_text(node)[:offset].encode())
        unescape = _DOUBLE if quoted else _UNQUOTED
        pieces = self._span(node, start, node.end_byte - 1, unescape, quoted, splits=not quoted)
        return pieces or [Piece("", node.start_point.row + 1, splits=not quoted)]

    def _arithmetic(self, node: Node, line: int) -> Value:
        try:
            numbers = [self._number(child) for child in node.named_children]
            (number,) = numbers
        except (ArithmeticError, KeyError, ValueError):
            why = f"{_text(node)} is arithmetic on what is not known"
            return [Piece(_text(node), line, unknown=why)]
        return [Piece(str(number), line)]

    def _number(self, node: Node) -> int:
        if node.type in ("number", "word"):
            return int(_text(node))
        if node.type in ("variable_name", "simple_expansion", "expansion"):
            value = (
                self._lookup(_text(node))
                if node.type == "variable_name"
                else self._expand(node, quoted=True)
            )
            if value is None or any(piece.unknown for piece in value):
                raise ValueError
            return int("".join(piece.text for piece in value))
        if node.type == "parenthesized_expression":
            (inner,) = node.named_children
            return self._number(inner)
        if node.type == "binary_expression":
            left, right = node.named_children
            sign = next(c.type for c in node.children if not c.is_named)
            return _ARITHMETIC[sign](self._number(left), self._number(right))
        raise ValueError

    def _substitution(self, node: Node, quoted: bool, line: int) -> Value:
        inner = node.named_children
        if len(inner) == 1 and inner[0].type == "redirected_statement":
            # $(cat <<EOF ... EOF) is a here-document, and runs nothing that matters.
            body = inner[0].child_by_field_name("body")
            heredoc = next((c for c in inner[0].children if c.type == "heredoc_redirect"), None)
            if body is not None and _text(body) == "cat" and heredoc is not None:
                text = _trimmed(self._heredoc(heredoc))
                return [replace(p, splits=not quoted) for p in text]
        why = f"{_text(node)} is the output of a command, which is not run"
        return [Piece(_text(node), line, splits=False, unknown=why)]


_EXPANDED = frozenset(
    {
        "string",
        "raw_string",
        "ansi_c_string",
        "simple_expansion",
        "expansion",
        "arithmetic_expansion",
        "command_substitution",
        "process_substitution",
        "concatenation",
        "variable_assignment",
    }
)
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}


def _UNQUOTED(text: str) -> str:
    return re.sub(r"\\(.|\n)", lambda m: "" if m[1] == "\n" else m[1], text)


def _DOUBLE(text: str) -> str:
    return re.sub(r'\\([$`"\\\n])', lambda m: "" if m[1] == "\n" else m[1], text)


def _HEREDOC(text: str) -> str:
    return re.sub(r"\\([$`\\\n])", lambda m: "" if m[1] == "\n" else m[1], text)


def _text(node: Node) -> str:
    return (node.text or b"").decode()


def _literal(text: str, line: int, unescape: Callable[[str], str], splits: bool = False) -> Value:
    """One piece per line, so that every word knows its own."""
    lines = text.splitlines(keepends=True)
    return [Piece(unescape(part), line + number, splits) for number, part in enumerate(lines)]


def _compact(pieces: Value, line: int) -> Value:
    """What a variable keeps: one piece, unless a part is unknown or stands on a line of its own."""
    if any(piece.unknown or piece.boundary or "\n" in piece.text for piece in pieces):
        return [replace(piece, splits=False) for piece in pieces]
    return [Piece("".join(piece.text for piece in pieces), line)] if pieces else []


def _trimmed(pieces: Value) -> Value:
    """Without the newline at the end, which ``read`` and ``$(...)`` take off."""
    if not pieces or pieces[-1].unknown:
        return pieces
    return [*pieces[:-1], replace(pieces[-1], text=pieces[-1].text.rstrip("\n"))]


def _joined(elements: list[Value]) -> Value:
    joined: Value = []
    for number, element in enumerate(elements):
        if number:
            joined.append(Piece("", element[0].line if element else 0, boundary=True))
        joined += [replace(piece, splits=False) for piece in element]
    return joined


def _fields(pieces: Value) -> Iterator[Value]:
    """Field splitting: what one written word becomes."""
    current: Value = []
    for piece in pieces:
        if piece.boundary:
            if current:
                yield current
            current = []
        elif not piece.splits or piece.unknown:
            current.append(piece)
        else:
            for part in re.split(r"(\s+)", piece.text):
                if part.isspace():
                    if current:
                        yield current
                    current = []
                elif part:
                    current.append(replace(piece, text=part, splits=False))
    if current:
        yield current


def _word(pieces: Value) -> Word:
    return Word(
        "".join(piece.text for piece in pieces),
        pieces[0].line,
        tuple(dict.fromkeys(piece.unknown for piece in pieces if piece.unknown)),
    )


def _nested(words: tuple[Word, ...]) -> Word | None:
    """The script inside ``bash -c SCRIPT`` or ``eval SCRIPT``, also behind a launcher."""
    texts = [word.text for word in words]
    if texts[0] == "eval" and len(words) > 1:
        unknown = tuple(reason for word in words[1:] for reason in word.unknown)
        return Word(" ".join(texts[1:]), words[1].line, unknown)
    for at in range(len(texts) - 2):
        if re.fullmatch(r"(.*/)?(ba|z|da)?sh", texts[at]) and re.fullmatch(r"-\w*c", texts[at + 1]):
            return words[at + 2]
    return None


def _merged(ends: list[_Scope], start: _Scope, line: int) -> dict[str, Value | _Array]:
    """What each name is after branches, of which one ran: unknown where they differ."""
    merged: dict[str, Value | _Array] = {}
    for name in {name for end in ends if end is not start for name in end.names}:
        values = [end.get(name) for end in ends]
        if all(value == values[0] for value in values[1:]):
            if values[0] is not None:
                merged[name] = values[0]
            continue
        if any(isinstance(value, _Array) for value in values):
            why = f"${{{name}[@]}} is set in a branch (line {line}), which is not decided here"
            common = _common_prefix([end.elements(name) for end in ends])
            unknown = [Piece(f"${{{name}[@]}}", line, unknown=why)]
            merged[name] = _Array([*common, unknown])
        else:
            why = f"${name} is set in a branch (line {line}), which is not decided here"
            merged[name] = [Piece(f"${name}", line, unknown=why)]
    return merged


def _common_prefix(arrays: list[list[Value]]) -> list[Value]:
    common = []
    for elements in zip(*arrays, strict=False):
        if any(element != elements[0] for element in elements[1:]):
            break
        common.append(elements[0])
    return common


def _refuse_broken(root: Node, lines: list[str]) -> None:
    """Say where a shell would stop reading: at what is no syntax, or is opened and never closed."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node.is_missing or node.is_error:
            opener = node.parent if node.is_missing and node.parent is not None else node
            line = opener.start_point.row + 1
            what = (
                f"what begins here has no closing {node.type}"
                if node.is_missing
                else ("a placeholder, or a quote or bracket that is never closed")
            )
            raise AuditError(
                f"a shell would not read this script past line {line} ({what}): "
                f"{lines[line - 1].strip()[:60]}"
            )
        stack.extend(reversed([child for child in node.children if child.has_error]))
