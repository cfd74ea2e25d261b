"""Replacing a host's functions in place: what the adapters share, and the only user of wrapt.

An adapter declares a table of ``Hook`` rows. Rows are checked by signature before anything is
replaced, all rows of a module are replaced or none, and whatever had imported a function by name
before is swept. ``import klplug`` does not load this module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import wrapt

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# (original, instance or None, args, kwargs) -> result, as wrapt's wrappers are called.
Wrapper = Callable[[Call, Any, Args, Kwargs], Any]

_MARK = "__klplug__"


@dataclass(frozen=True)
class Hook:
    """One function of the host to replace.

    Attributes:
        module: dotted name of the module that defines it.
        name: attribute path in the module, ``function`` or ``Class.method``.
        parameters: names that its signature must have.
        wrapper: called in its place with the original.
        supplies: tensors that reach klplug through it.
        otherwise: what to replace in its module where a release does not have this one.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    wrapper: Wrapper
    supplies: tuple[str, ...] = ()
    otherwise: Hook | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class HookError(RuntimeError):
    """A function of the host is not where, or not what, klplug expects."""


@dataclass
class Patch:
    """The hooks of one host, applied module by module as the host imports them."""

    host: str
    tested: str
    hooks: Sequence[Hook]
    applied: dict[str, int] = field(default_factory=dict)
    _undo: list[tuple[Any, str, Any]] = field(default_factory=list)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(hook.module for hook in self.hooks))

    def check(self, required: Iterable[str] = ()) -> None:
        """Import every hooked module and check every row; nothing is replaced.

        Args:
            required: tensors that the formulation needs (``KLSpec.requires``).

        Raises:
            HookError: names the host, its version, the path, what was expected and what is there;
                or the tensors that no hook supplies.
        """
        supplied = {name for hook in self.hooks for name in hook.supplies}
        missing = [name for name in required if name not in supplied]
        if missing:
            raise HookError(f"on {self.host} nothing supplies {', '.join(missing)} to klplug")
        for name in self.modules:
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name and not name.startswith(error.name):
                    raise  # a dependency of the host is missing, which is another story
                raise self._error(name, "a module", "no such module") from error
            self._fitting(module)

    def apply(self) -> None:
        """Check and replace in the modules loaded so far, and in the others as they load."""
        for name in self.modules:
            wrapt.register_post_import_hook(self.apply_to, name)

    def apply_to(self, module: ModuleType) -> None:
        """Replace all hooked functions of one module, or none and raise ``HookError``."""
        if module.__name__ in self.applied:
            return
        hooks = self._fitting(module)
        self.applied[module.__name__] = sum(1 + self._replace(module, hook) for hook in hooks)

    def restore(self) -> None:
        """Put every original back."""
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()
        self.applied.clear()

    def status(self) -> dict[str, bool]:
        """For every hooked path, whether the function that runs there is klplug's."""
        report = {}
        for name in self.modules:
            module = sys.modules.get(name)
            if module is None:
                report.update({h.path: False for h in self.hooks if h.module == name})
                continue
            for hook in self._fitting(module):
                report[hook.path] = hasattr(_resolved(module, hook.name)[2], _MARK)
        return report

    def _fitting(self, module: ModuleType) -> list[Hook]:
        """The rows of one module, each in the form that this release has."""
        return [self._fit(module, hook) for hook in self.hooks if hook.module == module.__name__]

    def _fit(self, module: ModuleType, hook: Hook) -> Hook:
        fault = _fault(module, hook)
        if fault is None:
            return hook
        if hook.otherwise is not None:
            return self._fit(module, hook.otherwise)
        raise self._error(
            hook.path, f"a function with parameters {', '.join(hook.parameters)}", fault
        )

    def _error(self, path: str, expected: str, found: str) -> HookError:
        try:
            version = importlib.metadata.version(self.host)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        return HookError(
            f"klplug can't hook into {self.host} {version}: at {path} it expects {expected}, and "
            f"found {found}. Tested with {self.host} {self.tested}. Nothing was replaced, and "
            "this run must not go on with the host's own KL."
        )

    def _replace(self, module: ModuleType, hook: Hook) -> int:
        owner, name, original = _resolved(module, hook.name)
        replacement = _wrapped(original, hook.wrapper, is_method="." in hook.name)
        self._set(owner, name, original, replacement)
        if "." in hook.name:
            return 0
        # By-name imports made before now: `from module import function`.
        package = module.__name__.partition(".")[0]
        stale = [
            (other, attribute)
            for other_name, other in list(sys.modules.items())
            if other is not module and other_name.partition(".")[0] == package
            for attribute, value in list(vars(other).items())
            if value is original
        ]
        for other, attribute in stale:
            self._set(other, attribute, original, replacement)
        return len(stale)

    def _set(self, owner: Any, name: str, original: Any, replacement: Any) -> None:
        self._undo.append((owner, name, original))
        setattr(owner, name, replacement)


def bound(original: Call, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """What a wrapped function was called with, by parameter name, defaults filled in."""
    found = inspect.signature(original).bind(*args, **kwargs)
    found.apply_defaults()
    return found.arguments


def _fault(module: ModuleType, hook: Hook) -> str | None:
    """What is found in place of the hooked function, where it is not what is expected."""
    try:
        found = _resolved(module, hook.name)[2]
    except AttributeError:
        return "no such name"
    if not callable(found):
        return f"a {type(found).__name__}"
    have = tuple(inspect.signature(found).parameters)
    missing = [name for name in hook.parameters if name not in have]
    return f"one without {', '.join(missing)}: ({', '.join(have)})" if missing else None


def _resolved(module: ModuleType, path: str) -> tuple[Any, str, Any]:
    owner: Any = module
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def _wrapped(original: Callable[..., Any], wrapper: Wrapper, is_method: bool) -> Callable[..., Any]:
    # A plain function, not wrapt's proxy: hosts pickle these by reference into their workers.
    if is_method:

        @functools.wraps(original)
        def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return wrapper(functools.partial(original, self), self, args, kwargs)

        replacement: Callable[..., Any] = method
    else:

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, None, args, kwargs)

        replacement = function
    # A plain value: Ray copies a function's attributes onto functions that it pickles by value, and
    # the original itself, which no longer has a name to be found by, would be dragged along.
    setattr(replacement, _MARK, True)
    return replacement
