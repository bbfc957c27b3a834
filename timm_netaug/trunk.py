"""The shared trunk: what lies before a branch of a network is computed once for the tiny and the augmented pass.

`find_trunk` finds the modules that lie before a branch. `SharedTrunk` remembers what they compute in the tiny pass, and
gives that again in an augmented pass.
"""
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .meta import to_meta

__all__ = ['SharedTrunk', 'find_trunk', 'stage_names']


def stage_names(model: nn.Module) -> List[str]:
    """List the stages of a network: the children of its `blocks` or `stages`, or `layer1`, `layer2` and so on. Empty
    for a network that has none of these."""
    for name, module in model.named_modules():
        if name.rpartition('.')[2] in ('blocks', 'stages') and isinstance(module, (nn.Sequential, nn.ModuleList)):
            return [f'{name}.{child}' for child, _ in module.named_children()]
        layers = [f'{name}.{child}'.lstrip('.') for child, _ in module.named_children()
                  if child.startswith('layer') and child[5:].isdigit()]
        if layers:
            return layers
    return []


class _Calls(TorchDispatchMode):
    """Records which modules of a network make activations, and which modules use them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.time = 0
        self.stack: List[str] = []
        self.first: Dict[str, int] = {}  # by module: when its first call begins
        self.last: Dict[str, int] = {}  # by module: when its last call ends
        self.calls: Dict[str, int] = {}
        self.made: List[Tuple[str, Set[int]]] = []  # a call of a module, and the ids of the tensors that it returns
        self.used: List[Tuple[Tuple[str, ...], Set[int], Set[int]]] = []  # where, which tensors, which are overwritten
        self.alive: List[Any] = []  # so that no id is used twice
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self.enter, name))
            module.register_forward_hook(partial(self.leave, name))

    def enter(self, name: str, *_: Any) -> None:
        self.stack.append(name)
        self.first.setdefault(name, self.time)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        self.time += 1
        self.last[name] = self.time
        self.calls[name] = self.calls.get(name, 0) + 1
        self.made.append((name, {id(t) for t in tree_leaves(output) if isinstance(t, torch.Tensor)}))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.time += 1
        self.alive += tree_leaves(output)
        values = [*zip(function._schema.arguments, args), *((None, v) for v in (kwargs or {}).values())]
        written = {id(v) for a, v in values if a is not None and a.alias_info is not None and a.alias_info.is_write}
        inputs = {id(t) for _, v in values for t in tree_leaves(v) if isinstance(t, torch.Tensor)}
        self.used.append((tuple(self.stack), inputs, written))
        return output

    def trunk(self, branch: str, outputs: Set[int]) -> Tuple[List[str], str]:
        """Return the outermost modules before a branch, the one whose output goes on to the branch last; and why the
        branch cannot be shared, where it cannot.

        Args:
            outputs: Ids of the tensors that the network returns.
        """
        done = {name for name, last in self.last.items() if last <= self.first[branch]}
        trunk = [n for n in self.first if n in done and not any(
            n.startswith(f'{other}.') for other in done if other != n)]
        if not trunk:
            return [], 'no module lies before it'
        makers = {i: name for name, ids in self.made if name in trunk for i in ids}
        leaving, written = set(outputs) & set(makers), set()
        for stack, inputs, overwritten in self.used:
            if not done.intersection(stack):
                leaving |= inputs & set(makers)
                written |= overwritten & set(makers)
        names = sorted({makers[i] for i in leaving})
        if len(leaving) != 1:
            return [], f'{len(leaving)} activations go past it ({", ".join(names) or "none"})'
        if written:
            return [], f"the output of '{names[0]}' is overwritten behind it"
        if self.calls[names[0]] > 1:
            return [], f"'{names[0]}' before it is called {self.calls[names[0]]} times"
        return [n for n in trunk if n != names[0]] + names, ''


def find_trunk(model: nn.Module, inputs: Tuple[Any, ...], branch: Union[int, str]) -> List[str]:
    """Find the modules that lie before a branch, which exactly one activation crosses. The model is only read.

    Args:
        inputs: Arguments of the forward pass, on the meta device.
        branch: Number of the stage that the branch lies before (0: no trunk), or name of a module.

    Returns:
        Names of the outermost modules before the branch. The output of the last one is the activation that crosses it.

    Raises:
        ValueError: There is no such stage or module, or another number of activations crosses the branch.
    """
    if branch == 0:
        return []
    stages, modules = stage_names(model), dict(model.named_modules())
    if isinstance(branch, int):
        if not stages:
            raise ValueError(f'from_stage={branch}: {type(model).__name__} has no stages. Give the name of a module.')
        if branch >= len(stages):
            raise ValueError(f'from_stage={branch}: {type(model).__name__} has the stages 0 to {len(stages) - 1}.')
        branch = stages[branch]
    copied = to_meta(model)
    calls = _Calls(copied)
    with torch.inference_mode(False), torch.no_grad(), calls:
        outputs = {id(t) for t in tree_leaves(copied(*inputs))}
    if branch not in calls.first or not branch:
        known = 'is not called by its forward pass' if branch in modules else 'is no module of it'
        raise ValueError(f"from_stage: '{branch}' of {type(model).__name__} {known}. Name a module, such as"
                         f' {", ".join(repr(n) for n in (stages or [n for n in calls.first if n])[:3])}.')
    trunk, why = calls.trunk(branch, outputs)
    if why:
        distance = {n: abs(calls.first[n] - calls.first[branch]) for n in calls.first if list(modules[n].parameters())}
        nearest = [n for n in sorted(distance, key=distance.get) if not calls.trunk(n, outputs)[1]][:3]
        raise ValueError(f"from_stage: the network cannot branch before '{branch}', because {why}. The nearest modules"
                         f' that it can branch before: {", ".join(map(repr, nearest)) or "none"}.')
    return trunk


class SharedTrunk:
    """What the modules of a trunk have computed in a tiny pass.

    Args:
        names: The modules of the trunk; the last one's output crosses the branch.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.is_open = False  # whether outputs are to be remembered
        self.cut = False  # whether the tiny pass goes on from copies of the crossing activations
        self.outputs: Dict[str, List[Any]] = {}
        self.crossing: List[Tuple[torch.Tensor, torch.Tensor]] = []  # activations, and the copies

    def __reduce__(self) -> tuple:  # a copy starts empty
        return SharedTrunk, (self.names,)

    def watch(self, module: nn.Module) -> None:
        """Remember the outputs of a network's trunk from now on, within `opened`."""
        for name in self.names:
            module.get_submodule(name).register_forward_hook(_Remember(self, name))

    def unwatch(self, module: nn.Module) -> None:
        """Remove what `watch` has added."""
        for name in self.names:
            hooks = module.get_submodule(name)._forward_hooks
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Remember)]:
                del hooks[key]

    @contextmanager
    def opened(self, cut: bool) -> Iterator[None]:
        """Remember outputs within the block.

        Args:
            cut: Let the tiny pass go on from a copy of the crossing activation, which has no graph.
        """
        self.is_open, self.cut = True, cut
        try:
            yield
        finally:
            self.is_open, self.outputs, self.crossing = False, {}, []

    def remember(self, name: str, output: Any) -> Any:
        self.outputs.setdefault(name, []).append(output)
        if self.cut and name == self.names[-1]:
            self.crossing.append((output, output.detach().requires_grad_(output.requires_grad)))
            return self.crossing[-1][1]
        return output

    @contextmanager
    def recalled(self, module: nn.Module) -> Iterator[None]:
        """Let the trunk of a network give, within the block, what it has remembered, for as many images as it is called
        with. Nothing is changed where nothing is remembered."""
        modules = {module.get_submodule(name): outputs for name, outputs in self.outputs.items()}
        before = {m: vars(m).get('forward') for m in modules}
        is_open, self.is_open = self.is_open, False
        try:
            for m, outputs in modules.items():
                m.forward = partial(_recall, cycle(outputs))
            yield
        finally:
            self.is_open = is_open
            for m, forward in before.items():
                del m.forward
                if forward is not None:
                    m.forward = forward


class _Remember:
    """A forward hook of a module in the trunk."""

    def __init__(self, trunk: SharedTrunk, name: str):
        self.trunk, self.name = trunk, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.trunk.remember(self.name, output) if self.trunk.is_open else output


def _recall(outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    images = min((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim), default=None)
    return tree_map(lambda t: t[:images] if isinstance(t, torch.Tensor) else t, next(outputs))
