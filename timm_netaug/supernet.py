"""The super-network: a module with enlarged tensors, whose leading slices are the tiny network.

`augment` makes a super-network from a stock module. `export` copies a sub-network out of it as a stock module.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from .config import NetAugConfig
from .graph import trace
from .layers import ELASTIC, LAYER_STATE, Elastic, ElasticBatchNorm
from .layout import Layout
from .meta import FastMeta, copy_with, shapes, to_meta
from .recompute import Mixed, mixed_with, set_recomputed, switch_off_checkpointing
from .sorting import importance_orders, permute_channels, to_permute
from .trunk import SharedTrunk, find_trunk

__all__ = ['SuperNet', 'augment', 'export', 'find_supernet', 'init_weights']


_CHECKED_WITH = NetAugConfig(width_mults=(1.5, 2.5), expand_mults=(1.5, 2.0))
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, torch.jit.ScriptModule, OptimizedModule)


class SuperNet(Mixed):
    """The mixin that makes a module a super-network. Outside `sampled`, the module computes the tiny network.

    A super-network is not thread-safe, because the module stores the active widths. Threads that compute different
    widths at the same time need a copy each.

    Attributes:
        netaug_config: The resolved `NetAugConfig`.
        layout: The channels that can be augmented.
        max_widths: Channels of every set in the whole super-network, by name.
        netaug_trunk: The modules before the branch of `NetAugConfig.from_stage`.
    """
    netaug_config: NetAugConfig
    layout: Layout
    max_widths: Dict[str, int]
    netaug_trunk: SharedTrunk

    def sample_widths(self, generator: torch.Generator, expand_only: bool = False) -> Dict[str, int]:
        """Draw the widths of an augmented sub-network (section 3.2 of the paper).

        Args:
            generator: The only source of randomness.
            expand_only: Augment only the expansion ratios, as in the second half of training.

        Returns:
            Number of active channels by the name of the convolution that writes them.
        """
        def draw(mults):
            return mults[torch.randint(len(mults), (), generator=generator, device=generator.device).item()]

        config = self.netaug_config
        return self.layout.widths(
            lambda c: 1.0 if expand_only else draw(config.width_mults),
            lambda c: draw(config.expand_mults),
            config.divisor,
            self.max_widths,
        )

    @contextmanager
    def active(self, widths: Mapping[str, int]) -> Iterator[Dict[str, int]]:
        """Compute the sub-network of the given widths within the block.

        The previous widths are restored at the end of the block, also after an error. `backward()` may be called later.

        Args:
            widths: Number of active channels of every set, as `sample_widths` returns them.

        Raises:
            ValueError: A channel set is missing or unknown, or a width is not between the tiny and the full width.
        """
        widths = self.check_widths(widths)
        state = {self.get_submodule(name): ('active_out', widths[c.name])
                 for c in self.layout.channels.values() for name in c.writers}
        state.update({m: ('augmented', True) for m in self.modules() if isinstance(m, ElasticBatchNorm)})
        before = {layer: getattr(layer, attribute) for layer, (attribute, _) in state.items()}
        try:
            for layer, (attribute, value) in state.items():
                setattr(layer, attribute, value)
            with self.netaug_trunk.recalled(self):
                yield widths
        finally:
            for layer, value in before.items():
                setattr(layer, state[layer][0], value)

    @contextmanager
    def sampled(self, generator: torch.Generator, expand_only: bool = False) -> Iterator[Dict[str, int]]:
        """Draw an augmented sub-network, compute it within the block, and yield its widths. See `sample_widths` for the
        arguments."""
        with self.active(self.sample_widths(generator, expand_only)) as widths:
            yield widths

    @contextmanager
    def shared_trunk(self, cut: bool = False) -> Iterator[SharedTrunk]:
        """Compute the trunk once within the block: an augmented pass reuses the trunk's output of the tiny pass.

        Run the tiny pass first, and only once. An augmented pass may get only the leading images of the batch. Call
        `backward()` after the block of `sampled` or `active`. Without `NetAugConfig.from_stage`, there is no trunk and
        nothing is shared.

        Args:
            cut: Let the tiny pass continue from a detached copy of the activation that crosses the branch, so that its
                gradient can be computed early (see `early_backward`). `crossing` of the yielded trunk holds both.
        """
        with self.netaug_trunk.opened(cut):
            yield self.netaug_trunk

    def train(self, mode: bool = True) -> 'SuperNet':
        """Set the training mode.

        Raises:
            ValueError: An elastic layer has been replaced since `augment`, by `timm.utils.freeze` for example.
        """
        self._check_layers()
        return super().train(mode)

    def _check_layers(self) -> None:
        for name in self.layout.layers:
            layer = self.get_submodule(name)
            if not isinstance(layer, Elastic):
                raise ValueError(f"The layer '{name}' of the super-network has been replaced by a"
                                 f' {type(layer).__name__}, which is not elastic: replace layers of the stock model,'
                                 f' and augment that. timm.utils.freeze() keeps the layers with'
                                 f' include_bn_running_stats=False.')

    def check_widths(self, widths: Mapping[str, int]) -> Dict[str, int]:
        """Return widths as a dict in forward order.

        Raises:
            ValueError: A channel set is missing or unknown, or a width is not between the tiny and the full width.
        """
        wrong = sorted(set(widths) ^ set(self.max_widths))
        if wrong:
            raise ValueError(f"Widths need exactly one entry for each of the super-network's channel sets"
                             f' (`supernet.max_widths`); missing or unknown: {", ".join(wrong[:5])}.')
        for name, full in self.max_widths.items():
            base = self.layout.channels[name].base
            if widths[name] != int(widths[name]):
                raise ValueError(f"Width {widths[name]} of '{name}' is not a whole number.")
            if not base <= widths[name] <= full:
                raise ValueError(f"Width {widths[name]} of '{name}' is not between the tiny model's {base} and the"
                                 f" super-network's {full}.")
        return {name: int(widths[name]) for name in self.max_widths}

    @torch.no_grad()
    def init_weights(self, sort: bool = True) -> None:
        """Initialise the whole super-network for a training from scratch, as the reference does.

        Convolutions: Kaiming-uniform (a = sqrt 5) with the fan-in of the full tensor; classifier: truncated normal
        of 0.02. Tensors without augmented channels are not changed, for example the biases of the last layer.

        Args:
            sort: Sort the channels afterwards, so that the tiny network starts with the most important ones.
        """
        for name, tensor in self.named_parameters():
            if name in self.layout.axes:
                _fill(self, name, tensor)
        for name, tensor in self.named_buffers():
            if isinstance(self.get_submodule(name.rpartition('.')[0]), ElasticBatchNorm):
                tensor.fill_(1 if name.endswith('running_var') else 0)
        if sort:
            self.sort_channels()

    def sort_channels(self, optimizer: Optional[torch.optim.Optimizer] = None) -> Dict[str, torch.Tensor]:
        """Bring the most important channels of every block to the front (see `sorting.importance_orders`).

        The function of the full super-network does not change.

        Args:
            optimizer: Optimizer whose state is permuted with the weights. It may hold other parameters, too.

        Returns:
            The applied orders by channel set. `permute_channels` applies them to a copy, for example to an EMA.

        Raises:
            ValueError: The optimizer keeps a state that cannot be permuted. Nothing has been changed.
        """
        orders = importance_orders(self, self.layout)
        self.permute_channels(orders, optimizer)
        return orders

    def permute_channels(
            self,
            orders: Mapping[str, torch.Tensor],
            optimizer: Optional[torch.optim.Optimizer] = None,
    ) -> None:
        """Apply the orders that another super-network was sorted with. See `sort_channels`."""
        permute_channels(self, self.layout, orders, optimizer)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the state of an optimizer can be sorted with the weights. Its state exists after the first step.

        Raises:
            ValueError: The optimizer keeps a state that cannot be permuted.
        """
        to_permute(self, self.layout, dict.fromkeys(self.layout.channels), optimizer)

    @property
    def batches_since_sort(self) -> Optional[int]:
        """Tiny training batches since the last sort; None while BatchNorm's statistics are the usual moving average."""
        norms = [m for m in self.modules() if isinstance(m, ElasticBatchNorm)]
        norms = [m for m in norms if m.training] or norms  # frozen norms count no batches
        return max((-(-m.since_sort // m.calls) for m in norms if m.since_sort is not None), default=None)

    @batches_since_sort.setter
    def batches_since_sort(self, count: Optional[int]) -> None:
        for module in self.modules():
            if isinstance(module, ElasticBatchNorm):
                module.since_sort = None if count is None else count * module.calls

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Restore a copy, which computes the tiny network even if it was made inside `sampled`."""
        super().__setstate__(state)
        self.netaug_trunk.forget(self)
        for c in self.layout.channels.values():
            for name in c.writers:
                self.get_submodule(name).active_out = c.base
        for module in self.modules():
            if isinstance(module, ElasticBatchNorm):
                module.augmented = False

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError('The classifier of a super-network cannot be replaced: call reset_classifier() of the stock'
                         ' model, then augment that model.')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass, at the widths of the forward pass."""
        set_recomputed([self.get_submodule(name) for name in self.layout.blocks], enable)

    def synchronise_batchnorm(self) -> None:
        """Normalise over the batches of all processes in BatchNorm. This needs CUDA, like PyTorch's SyncBatchNorm.

        The types of the layers do not change, so an exported model has plain BatchNorm.
        """
        for module in self.modules():
            if isinstance(module, ElasticBatchNorm):
                module.synchronised = True


_REPLACED = ('init_weights', 'reset_classifier', 'set_grad_checkpointing', 'train')  # methods of stock modules
_NAMES = ('mixin', 'stock', *SuperNet.__annotations__, *(
    name for name in vars(SuperNet) if not name.startswith('_') and name not in _REPLACED))


def _fill(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Fill a tensor of a super-network with new initial values."""
    layer = model.get_submodule(name.rpartition('.')[0])
    elastic = type(layer) if isinstance(layer, Elastic) else ELASTIC[type(layer)]
    new = torch.empty_like(tensor)
    tensor.copy_(elastic.fill(layer, name.rpartition('.')[2], new))


def _rebuild(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy a model, with the given tensors in place of its own. The other tensors are copied."""
    memo: Dict[int, Any] = {}
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            new = tensors[name]
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy_with(model, memo)


def _example(model: nn.Module) -> Tuple[torch.Tensor]:
    """Return an input of the size that a timm model is configured for."""
    if not getattr(model, 'pretrained_cfg', None):
        raise ValueError('augment() needs the size of the input, and the model has no pretrained_cfg of timm:'
                         ' pass example_input=torch.zeros(2, C, H, W).')
    channels, height, width = resolve_data_config(model=model)['input_size']
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    parameter = next(model.parameters(), torch.empty(0))
    channels = channels if first is None else first.in_channels
    return (torch.empty(2, channels, height, width, device='meta', dtype=parameter.dtype),)


@torch.no_grad()
def augment(model: nn.Module, config: Optional[NetAugConfig] = None, *, example_input: Any = None) -> SuperNet:
    """Make the super-network of a stock module (section 3.2 of the paper). The module itself is not changed.

    The tiny network's weights are the leading slice of the super-network's weights. The weights behind this slice are
    initialised with torch's global generator. The super-network has the module's memory format, dtype, device, training
    mode and names in the state dict. The number of output channels does not change, so code that reads the output works
    as before.

    Args:
        model: Any network of supported layers: a timm model, a `features_only` backbone, or a network of your own. It
            may be a part of a larger module.
        config: What to augment, None for the defaults.
        example_input: Argument of the forward pass, or a tuple of arguments; only shapes and dtypes count. None for
            the input size that a timm model is configured for.

    Raises:
        ValueError: The channels cannot be followed through a module (the message names the module, its type, the
            reason and the supported layers), the config is not a `NetAugConfig`, or the input size is not known.
    """
    if config is not None and not isinstance(config, NetAugConfig):
        raise ValueError(f'augment() takes a NetAugConfig, got {config!r}: build one with NetAugConfig.from_dict().')
    _check_model(model)
    inputs = _example(model) if example_input is None else (
        example_input if isinstance(example_input, tuple) else (example_input,))
    if not any(isinstance(t, torch.Tensor) for t in tree_leaves(inputs)):
        raise ValueError(f'example_input must be a tensor, or a tuple of the arguments of the forward pass, got'
                         f' {example_input!r}.')
    layout = trace(model, inputs)
    if not layout.checked:
        _check_exact(_build(to_meta(model), layout, _CHECKED_WITH))
        layout.checked = True
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', '')
    config = (config or NetAugConfig()).resolve(architecture)
    trunk = find_trunk(model, layout.inputs, config.from_stage)
    return _build(model, layout.after(trunk), config, trunk)


def init_weights(
        model: nn.Module,
        config: Optional[NetAugConfig] = None,
        *,
        example_input: Any = None,
        sort: bool = True,
) -> None:
    """Initialise a stock module with the weights that NetAug starts from, for a training without NetAug.

    These weights are the leading slice of a sorted super-network, so they are larger than timm's initial weights. In
    short trainings, they account for most of the gain of NetAug over timm's initial weights (docs/results.md).

    Args:
        model: Changed in place. See `augment` for the other arguments, and `SuperNet.init_weights` for `sort`.

    Raises:
        ValueError: See `augment`.
    """
    supernet = augment(model, config, example_input=example_input)
    supernet.init_weights(sort)
    model.load_state_dict(export(supernet).state_dict())


def _check_model(model: nn.Module) -> None:
    """Refuse modules that cannot become a super-network for other reasons than their channels."""
    if not isinstance(model, nn.Module):
        raise ValueError(f'augment() takes a module, got {model!r}: build one with timm.create_model(), for example.')
    supernets = [(name, m) for name, m in model.named_modules() if isinstance(m, SuperNet)]
    if supernets:
        name, supernet = supernets[0]
        raise ValueError(f'{f"Module {name!r}" if name else "The model"} is a super-network already, of type'
                         f' {type(supernet).__name__}: augment the stock model.')
    if isinstance(model, _WRAPPERS):
        raise ValueError(f'augment() takes the module inside a {type(model).__name__}: wrap the super-network instead.')
    taken = [name for name in _NAMES if hasattr(model, name)]
    if taken:
        raise ValueError(f'NetAug cannot augment this model: {type(model).__name__} has attributes with names that a'
                         f' super-network needs ({", ".join(taken)}): rename them.')


def _build(model: nn.Module, layout: Layout, config: NetAugConfig, trunk: Sequence[str] = ()) -> SuperNet:
    """Copy a model into a super-network."""
    max_widths = layout.widths(
        lambda c: max(config.width_mults), lambda c: max(config.expand_mults), config.divisor)
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # 1x1 convolutions look channels-last in either format, so the other tensors decide.
    channels_last = any(
        t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
        for t in old.values())
    tensors = {}
    for name, axes in layout.axes.items():
        shape = [max_widths[axes[dim].name] if dim in axes else size for dim, size in enumerate(old[name].shape)]
        new = torch.empty(
            shape,
            dtype=old[name].dtype,
            device=old[name].device,
            memory_format=torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format,
        )
        if not new.is_meta:
            _fill(model, name, new)
            new[layout.slices(name, new.ndim, layout.tiny)] = old[name]
        tensors[name] = new

    supernet = _rebuild(model, tensors)
    supernet.__class__ = mixed_with(SuperNet, type(model))
    for name, calls in layout.layers.items():
        layer = supernet.get_submodule(name)
        tiny = {key: old[f'{name}.{key}'.lstrip('.')].shape for key in (*layer._parameters, *layer._buffers)
                if getattr(layer, key) is not None}
        layer.__class__ = ELASTIC[type(layer)]
        layer.make_elastic(tiny, calls)
    supernet.netaug_config, supernet.layout, supernet.max_widths = config, layout, max_widths
    supernet.netaug_trunk = SharedTrunk(trunk)
    supernet.netaug_trunk.watch(supernet)
    supernet.set_grad_checkpointing(switch_off_checkpointing(supernet))
    return supernet


def _check_exact(supernet: SuperNet) -> None:
    """Refuse a network whose activations do not get the given widths, because its code contains numbers of channels.

    The check takes a sub-network that is wider than the tiny network and narrower than the super-network, and the stock
    network of the same widths. All calls of modules must have the same shapes in both, and a trace of the stock network
    must find these widths.
    """
    layout, inputs = supernet.layout, supernet.layout.inputs
    widths = layout.widths(
        lambda c: supernet.netaug_config.width_mults[0], lambda c: supernet.netaug_config.expand_mults[0], 1,
        supernet.max_widths)
    wider, why = export(supernet, widths), ''
    try:
        follows = trace(wider, inputs).tiny == widths
        with supernet.active(widths):
            follows = follows and shapes(supernet, inputs) == shapes(wider, inputs)
    except Exception as e:  # the network's own code may raise anything
        follows, why = False, f' Its error: {e}'
    if not follows:
        raise ValueError(f'NetAug cannot augment this model: a wider {supernet.stock.__name__} does not have the'
                         f' channels that it should have, because its code contains or reads numbers of channels. Take'
                         f' the numbers from the shapes of its activations.{why}')


def find_supernet(module: nn.Module) -> Tuple[str, SuperNet]:
    """Return the one super-network that a module is or contains, with its name in the module.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, SuperNet)]
    if len(found) != 1:
        what = 'none' if not found else ', '.join(repr(name) for name, _ in found)
        raise ValueError(f'The {type(module).__name__} must have one super-network, found {what}:'
                         f' make one with augment(), from the whole module or from a part of it.')
    return found[0]


@torch.no_grad()
def export(module: nn.Module, widths: Optional[Mapping[str, int]] = None) -> nn.Module:
    """Copy the tiny network, or any sub-network, out of a super-network.

    Args:
        module: A super-network made by `augment`, or a larger module that contains one. It is not changed.
        widths: Widths of the sub-network, as `sampled` yields them; None for the tiny network.

    Returns:
        A stock module with the super-network's memory format, dtype, device and training mode.

    Raises:
        ValueError: There is no super-network, or the widths do not fit it.
    """
    try:
        name, supernet = find_supernet(module)
    except ValueError as e:
        raise ValueError(f'Only a super-network can be exported. {e}') from None
    if name:
        return copy_with(module, {id(supernet): export(supernet, widths)})
    supernet._check_layers()
    layout = supernet.layout
    widths = layout.tiny if widths is None else supernet.check_widths(widths)
    tensors = {
        key: tensor[layout.slices(key, tensor.ndim, widths)].clone()
        for key, tensor in [*supernet.named_parameters(), *supernet.named_buffers()] if key in layout.axes
    }
    model = _rebuild(supernet, tensors)
    model.set_grad_checkpointing(False)
    model.netaug_trunk.unwatch(model)
    for attribute in SuperNet.__annotations__:
        del model.__dict__[attribute]
    for key in layout.layers:
        layer = model.get_submodule(key)
        layer.update_shapes()
        layer.__class__ = type(layer).stock
        for attribute in LAYER_STATE:
            layer.__dict__.pop(attribute, None)
    model.__class__ = supernet.stock
    if hasattr(model, '_model_args'):
        model._model_args = {k: v for k, v in model._model_args.items() if k != 'netaug'}
    if widths != layout.tiny and hasattr(model, 'forward_intermediates') and hasattr(model, 'feature_info'):
        _fit_reported_widths(model, layout.inputs[0])
    return model


def _fit_reported_widths(model: nn.Module, example: torch.Tensor) -> None:
    """Update the widths that a timm model reports, such as `num_features` and those in `feature_info`."""
    copied, example = to_meta(model), example.to(next(model.parameters()).dtype)
    with FastMeta():
        final, features = copied.forward_intermediates(example)
    for info, feature in zip(model.feature_info, features):
        info['num_chs'] = feature.shape[1]
    if hasattr(model, 'num_features'):
        model.num_features = final.shape[1]
    if hasattr(model, 'head_hidden_size'):
        model.head_hidden_size = copied.forward_head(final, pre_logits=True).shape[1]
