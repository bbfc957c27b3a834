"""The shared trunk: the modules before a branch of a network run once for the tiny and the augmented pass.

`find_trunk` finds the modules before a branch. `SharedTrunk` stores their outputs in the tiny pass, and returns them in
an augmented pass.
"""
import re
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .meta import to_meta
from .recompute import switch_off_checkpointing

__all__ = ['SharedTrunk', 'find_trunk', 'stage_names']


def stage_names(model: nn.Module) -> List[str]:
    """List the stages of a network: the children of its `blocks` or `stages`, or `layer1`, `layer2` and so on. The list
    is empty for a network without such modules."""
    for name, module in model.named_modules():
        children = [f'{name}.{child}'.lstrip('.') for child, _ in module.named_children()]
        if name.rpartition('.')[2] in ('blocks', 'stages') and isinstance(module, (nn.Sequential, nn.ModuleList)):
            return children
        layers = [child for child in children if re.fullmatch(r'layer\d+', child.rpartition('.')[2])]
        if len(layers) > 1:
            return layers
    return []


class _Operator(NamedTuple):
    """An operator of a forward pass."""
    time: int
    stack: Tuple[str, ...]  # the modules that are being called
    inputs: Set[int]  # ids of tensors
    outputs: Set[int]  # ids of tensors
    written: Set[int]  # storages that it writes into


