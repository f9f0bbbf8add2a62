"""Renders a conversation with a model's chat template (Jinja), in a sandbox with bounded work.

Templates come from the model's files or from the caller's own argument, never from inside a
message: message text is data, and `{{ }}` in it stays as it is. The sandbox denies access to
Python's internals; beyond it, loop passes, range sizes, repetition and output length are bounded,
so a hostile template ends in an error instead of running for ever. Filters and concatenation can
still build one huge string: load templates only from models you trust. `strftime_now` makes a
prompt depend on the date, so that one day's prompts share no prefix with the next day's.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

from jaxinfer.errors import InvalidRequestError, JaxInferError, TokenizerError

MAX_TEMPLATE_CHARS = 1_000_000
MAX_OUTPUT_CHARS = 16_000_000
MAX_STEPS = 500_000
"""Loop passes, calls of macros and elements of ranges in one rendering: about two seconds."""
MAX_MESSAGES = 2_048
ROLES = ("system", "user", "assistant", "tool", "developer")
_RESERVED = frozenset(
    [
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "range"),
        *("bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"),
    ]
)
_MAX_MESSAGE_CHARS = 500


class _TemplateRefusal(Exception):
    """The template itself called raise_exception: the conversation does not suit it."""


class _WorkBound(Exception):
    """The template did more work than one rendering may."""


class _CountSteps(jinja2.visitor.NodeTransformer):
    """Puts a call of `environment.count_step()` at the start of each loop and macro body."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = jinja2.nodes.EnvironmentAttribute("count_step")
        call = jinja2.nodes.Call(tick, [], [], None, None)
        node.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks training text; here it renders its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox plus a work budget for the rendering under way in this thread."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self._work = threading.local()
        self.filters["tojson"] = _tojson
        self.globals["range"] = self._range
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def start(self) -> None:
        self._work.steps = 0

    def count_step(self, steps: int = 1) -> None:
        self._work.steps = getattr(self._work, "steps", 0) + steps
        if self._work.steps > MAX_STEPS:
            raise _WorkBound(f"more than {MAX_STEPS} loop passes")

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if max(numbers.start, numbers.stop, -numbers.start, -numbers.stop) > MAX_STEPS:
            raise _WorkBound(f"range({', '.join(map(str, bounds))})")
        self.count_step(len(numbers))
        return numbers

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _CountSteps().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Bounds the operators that make much out of little."""
        numeric = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "*" and not numeric:
            count, items = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and count * len(str(items)) > MAX_OUTPUT_CHARS:
                raise _WorkBound("a repetition of that size")
        elif operator == "**" and (not numeric or abs(left) > 2**32 or abs(right) > 64):
            raise _WorkBound("a power of that size")
        elif operator == "%" and isinstance(left, str):
            raise _WorkBound("the % string format; use ~ or the format filter")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise _TemplateRefusal(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


_ENVIRONMENT = _Environment()


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text.
        special_texts: `bos_token`, `eos_token`, … as the template may print them.
        path: the model's file, for messages.
        request: whether `source` came with a call, so that a fault in it is the caller's.

    Raises:
        TokenizerError: the model's template does not compile or runs without bound.
        InvalidRequestError: the same for a caller's template.
    """

    def __init__(
        self,
        source: str,
        special_texts: Mapping[str, str],
        path: object = None,
        *,
        request: bool = False,
    ):
        self.source = source
        self._special_texts = dict(special_texts)
        self._path = path
        self._request = request
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
            raise self._fault(f"must be a string of at most {MAX_TEMPLATE_CHARS} characters")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise self._fault(
                f"is not valid Jinja: {error.message} (line {error.lineno})"
            ) from error
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._fault(f"cannot be compiled: {error}") from error
        self._probe()

    def _fault(self, problem: str) -> JaxInferError:
        if self._request:
            return InvalidRequestError(f"chat_template {problem}", param="chat_template")
        where = f"{self._path}: " if self._path is not None else ""
        return TokenizerError(f"{where}the chat template {problem}", path=self._path)

    def _probe(self) -> None:
        """Renders one message, so that a template without end is found here, not in a request.

        Only too much work counts: a template may well refuse this conversation.
        """
        try:
            self._run(
                {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
            )
        except _WorkBound as error:
            raise self._fault(f"does too much work: {error}") from error
        except InvalidRequestError:
            return

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one string.

        Args:
            messages: `{"role": …, "content": str or [{"type": "text", "text": …}, …]}`.
            add_generation_prompt: end with the opening of an assistant message.
            continue_final_message: end inside the last message, for the model to go on with it.
            tools: JSON schemas of functions, for templates that describe them.
            variables: more names for the template (`enable_thinking`, …).

        Raises:
            InvalidRequestError: the messages are malformed, or the template refuses them.
        """
        checked = check_messages(messages)
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other: one opens a "
                "new message, the other goes on with the last; set one of them to False",
                param="continue_final_message",
            )
        _check_variables(variables)
        _check_tools(tools)
        names = {
            **self._special_texts,
            **(variables or {}),
            "messages": checked,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._run(names)
        except _WorkBound as error:
            raise InvalidRequestError(
                f"the chat template does too much work on these messages: {error}", param="messages"
            ) from error
        return _cut_after_last(text, checked[-1]) if continue_final_message else text

    def _run(self, names: Mapping[str, Any]) -> str:
        _ENVIRONMENT.start()
        parts, size = [], 0
        try:
            for part in self._template.generate(**names):
                size += len(part)
                if size > MAX_OUTPUT_CHARS:
                    raise _WorkBound(f"more than {MAX_OUTPUT_CHARS} characters of output")
                parts.append(part)
        except _TemplateRefusal as error:
            raise InvalidRequestError(
                f"the chat template refuses these messages: {str(error)[:_MAX_MESSAGE_CHARS]}",
                param="messages",
            ) from error
        except _WorkBound:
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._failed(error) from error
        except (AttributeError, RecursionError, MemoryError) as error:
            raise self._failed(error) from error
        return "".join(parts)

    @staticmethod
    def _failed(error: BaseException) -> InvalidRequestError:
        return InvalidRequestError(
            f"the chat template failed on these messages: {str(error)[:_MAX_MESSAGE_CHARS]}",
            param="messages",
        )


def check_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of the messages with text parts joined; InvalidRequestError names a bad field."""
    if not isinstance(messages, (list, tuple)):
        raise InvalidRequestError(
            f"messages must be a list of dictionaries; got {type(messages).__name__}",
            param="messages",
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages must have 1..{MAX_MESSAGES} entries; got {len(messages)}", param="messages"
        )
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(where, message, "a dictionary with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": ""}
    return {**message, "content": _check_content(content, f"{where}.content")}


def _check_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        raise _bad(where, content, 'a string or a list of {"type": "text", "text": …}')
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise _bad(f"{where}[{i}]", part, '{"type": "text", "text": …} (text only)')
        if not isinstance(part.get("text"), str):
            raise _bad(f"{where}[{i}].text", part.get("text"), "a string")
    return "".join(part["text"] for part in content)


def _bad(where: str, value: object, allowed: str) -> InvalidRequestError:
    shown = f"{value!r:.100}"
    return InvalidRequestError(f"{where} must be {allowed}; got {shown}", param=where, value=value)


def _check_variables(variables: object) -> None:
    if variables is None:
        return
    if not isinstance(variables, Mapping) or not all(isinstance(k, str) for k in variables):
        raise _bad("chat_template_kwargs", variables, "a dictionary with string keys")
    for name in variables:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequestError(
                f"chat_template_kwargs: {name!r} is reserved or not a name; only variables of the "
                f"template itself may be set",
                param=f"chat_template_kwargs.{name}",
            )


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        raise _bad("tools", tools, "a list of dictionaries")


def _cut_after_last(text: str, last: Mapping[str, Any]) -> str:
    """`text` up to the end of the last message's content: the model goes on from there."""
    content = last["content"].strip()
    at = text.rfind(content)
    if at < 0 or not content:
        raise InvalidRequestError(
            "continue_final_message: the template does not print the last message's content as it "
            "is; put the text to continue in the prompt instead",
            param="continue_final_message",
        )
    end = at + len(content)
    trailing = last["content"][len(last["content"].rstrip()) :]
    return text[:end] + (trailing if text.startswith(trailing, end) else "")
