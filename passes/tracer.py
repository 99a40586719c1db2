"""Running one forward on traced values."""

from __future__ import annotations

import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, is_grad_enabled, nn

from .branches import Answers, FailsError, Questions, RaisesError, follows_ours
from .callables import function_of, signature_of
from .calls import Argument, Call, Constant, Forward, Items, Value
from .choices import truth
from .errors import UntraceableError, in_short
from .factories import Factories, as_dtype
from .foreign import calls_become
from .lent import Lent
from .look_alike import stateless_forward
from .messages import Numbers
from .nodes import new_node, takes_no_argument
from .outside import Kept
from .reads import MISSING, PLAIN, TENSOR, Names, Read, as_python, copy_of, fingerprint, inherited
from .recording import Recorder
from .records import fields_of
from .set_attributes import OWN, SetAttributes, is_set_by, refuse_shared
from .source import Caught, caught, is_tried, nested, raised_by
from .splice import Sizes, parts_of
from .tensors import names_a_kind, sure_tensor
from .traced import StoredTensor, Traced, TracedAttribute, TracedValue
from .watchers import watches
from .with_blocks import in_with

TRACED = (TracedValue, TracedAttribute, StoredTensor)


class OwnerTracer(fx.Tracer):
    """Runs one method of a module on traced values; children are leaves.

    After `run`, `reads` holds (module path, attribute, fingerprint) of everything that the method read, and `typed` the
    arguments whose Python type it asked for.
    """

    def __init__(
        self,
        names: Names,
        recorder: Recorder,
        module: nn.Module,
        forward: Forward,
        axes: tuple[int, ...],
        answers: Answers,
        counted: bool,
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # any number of them
        self.names, self.recorder, self.path, self.root = names, recorder, forward.path, module
        self.forward = forward
        self.reads: dict[Read, None] = {}
        self.typed: set[str] = set()
        self.stored: dict[str, StoredTensor] = {}
        self.containers: dict[fx.Node, type] = {}
        self.given: list[tuple[Any, int]] = []  # the lists that the method was called with, and their lengths
        self.new_modules: dict[int, nn.Module] = {}  # which the forward makes, and may set attributes of
        self.sizes, self.questions = Sizes(module, axes), Questions(answers)
        self.counted = counted  # whether the length of a size is the number of axes of this trace
        self.refused = ""
        self.raised: RaisesError | None = None
        self.set, self.lent, self.numbers = SetAttributes(module), Lent(), Numbers()
        self.kept = Kept(lambda module: names.module("", module) is not None)
        self.handed: dict[int, tuple[Any, Any]] = {}  # containers that the module holds, and the copies handed out
        self.loose: dict[int, tuple[Tensor, Tensor]] = {}  # other tensors than parameters and buffers, and copies
        self.trying: dict[CodeType, Caught] = {}  # where the code catches errors, and goes on
        self.own: set[CodeType] = set()  # the code that the method may run
        self.graph = fx.Graph()

    def run(self) -> fx.Graph:
        """The graph of the method.

        Raises:
            UntraceableError: it can't be written down as a graph.
        """
        functions = self.forward.functions
        for function in functions:
            self.kept.keep_surroundings(function)
            self.own |= {*nested(function.__code__)}
        self.trying |= {code: ranges for code in self.own if (ranges := caught(code))}
        self.kept.keep(self.root)
        before = sys.exception()
        try:
            with (
                torch.enable_grad(),
                self.recorder.listening(self),
                Factories(self),
                calls_become(self.called_with_a_value, functions),
            ):
                args, kwargs = self.arguments(self.forward.signature, self.forward.call)
                result = self.forward.function(self.root, *args, **kwargs)
                others = [result, *(items for items, _ in self.given)]
                for name, value in self.set.values():
                    refuse_shared(name, value, others)
                    self.create_node("call_function", setattr, (OWN, name, self.create_arg(value)), {})
                self.create_node("output", "output", (self.create_arg(result),), {})
                if self.lent.holds((result, list(self.set.values()))):
                    self.refuse(FILLS)
        except UntraceableError:
            raise
        except Exception as error:  # the user's own code ran on traced values: it may raise anything
            told = in_short(self.numbers.named(error))
            why = f"its forward does not trace ({told})"
            own = raised_by(error, functions) and not follows_ours(error, before)
            raise (RaisesError(why, error) if own else FailsError(why, told, self.questions)) from error
        finally:
            self.set.put_back()
            changed = self.kept.put_back()
            drew = self.recorder.dice_rolled()
        if self.refused:
            raise UntraceableError(f"{self.refused}; its forward goes on where that fails")
        changed += [value for value, copy in self.loose.values() if copy._version]
        if changed:
            raise UntraceableError(f"its forward changes a {type(changed[0]).__name__} that outlives the call")
        if any(len(items) != length for items, length in self.given):
            raise UntraceableError("its forward changes a list that it is given")
        for held, copied in self.handed.values():
            self.check_unchanged(held, copied)
        if drew:
            raise UntraceableError(
                "its forward draws random numbers that a graph can't hold (Python's, NumPy's or torch's)"
            )
        return self.graph

    def refuse(self, reason: str) -> NoReturn:
        """End the trace, also where the forward catches the error."""
        self.refused = self.refused or reason
        raise UntraceableError(reason)

    def arguments(self, signature: inspect.Signature, call: Call) -> tuple[list[Any], dict[str, Any]]:
        """The method's arguments: a placeholder for each value, the constant itself elsewhere."""
        by_name = dict(call.arguments)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in list(signature.parameters.values())[1:]:
            name = parameter.name
            if parameter.kind is parameter.VAR_POSITIONAL:
                gathered = call.star[1] if call.star else ()
                args += [self.argument(f"{name}_{i}", item) for i, item in enumerate(gathered)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords = call.stars[1] if call.stars else ()
                kwargs |= {key: self.argument(f"{name}_{key}", item) for key, item in keywords}
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = self.argument(name, by_name[name])
            else:
                args.append(self.argument(name, by_name[name]))
        return args, kwargs

    def argument(self, name: str, argument: Argument) -> Any:
        """What the method gets for one argument."""
        if isinstance(argument, Constant):
            if type(argument.value) not in (list, dict, set):
                return argument.value
            own = type(argument.value)(argument.value)  # a default list belongs to the user: it must stay as it is
            self.given.append((own, len(own)))
            return own
        proxy = self.create_proxy("placeholder", name, (), {})
        if isinstance(argument, Value):
            self.containers[proxy.node] = argument.container
            return proxy
        return self.unpacked(proxy, argument)

    def unpacked(self, whole: fx.Proxy, argument: Items) -> Any:
        """A list, tuple or dict that the method gets: constants as they are, the other items taken out of it."""

        def item(key: Any, inner: Argument) -> Any:
            if isinstance(inner, Constant):
                return inner.value
            taken = self.create_proxy("call_function", operator.getitem, (whole, key), {})
            return self.unpacked(taken, inner) if isinstance(inner, Items) else taken

        items = {key: item(key, inner) for key, inner in argument.items}
        given = items if argument.container is dict else argument.container(items.values())
        self.given.append((given, len(items)))
        return given

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    def is_instance(self, value: Any, classes: Any) -> bool | None:
        """What isinstance() answers to the method: for a traced argument, by what the caller passes."""
        if type(value) is StoredTensor:
            return isinstance(value.stored, classes)
        if not isinstance(value, Traced):
            return None
        answer = issubclass(self.python_type(value), classes)
        if not answer and value.node not in self.containers and names_a_kind(classes):
            self.refuse("its forward asks which kind of tensor a computed value is")
        return answer

    def python_type(self, value: Traced) -> type:
        """The Python type that a value has for the method: that of what the caller passes, or of a computed tensor."""
        if type(value) is StoredTensor:
            return type(value.stored)
        node = value.node
        arguments = {node} if node in self.containers else sure_tensor(node, self.root, self.containers)
        if arguments is None:
            self.refuse("its forward asks for the Python type of a computed value")
        self.typed |= {str(argument.target) for argument in arguments}
        return self.containers.get(node, Tensor)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> fx.Proxy:
        if kind == "call_method" or str(getattr(target, "__module__", "")).split(".")[0] == "torch":
            args, kwargs = tuple(map(as_dtype, args)), {key: as_dtype(value) for key, value in kwargs.items()}
        own_args = tuple(map(self.create_arg, args))
        own_kwargs = {key: self.create_arg(value) for key, value in kwargs.items()}
        return (proxy_factory_fn or self.proxy)(self.create_node(kind, target, own_args, own_kwargs, name, type_expr))

    def create_arg(self, a: Any) -> Any:
        kind = type(a)  # most arguments are these: fx asks much before it finds that out
        if kind in TRACED:
            return a.node
        if kind in PLAIN:
            return a
        if kind is tuple or kind is list:
            return kind(map(self.create_arg, a))
        if isinstance(a, Tensor):
            return self.tensor(a).node
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, nn.Module):
            raise UntraceableError("its forward passes a module as an argument")
        made = fields_of(a)
        if made is not None:
            return self.create_node(
                "call_function", kind, (), {name: self.create_arg(each) for name, each in made.items()}
            )
        return super().create_arg(as_python(a))

    def tensor(self, tensor: Tensor) -> StoredTensor:
        """A parameter or buffer as a traced value."""
        path = self.names.tensor(self.path, tensor)
        if path is None:
            raise UntraceableError("its forward uses a tensor that is no parameter or buffer of its own")
        if path not in self.stored:
            self.stored[path] = StoredTensor(self.create_node("get_attr", path, (), {}), self, tensor)
        return self.stored[path]

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        if not is_grad_enabled():
            raise UntraceableError("its forward switches gradients off, which a graph can't hold")
        if self.trying and kind.startswith("call") and target not in _SAFE and is_tried(sys._getframe(1), self.trying):
            self.refuse("its forward goes on where a call fails, which a graph can't hold")
        if kind.startswith("call") and (entered := in_with(sys._getframe(1), OwnerTracer.run.__code__, self.own)):
            self.refuse(f"its forward enters a `with` block (in `{entered}`), which a graph can't hold")
        return new_node(self.graph, kind, target, args, kwargs, name, type_expr)

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module call becomes a node."""
        path = self.names.module(self.path, module)
        if path is None:
            is_new = id(module) in self.new_modules
            forward = stateless_forward(module, is_new) if self.names.module("", module) is None else None
            if forward is None:
                raise UntraceableError(f"its forward calls a {type(module).__name__} that is not its child")
            return forward(module, *args, **kwargs)
        call = type(module).__call__
        if call is not nn.Module.__call__ and not str(call.__module__).startswith("torch."):
            raise UntraceableError(f"its forward calls {path}, whose class has a `__call__` of its own")
        if not vars(module)["_forward_pre_hooks"]:
            signature = signature_of(function_of(module, "forward"))
            if signature is not None:
                signature.bind(module, *args, **kwargs)  # a forward may try a call, and go on with the TypeError
        if not self.lent.lend(module, (*args, *kwargs.values()), {id(items) for items, _ in self.given}):
            self.refuse(FILLS)
        if self.set.names and watches(module, self.root):
            self.refuse(f"its forward sets attributes, and calls {path}, which may look at them meanwhile")
        result, known = self.create_proxy("call_module", path, args, kwargs), self.forward.returns.get(path)
        if isinstance(known, Constant):
            return known.value
        return self.unpacked(result, known) if isinstance(known, Items) else result

    def made(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor from nothing, or what a function of another library makes of a value, becomes a node."""
        return self.create_proxy("call_function", factory, args, kwargs)

    def called_with_a_value(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a function that is not torch's becomes a node, but for a length that this trace knows."""
        if function is len:
            value = args[0]
            count = len(value) if type(value) is StoredTensor else parts_of(value.node, surely=True)
            if count is None and self.counted:
                count = self.sizes.length(value.node)
            if count is not None:
                return count
        return self.made(function, args, kwargs)

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Note a read; parameters and buffers come back as traced values."""
        where = self.names.module(self.path, module)
        if where is None:
            if name == "training" and self.names.module("", module) is not None:
                self.refuse(f"its forward asks for the mode of a {type(module).__name__} that is not its child")
            if self.names.module("", module) is not None and is_set_by(module, name, value):
                self.refuse(f"its forward reads the attribute `{name}`, which the forward of another module sets")
            return value
        if not where and name in self.set:
            return value
        if where and is_set_by(module, name, value):
            self.refuse(f"its forward reads the attribute `{name}` of {where}, which the forward of that sets")
        self.kept.keep(module)
        if isinstance(value, Tensor) and self.names.tensor(self.path, value) is not None:
            self.reads[where, name, TENSOR] = None
            return self.tensor(value)
        self.reads[where, name, fingerprint(value, self.names, self.path)] = None
        if isinstance(value, Tensor):
            return self.loose.setdefault(id(value), (value, copy_of(value)))[1]
        if type(value) in (dict, list, set):
            return self.handed.setdefault(id(value), (value, type(value)(value)))[1]
        return value

    def wrote(self, module: nn.Module, name: str, value: Any) -> None:
        """Only attributes of the module itself hold what its forward sets."""
        was_read = type(value) in PLAIN and ("", name, fingerprint(value)) in self.reads
        if module is not self.root or not self.set.take(name, value, was_read):
            self.refuse(f"its forward sets the attribute `{name}`, which a graph can't hold")

    def asked_for_shape(self, path: str, tensor: Tensor) -> None:
        """Note that the method asked for the shape of a parameter or buffer, and may go by it."""
        where, _, name = path.rpartition(".")
        self.reads[where, name, fingerprint(tensor, self.names, self.path)] = None

    def read_inherited(self, module: nn.Module, name: str, value: Any) -> None:
        """Note a read of a class's attribute: plain data by its value, the rest as long as no instance overrides it."""
        where = self.names.module(self.path, module)
        self.kept.keep(value)
        if where is not None:
            self.reads[where, name, inherited(value, self.names, self.path)] = None

    def read_all(self, module: nn.Module) -> None:
        """Note a look at all attributes."""
        self.set.looked_at |= module is self.root

    def read_missing(self, module: nn.Module, name: str) -> None:
        """Note that there was nothing to read."""
        where = self.names.module(self.path, module)
        if where is not None:
            self.reads[where, name, MISSING] = None

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node
        answer = self.questions.answer(value, lambda: self.create_node("call_function", truth, (value,), {}))
        return self.refuse("its forward branches on traced values again and again") if answer is None else answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value: Any = obj
        node = obj.node
        parts = parts_of(node)
        if parts is not None:
            return (value[index] for index in range(parts))
        items = self.sizes.run_over(node, self.proxy)
        if items is None:
            self.refuse("its forward runs over the items of a traced value")
        return iter(items)

    def check_unchanged(self, held: Any, copied: Any) -> None:
        """A method may put values that come from parameters alone into a dict: it computes them again at every call."""
        if isinstance(held, dict):
            kept = all(copied.get(key) is item for key, item in held.items())
            new = [item for key, item in copied.items() if key not in held]
        else:
            kept, new = len(held) == len(copied) and all(map(operator.is_, held, copied)), []
        if not kept or not all(type(item) is TracedValue and takes_no_argument(item.node) for item in new):
            raise UntraceableError("its forward changes a list or dict that its module holds")


# Calls that do not fail: what a value says of itself, and comparisons, which no forward tries for their errors.
_SAFE = {getattr, truth, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


FILLS = "its forward calls a child with a list or dict that the child may change, and goes on with it"