class _Calls(TorchDispatchMode):
    """Records which modules of a network make activations, and which operators use them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.time = 0
        self.stack: List[str] = []
        self.first: Dict[str, int] = {}  # by module: when its first call begins
        self.last: Dict[str, int] = {}  # by module: when its last call ends
        self.calls: Dict[str, int] = {}
        self.made: List[Tuple[str, Dict[int, int]]] = []  # per call: the module, and its outputs by id with the storage
        self.operators: List[_Operator] = []
        self.alive: List[Any] = []  # keeps tensors alive, so that no id is used twice
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self.enter, name), prepend=True)
            module.register_forward_hook(partial(self.leave, name), prepend=True)

    def enter(self, name: str, *_: Any) -> None:
        self.stack.append(name)
        self.first.setdefault(name, self.time)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        self.time += 1
        self.last[name] = self.time
        self.calls[name] = self.calls.get(name, 0) + 1
        self.made.append((name, {id(t): _memory(t) for t in _tensors(output)}))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.time += 1
        self.alive += tree_leaves(output)
        written = {_memory(t) for a, value in zip(function._schema.arguments, args)
                   if a.alias_info is not None and a.alias_info.is_write for t in _tensors(value)}
        self.operators.append(_Operator(
            self.time, tuple(self.stack), {id(t) for t in _tensors((args, kwargs))}, {id(t) for t in _tensors(output)},
            written))
        return output

    def trunk(self, branch: str, outputs: Set[int]) -> Tuple[List[str], str]:
        """Return the outermost modules before a branch, and why they cannot be shared ('' if they can). The last module
        is the one whose output crosses the branch.

        Args:
            outputs: Ids of the tensors that the network returns.
        """
        begin = self.first[branch]
        done = {name for name, last in self.last.items() if last <= begin}
        trunk = [n for n in self.first if n in done and not any(n.startswith(f'{other}.') for other in done)]
        if not trunk:
            return [], 'no module lies before it'
        makers: Dict[int, Set[str]] = {}  # tensor that is made in the trunk -> outermost modules that make it
        whole, memory = set(), {}  # the tensors that an outermost module returns; storages by tensor
        for name, tensors in self.made:
            outer = next((n for n in trunk if f'{name}.'.startswith(f'{n}.')), None)
            for i in tensors if outer else ():
                makers.setdefault(i, set()).add(outer)
                memory[i] = tensors[i]
                whole |= {i} if name == outer else set()
        leaving, written = outputs & set(makers), set()
        comes_from = {i: {i} for i in makers}  # continued below through operators between the trunk's modules
        for op in self.operators:
            if done.intersection(op.stack):
                continue
            origins = set().union(*(comes_from.get(i, set()) for i in op.inputs))
            written |= op.written
            if op.time <= begin:
                comes_from.update({i: origins for i in op.outputs if origins})
            else:
                leaving |= origins
        names = sorted(set().union(*(makers[i] for i in leaving)))
        if len(leaving) != 1 or not leaving <= whole or len(names) != 1:
            where = f'{", ".join(names) or "none"}{"" if leaving <= whole else ", of modules within"}'
            hint = ' (a tensor computed between modules, such as a sum, counts once for each operand)'
            return [], f'{len(leaving)} activations cross it ({where}){hint if len(leaving) > 1 else ""}'
        if written.intersection(memory[i] for i in leaving):
            return [], f"the output of '{names[0]}' is overwritten after it"
        if self.calls[names[0]] > 1:
            return [], f"'{names[0]}', the last module before it, is called {self.calls[names[0]]} times"
        return [n for n in trunk if n != names[0]] + names, ''


def _tensors(value: Any) -> List[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def find_trunk(model: nn.Module, inputs: Tuple[Any, ...], branch: Union[int, str]) -> List[str]:
    """Find the modules before a branch that exactly one activation crosses. The model is not changed.

    Args:
        inputs: Arguments of the forward pass, on the meta device.
        branch: Number of the first stage behind the branch (0: no trunk), or name of the first module behind it.

    Returns:
        Names of the outermost modules before the branch. The output of the last one is the activation that crosses it.

    Raises:
        ValueError: There is no such stage or module, or another number of activations crosses the branch.
    """
    if branch == 0:
        return []
    stages, modules = stage_names(model), dict(model.named_modules())
    if isinstance(branch, int):
        if branch >= len(stages):
            known = f'the stages 0 to {len(stages) - 1}' if stages else 'no stages'
            also = 'one of them, or ' if stages else ''
            raise ValueError(
                f'from_stage={branch}: {type(model).__name__} has {known}. Give {also}the name of a module.')
        branch = stages[branch]
    copied = to_meta(model)
    switch_off_checkpointing(copied)
    calls = _Calls(copied)
    with torch.inference_mode(False), torch.no_grad(), calls:
        outputs = {id(t) for t in _tensors(copied(*inputs))}
    called = [n for n in calls.first if n and list(modules[n].parameters())]
    if branch not in calls.first or not branch:
        known = 'is not called in the forward pass' if branch in modules else 'is not a module'
        some = [n for n in stages if n in calls.first] or called
        raise ValueError(f"from_stage: '{branch}' {known} of {type(model).__name__}. Name a module, such as"
                         f' {", ".join(map(repr, some[:3]))}.')
    trunk, why = calls.trunk(branch, outputs)
    if why:
        distance = {n: abs(calls.first[n] - calls.first[branch]) for n in called}
        nearest = [n for n in sorted(distance, key=distance.get) if not calls.trunk(n, outputs)[1]][:3]
        raise ValueError(f"from_stage: the network cannot branch before '{branch}', because {why}. The nearest modules"
                         f' before which it can branch: {", ".join(map(repr, nearest)) or "none"}.')
    return trunk


class SharedTrunk:
    """The outputs of a trunk's modules in a tiny pass, for reuse in an augmented pass.

    Args:
        names: Names of the trunk's modules. The output of the last module crosses the branch.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.is_open = False  # whether outputs are stored
        self.cut = False  # whether the tiny pass continues from detached copies of the crossing activations
        self.outputs: Dict[str, List[Tuple[int, Any]]] = {}  # by module: number of images and output of every call
        self.crossing: List[Tuple[torch.Tensor, torch.Tensor]] = []  # crossing activations and their detached copies

    def __reduce__(self) -> tuple:  # a copy starts empty
        return SharedTrunk, (self.names,)

    def watch(self, module: nn.Module) -> None:
        """Add hooks to a network's trunk that store its outputs within `opened`."""
        for name in self.names:  # these hooks run first, so that other hooks see the detached copy
            module.get_submodule(name).register_forward_hook(_Remember(self, name), prepend=True)

    def unwatch(self, module: nn.Module) -> None:
        """Remove the hooks that `watch` has added."""
        for name in self.names:
            hooks = module.get_submodule(name)._forward_hooks
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Remember)]:
                del hooks[key]

    @contextmanager
    def opened(self, cut: bool) -> Iterator[None]:
        """Store outputs within the block.

        Args:
            cut: Let the tiny pass continue from a detached copy of the crossing activation.
        """
        self.is_open, self.cut = True, cut
        try:
            yield
        finally:
            self.is_open, self.outputs, self.crossing = False, {}, []

    def remember(self, name: str, args: Any, output: Any) -> Any:
        self.outputs.setdefault(name, []).append((_images(args), output))
        return tree_map(self.copied, output) if self.cut and name == self.names[-1] else output

    def copied(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        self.crossing.append((value, value.detach().requires_grad_()))
        return self.crossing[-1][1]

    @contextmanager
    def recalled(self, module: nn.Module) -> Iterator[None]:
        """Let the modules of a network's trunk return their stored outputs within the block, for the leading images if
        they are called with fewer images. Modules without stored outputs compute as usual."""
        modules = {module.get_submodule(name): outputs for name, outputs in self.outputs.items()}
        before = {m: vars(m).get('forward') for m in modules}
        is_open, self.is_open = self.is_open, False
        try:
            for m, outputs in modules.items():
                m.forward = _Recall(outputs)
            yield
        finally:
            self.is_open = is_open
            for m, forward in before.items():
                del m.forward
                if forward is not None:
                    m.forward = forward

    def forget(self, module: nn.Module) -> None:
        """Undo `recalled` in a copy of a network that was made within its block, so that the copy's trunk computes."""
        for name in self.names:
            m = module.get_submodule(name)
            if isinstance(vars(m).get('forward'), _Recall):
                del m.forward


class _Remember:
    """A forward hook of a module in the trunk."""

    def __init__(self, trunk: SharedTrunk, name: str):
        self.trunk, self.name = trunk, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.trunk.remember(self.name, args, output) if self.trunk.is_open else output


class _Recall:
    """The forward method of a module in the trunk during an augmented pass."""

    def __init__(self, outputs: Sequence[Tuple[int, Any]] = ()):
        self.outputs = cycle(outputs)

    def __reduce__(self) -> tuple:  # a copy holds no activations
        return _Recall, ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        images, output = next(self.outputs)
        fewer = _images(args)
        return output if fewer == images else tree_map(partial(_leading_images, images, fewer), output)


def _images(args: Any) -> int:
    """Return the number of images that a module is called with: the first dimension of its first tensor."""
    return next((len(t) for t in _tensors(args) if t.ndim), 0)


def _leading_images(images: int, fewer: int, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.ndim or len(value) != images:
        raise RuntimeError(f'The trunk returns a tensor of shape {tuple(value.shape)}, which cannot be reduced to'
                           f' {fewer} of {images} images: use batch_fraction=1.')
    return value[:fewer]
