"""The training task: the loss of the tiny model plus that of one augmented sub-network (equation 3 of the paper)."""
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask, DistillationTeacher
from timm.utils import unwrap_model

from .config import NetAugConfig
from .supernet import SuperNet, leading_slices, slice_stock

__all__ = ['NetAugTask', 'distillation_loss', 'step_generator']


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator that the sub-network of an update step is drawn from, a function of its two arguments.

    A hash stands between them and the generator because neighbouring seeds alone give related first draws.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def distillation_loss(output: torch.Tensor, teacher_output: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the Kullback-Leibler divergence from a teacher's softened classes, averaged over images (Hinton et al.,
    arXiv 1503.02531, section 2; the factor T^2 keeps the gradient's size).

    Args:
        output: Logits of the student (B, classes).
        teacher_output: Logits of the teacher (B, classes).
    """
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (output, teacher_output))
    return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature ** 2


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient has been computed already: what led to it is out of memory, and its backward pass hands
    the parameters their gradients, times that of the loss. So whoever watches them (DistributedDataParallel, say) sees
    them arrive as ever. Of the gradients, which are zero elsewhere, the tiny network's slices are kept."""

    @staticmethod
    def forward(
            ctx: Any,
            loss: torch.Tensor,
            grads: List[Optional[torch.Tensor]],
            slices: List[tuple],
            *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.grads, ctx.slices = grads, slices
        ctx.layouts = [(p.shape, p.stride()) for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('A gradient of second order needs a NetAugTask without early_backward.')
        full: List[Optional[torch.Tensor]] = []
        for known, slices, (shape, stride) in zip(ctx.grads, ctx.slices, ctx.layouts):
            full.append(None if known is None else known.new_empty_strided(shape, stride).zero_())
            if known is not None:
                full[-1][slices] = known * grad
        return (None, None, None, *full)


class NetAugTask(ClassificationTask):
    """Classification with NetAug, as a `timm.task.TrainingTask`.

    The evaluation model is the tiny model, so a checkpoint's `state_dict` is that of the stock timm model; the
    super-network is in its `task_state`. The training loop tells the task where it is: `start_epoch` at the start of
    every epoch and `start_update` before every optimizer step. Without them, every forward pass counts as a step of
    an endless first epoch.

    Args:
        model: A super-network, made by `augment`.
        criterion: Loss function. Created from criterion_kwargs when None.
        criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
        teacher: A model, or timm's wrapper of one. Runs once a step, and both sub-networks learn from its logits, as in
            timm's LogitDistillationTask.
        task_loss_weight: Weight of the criterion, where there is a teacher.
        distill_loss_weight: Weight of the distillation loss. None for both: 1 and 1; for this one: 1 - the other.
        temperature: Of both kinds of distillation, the teacher's and `NetAugConfig.distill`.
        seed: The sub-network of a step is a function of it and of the step's number, the same on all ranks.
        early_backward: Take the gradient of the tiny network's loss before the augmented pass, so that the activations
            of one pass at a time are in memory. It reaches the parameters in `backward` all the same, but 'output'
            leads nowhere then. Not done with `NetAugConfig.distill`; under float16 autocast, where the loss has to be
            scaled first; where hooks watch parameters, which would see two gradients; nor with the static_graph of
            DistributedDataParallel. Optimizers of second order need False. The sums are the same to the last bit unless
            `loss` is scaled by something else than a power of two before `backward`, which rounds once more.
        device: Device for task tensors/buffers
        dtype: Dtype for task tensors/buffers
        verbose: Enable info logging

    Raises:
        ValueError: The model is not a super-network.
    """

    def __init__(
            self,
            model: SuperNet,
            criterion: Optional[Union[nn.Module, Callable]] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            teacher: Optional[nn.Module] = None,
            task_loss_weight: Optional[float] = None,
            distill_loss_weight: Optional[float] = None,
            temperature: float = 4.0,
            seed: int = 42,
            early_backward: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        supernet = unwrap_model(model)
        if not isinstance(supernet, SuperNet):
            raise ValueError(f'NetAugTask trains a super-network, got {type(model).__name__}: augment() it first.')
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        if distill_loss_weight is None:
            distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
        self.task_loss_weight = 1.0 if task_loss_weight is None else task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature
        if teacher is not None and not isinstance(teacher, DistillationTeacher):
            teacher = DistillationTeacher(teacher, device=self.device, dtype=self.dtype)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            for name in ('mean', 'std'):  # of the input, as timm's tasks with a teacher have them
                value = torch.tensor(supernet.pretrained_cfg[name], device=self.device, dtype=self.dtype)
                self.register_buffer(f'student_{name}', value.view(1, -1, 1, 1), persistent=False)
        self.seed = seed
        self.early_backward = early_backward
        self.expand_only = False
        self._step = 0
        self._counting = True
        self._compiled = False

    @property
    def supernet(self) -> SuperNet:
        """The super-network without the wrappers around it."""
        return unwrap_model(self.trainable_module)

    def train(self, mode: bool = True) -> 'NetAugTask':
        """Set the training mode, without the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def start_epoch(self, epoch: int, num_epochs: int, optimizer: Optional[torch.optim.Optimizer] = None) -> None:
        """Set the phase of the schedule, and sort the channels where it asks for it (section 3.3 of the paper).

        Nothing is sorted before the first epoch: `SuperNet.init_weights` has, and given weights stay where they are.

        Args:
            epoch: From 0.
            num_epochs: Of the whole training.
            optimizer: Its state is sorted with the weights.
        """
        config = self.supernet.netaug_config
        self.expand_only = epoch >= config.stop_width_at * num_epochs
        if config.sort and not self.expand_only and epoch > 0:
            orders = self.supernet.sort_channels(optimizer)
            if self.has_ema():
                unwrap_model(self.get_trainable_module(ema=True)).permute_channels(orders)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check, once the optimizer has made a step, that the schedule will be able to sort its state.

        Raises:
            ValueError: It keeps a state that can not be sorted.
        """
        if self.supernet.netaug_config.sort and self.supernet.netaug_config.stop_width_at > 0:
            self.supernet.check_optimizer(optimizer)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create an EMA of the super-network. BatchNorm's statistics are the model's own, not averaged: after a sort
        an average would keep those of other channels for thousands of steps."""
        kwargs.setdefault('exclude_buffers', True)
        return super().setup_ema(*args, **kwargs)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'NetAugTask':
        """Wrap the super-network in DistributedDataParallel, which all-reduces the gradients.

        Buffers are not broadcast unless asked for: BatchNorm's statistics are every rank's own until timm's
        `distribute_bn` takes their mean, so that all ranks' images count.
        """
        super().prepare_distributed(device_ids, **ddp_kwargs)
        if 'broadcast_buffers' not in ddp_kwargs:
            self.trainable_module.broadcast_buffers = False  # as an argument it would skip the first broadcast, too
        return self

    def start_update(self, step: int) -> None:
        """Choose the sub-network that every forward pass trains up to the next call."""
        self._step, self._counting = step, False

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Compute the loss of the tiny model and of one augmented sub-network.

        Args:
            input: Images (B, C, H, W).
            target: Labels (B,), or whatever the criterion takes.

        Returns:
            'loss' (the sum, to call `backward` on), 'tiny_loss', and 'output', the tiny model's logits; in a step with
            an augmented sub-network 'aug_loss', and 'distill_loss' where the tiny model learns from it; with a teacher
            'kd_loss', its part in 'tiny_loss' before it is weighted.
        """
        supernet, config = self.supernet, self.supernet.netaug_config
        step, self._step = self._step, self._step + self._counting
        teacher_output = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_output = self.teacher(
                    self.teacher.normalize_input(input, self.student_mean, self.student_std))
        # Compiled code would be compiled anew for every weight that a batch after a sort has in BatchNorm's statistics.
        eager = self._compiled and supernet.batches_since_sort is not None
        with torch.compiler.set_stance('force_eager') if eager else nullcontext():
            output = self.trainable_module(input)
        loss, parts = self._loss(output, target, teacher_output)
        result = dict(output=output, tiny_loss=loss.detach(), **parts)
        if step % config.every == 0:
            loss = self._early(loss, input)
            images = min(len(input), max(2, round(config.batch_fraction * len(input))))  # BatchNorm may need two
            with supernet.sampled(step_generator(self.seed, step), self.expand_only):
                # Past DistributedDataParallel: its hooks stand at the parameters, where the gradients of both passes
                # arrive as one sum, and a second forward pass through it could broadcast buffers that the first one
                # still needs.
                aug_output = supernet(input[:images])
            aug_loss, _ = self._loss(
                aug_output, target[:images], None if teacher_output is None else teacher_output[:images])
            result['aug_loss'] = aug_loss.detach()
            loss = loss + config.every * config.alpha * aug_loss
            if config.distill:
                distill_loss = distillation_loss(output[:images], aug_output.detach(), self.temperature)
                result['distill_loss'] = distill_loss.detach()
                loss = loss + config.every * config.distill * distill_loss
        return dict(loss=loss, **result)

    def _early(self, loss: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Return the tiny network's loss with its gradient computed, where that may be done ahead of `backward`."""
        half = torch.is_autocast_enabled(input.device.type) and (
            torch.get_autocast_dtype(input.device.type) is torch.float16)
        parameters = {k: p for k, p in self.supernet.named_parameters() if p.requires_grad}
        possible = (
            self.early_backward and loss.requires_grad and not self.supernet.netaug_config.distill and not half
            and not input.requires_grad and not getattr(self.trainable_module, 'static_graph', False)
            and not any(p._backward_hooks for p in parameters.values()))
        if not possible:
            return loss
        layout = self.supernet.layout
        slices = [leading_slices(layout.axes.get(k, {}), layout.tiny, p.ndim) for k, p in parameters.items()]
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        known = [None if g is None else g[s].clone() for g, s in zip(grads, slices)]
        return _KnownGradient.apply(loss.detach(), known, slices, *parameters.values())

    def _loss(self, output, target, teacher_output) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Return the loss of one network's logits, and the teacher's part in it to be logged."""
        loss = self.criterion(output, target)
        if teacher_output is None:
            return loss, {}
        kd_loss = distillation_loss(output, teacher_output, self.temperature)
        return self.task_loss_weight * loss + self.distill_loss_weight * kd_loss, dict(kd_loss=kd_loss.detach())

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **kwargs: Any) -> nn.Module:
        """Compile what is static: the tiny pass, and the teacher.

        The augmented pass stays eager, as there are more combinations of sampled widths than steps, and each would be
        compiled for itself. So do the tiny passes of the first batches after a sort, and evaluation, whose model is a
        new slice every time.
        """
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **kwargs)
        self._compiled = True
        return self.trainable_module

    def compile_ema(self, *args: Any, **kwargs: Any) -> None:
        return None

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the tiny model as it is now: a copy, which further training does not change."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else slice_stock(unwrap_model(module))

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:
            return {}
        supernet = unwrap_model(module)
        return dict(
            netaug=supernet.netaug_config.to_dict(),
            supernet=supernet.state_dict(),
            batches_since_sort=supernet.batches_since_sort,
        )

    def load_checkpoint_state(
            self,
            state_dict: Dict[str, Any],
            task_state: Optional[Dict[str, Any]] = None,
            ema: bool = False,
            strict: bool = True,
    ) -> None:
        """Load the super-network; the tiny model's `state_dict` is a slice of it.

        Raises:
            ValueError: The checkpoint is not of a NetAug training, or of one with another config.
            RuntimeError: An EMA is to be loaded before `setup_ema`, or a tensor has another shape.
        """
        module = self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('Cannot load EMA checkpoint state before setup_ema().')
        supernet = unwrap_model(module)
        if not task_state:
            raise ValueError('The checkpoint holds no super-network, as it is not of a training with NetAug.'
                             ' Start from its weights with --initial-checkpoint instead of resuming it.')
        config = supernet.netaug_config.to_dict()
        there = NetAugConfig.from_dict(task_state['netaug']).to_dict()  # an earlier version had fewer fields
        changed = [k for k in config if there[k] != config[k]]
        if changed:
            raise ValueError('The checkpoint is of a NetAug training with another config: ' + ', '.join(
                f'{k} is {there[k]} there and {config[k]} here' for k in changed) + '.')
        supernet.load_state_dict(task_state['supernet'], strict=strict)
        supernet.batches_since_sort = task_state['batches_since_sort']
