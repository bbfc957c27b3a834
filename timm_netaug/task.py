"""The training task: the loss of the tiny network plus that of one augmented sub-network (equation 3 of the paper)."""
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import (
    ClassificationEvaluator,
    ClassificationTask,
    DistillationTeacher,
    MultiLabelClassificationEvaluator,
)
from timm.utils import unwrap_model
from torch.utils._pytree import tree_map

from .config import NetAugTraining, split_fields
from .early_backward import can_take_gradient, replaced, take_gradient
from .layers import statistics_kept
from .supernet import SuperNet, export, find_supernet
from .trunk import SharedTrunk

__all__ = ['NetAugTask', 'distillation_loss', 'step_generator']


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator for the sub-network of an update step. It depends only on the two arguments.

    It is seeded with a hash of both, because generators with neighbouring seeds give related first draws.
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


def _batch_size(batch: Any) -> int:
    """Return the number of images of a tensor, of a list with an item for each image, or of a dict of these."""
    return _batch_size(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)


def _leading(batch: Any, size: int, images: int) -> Any:
    """Return the part of a batch that belongs to its first images.

    Args:
        batch: A tensor of all images; a list with one item for each image; or a list or dict of such batches.
        size: Images of the whole batch.
        images: Number of images to keep.

    Raises:
        ValueError: The items of a list may be images as well as batches.
    """
    if isinstance(batch, torch.Tensor):
        return batch[:images]
    if isinstance(batch, dict):
        return {k: _leading(v, size, images) for k, v in batch.items()}
    if not isinstance(batch, (list, tuple)):
        return batch
    if len(batch) != size:
        return type(batch)(_leading(v, size, images) for v in batch)
    if all(isinstance(t, torch.Tensor) and t.ndim and len(t) == size for t in batch):
        raise ValueError(f'batch_fraction: a list of {size} tensors of length {size} may be a list of images or of'
                         f' batches; use another batch size.')
    return batch[:images]


class NetAugTask(ClassificationTask):
    """Training with NetAug, as a `timm.task.TrainingTask`, for any loss.

    The evaluation model is the tiny network, so a checkpoint's `state_dict` is that of the stock module. Its
    `task_state` holds the super-network. The training loop calls `start_epoch` at the start of every epoch, and
    `start_update` before every optimizer step. Without these calls, every forward pass counts as one step, and the
    first epoch does not end.

    Args:
        model: A super-network made by `augment`, or a module that contains one (a detector with an augmented backbone).
        criterion: Loss function, called with a network's output and the target; both may be lists or dicts. Created
            from criterion_kwargs when None.
        criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
        teacher: A model, or timm's wrapper of one. It runs once in a step. The tiny and the augmented network both
            learn from its logits, as in timm's LogitDistillationTask.
        task_loss_weight: Weight of the criterion if there is a teacher. None for 1.
        distill_loss_weight: Weight of the teacher's distillation loss. None for 1 - task_loss_weight, or for 1 if both
            weights are None.
        temperature: Temperature of the teacher's distillation and of in-situ distillation.
        distill_criterion: Loss of in-situ distillation, called with the tiny and the augmented network's output. None
            for `distillation_loss`, which takes logits.
        seed: Seed of the sampled sub-networks. A step's sub-network depends only on the seed and the number of the
            step, so it is the same on all ranks.
        early_backward: Compute the gradient of the tiny network's loss before the augmented pass, so that only one pass
            at a time has its activations in memory. The parameters get this gradient in `backward` as usual, but
            'output' has no graph. The setting has no effect with in-situ distillation, and in the cases that
            `early_backward.can_take_gradient` lists. Second-order optimizers need False. The gradients are the same to
            the last bit, except where `loss` is scaled before `backward` by a factor that is not a power of two: that
            adds one rounding.
        multi_label: Targets have one number for each class (B, classes), as in timm's MultiLabelClassificationTask.
            Selects the criterion and the evaluator.
        device: Device for task tensors/buffers
        dtype: Dtype for task tensors/buffers
        verbose: Enable info logging
        training: The fields of `NetAugTraining`: alpha, stop_width_at, sort, distill, batch_fraction, every.

    Raises:
        ValueError: The model has no super-network, an argument is out of its range, or the teacher is the model.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Union[nn.Module, Callable]] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            teacher: Optional[nn.Module] = None,
            task_loss_weight: Optional[float] = None,
            distill_loss_weight: Optional[float] = None,
            temperature: float = 4.0,
            distill_criterion: Optional[Callable] = None,
            seed: int = 42,
            early_backward: bool = False,
            multi_label: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            **training: Any,
    ):
        find_supernet(unwrap_model(model))
        self.multi_label = multi_label
        self.training_config = NetAugTraining.from_dict(training)
        if not temperature > 0 or seed < 0:
            raise ValueError(f'NetAugTask needs a temperature above 0 and a seed of at least 0, got {temperature} and'
                             f' {seed}.')
        if task_loss_weight is not None and task_loss_weight > 1 and distill_loss_weight is None:
            raise ValueError(f'NetAugTask: task_loss_weight {task_loss_weight} needs distill_loss_weight, which would'
                             f' be negative otherwise.')
        if teacher is not None and unwrap_model(teacher) is unwrap_model(model):
            raise ValueError('NetAugTask: the teacher is the model itself: pass a copy of it, or another model.')
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        if distill_loss_weight is None:
            distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
        self.task_loss_weight = 1.0 if task_loss_weight is None else task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature
        self.distill_criterion = distill_criterion or partial(distillation_loss, temperature=temperature)
        if teacher is not None and not isinstance(teacher, DistillationTeacher):
            teacher = DistillationTeacher(teacher, device=self.device, dtype=self.dtype)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            for name in ('mean', 'std'):  # of the input; timm's distillation tasks have buffers with these names
                value = torch.tensor(self.network.pretrained_cfg[name], device=self.device, dtype=self.dtype)
                self.register_buffer(f'student_{name}', value.view(1, -1, 1, 1), persistent=False)
        self.seed = seed
        self.early_backward = early_backward
        self.expand_only = False
        self._step = 0
        self._counting = True
        self._compiled = False

    @property
    def network(self) -> nn.Module:
        """The trained module without the wrappers around it."""
        return unwrap_model(self.trainable_module)

    @property
    def supernet(self) -> SuperNet:
        """The super-network, which is the trained module or a part of it."""
        return find_supernet(self.network)[1]

    def netaug_fields(self) -> Dict[str, Any]:
        """Return the fields of both configurations as plain data, for checkpoints."""
        return {**self.supernet.netaug_config.to_dict(), **self.training_config.to_dict()}

    def train(self, mode: bool = True) -> 'NetAugTask':
        """Set the training mode. The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """Return timm's evaluator for the task's kind of targets."""
        evaluator = MultiLabelClassificationEvaluator if self.multi_label else ClassificationEvaluator
        return evaluator(device=self.device, **kwargs)

    def start_epoch(self, epoch: int, num_epochs: int, optimizer: Optional[torch.optim.Optimizer] = None) -> None:
        """Set the phase of the schedule, and sort the channels if the phase requires it (section 3.3 of the paper).

        The first epoch begins without a sort: `SuperNet.init_weights` has sorted new weights, and pretrained weights
        keep their order.

        Args:
            epoch: Number of the epoch, from 0.
            num_epochs: Number of epochs of the whole training.
            optimizer: Optimizer whose state is sorted with the weights.
        """
        config = self.training_config
        self.expand_only = epoch >= config.stop_width_at * num_epochs
        if config.sort and not self.expand_only and epoch > 0:
            orders = self.supernet.sort_channels(optimizer)
            if self.has_ema():
                find_supernet(unwrap_model(self.get_trainable_module(ema=True)))[1].permute_channels(orders)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer's state can be sorted if the schedule sorts. The state exists after the first step.

        Raises:
            ValueError: The optimizer keeps a state that cannot be sorted.
        """
        if self.training_config.sort and self.training_config.stop_width_at > 0:
            self.supernet.check_optimizer(optimizer)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create an EMA of the super-network. BatchNorm's statistics are copied, not averaged: after a sort, an average
        would mix in the statistics of other channels for thousands of steps."""
        kwargs.setdefault('exclude_buffers', True)
        return super().setup_ema(*args, **kwargs)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'NetAugTask':
        """Wrap the super-network in DistributedDataParallel, which all-reduces the gradients.

        By default, buffers are not broadcast. Every rank keeps its own BatchNorm statistics until timm's
        `distribute_bn` averages them, so that the images of all ranks count.
        """
        super().prepare_distributed(device_ids, **ddp_kwargs)
        if 'broadcast_buffers' not in ddp_kwargs:
            self.trainable_module.broadcast_buffers = False  # as an argument, it would also skip the initial broadcast
        return self

    def start_update(self, step: int) -> None:
        """Set the number of the step, which selects the sub-network of all forward passes until the next call."""
        self._step, self._counting = step, False

    def forward(self, input: torch.Tensor, target: Any) -> Dict[str, Any]:
        """Compute the loss of the tiny network and of one augmented sub-network.

        Args:
            input: Images (B, C, H, W), or whatever the network takes.
            target: Labels (B,), or whatever the criterion takes.

        Returns:
            A dict with 'loss' (the sum, to call `backward` on), and 'tiny_loss' and 'output' of the tiny network. In a
            step with an augmented sub-network it also has 'aug_loss', and with in-situ distillation 'distill_loss'.
            With a teacher it also has 'kd_loss', the teacher's part of 'tiny_loss' before weighting.
        """
        config, supernet = self.training_config, self.supernet
        step, self._step = self._step, self._step + self._counting
        teacher_output = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_output = self.teacher(
                    self.teacher.normalize_input(input, self.student_mean, self.student_std))
        is_augmented = step % config.every == 0
        early = is_augmented and self.early_backward and not config.distill and can_take_gradient(
            self.trainable_module, (input, target, list(getattr(self.criterion, 'parameters', list)())))
        # After a sort, BatchNorm's momentum changes from batch to batch, and each value would cause a recompilation.
        eager = self._compiled and supernet.batches_since_sort is not None
        with supernet.shared_trunk(cut=early) if is_augmented else nullcontext() as trunk:
            with torch.compiler.set_stance('force_eager') if eager else nullcontext():
                output = self.trainable_module(input)
            loss, parts = self._loss(output, target, teacher_output)
            result = dict(output=output, tiny_loss=loss.detach(), **parts)
            if not is_augmented:
                return dict(loss=loss, **result)
            loss, stand_ins = self._take_gradient(loss, trunk) if early and loss.requires_grad else (loss, {})
            size = _batch_size(input) if config.batch_fraction < 1 else 0
            images = min(size, max(2, round(config.batch_fraction * size)))  # BatchNorm may need two
            share = partial(_leading, size=size, images=images) if size else lambda batch: batch
            network = self.network
            with supernet.sampled(step_generator(self.seed, step), self.expand_only), statistics_kept(network), \
                    replaced(network, stand_ins):
                # This pass bypasses DistributedDataParallel. Its hooks are on the parameters, where the gradients of
                # both passes arrive as one sum. A second forward pass through it could overwrite buffers, by a
                # broadcast, that the first pass still needs.
                aug_output = network(share(input))
        aug_loss, _ = self._loss(aug_output, share(target), share(teacher_output))
        result['aug_loss'] = aug_loss.detach()
        loss = loss + config.every * config.alpha * aug_loss
        if config.distill:
            known = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, aug_output)
            distill_loss = self.distill_criterion(share(output), known)
            result['distill_loss'] = distill_loss.detach()
            loss = loss + config.every * config.distill * distill_loss
        return dict(loss=loss, **result)

    def _take_gradient(self, loss: torch.Tensor, trunk: SharedTrunk) -> Tuple[torch.Tensor, Dict[Any, Any]]:
        layout, slices = self.supernet.layout, {}
        for name, p in self.supernet.named_parameters():
            slices[p] = layout.slices(name, p.ndim, layout.tiny)
        return take_gradient(loss, [p for p in self.network.parameters() if p.requires_grad], slices, trunk.crossing)

    def _loss(self, output: Any, target: Any, teacher_output: Any) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Return the loss of one network's output, and the teacher's part of it for logging."""
        loss = self.criterion(output, target)
        if teacher_output is None:
            return loss, {}
        kd_loss = distillation_loss(output, teacher_output, self.temperature)
        return self.task_loss_weight * loss + self.distill_loss_weight * kd_loss, dict(kd_loss=kd_loss.detach())

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **kwargs: Any) -> nn.Module:
        """Compile the tiny pass and the teacher, whose shapes do not change.

        The augmented pass runs eagerly: there are more combinations of sampled widths than steps, and each would be
        compiled separately. The tiny passes of the first batches after a sort run eagerly, too, and so does evaluation,
        whose model is a new copy every time.
        """
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **kwargs)
        self._compiled = True
        return self.trainable_module

    def compile_ema(self, *args: Any, **kwargs: Any) -> None:
        return None

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return a copy of the current tiny model. Further training does not change the copy."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else export(unwrap_model(module))

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:
            return {}
        network = unwrap_model(module)
        return dict(
            netaug=self.netaug_fields(),
            supernet=network.state_dict(),
            batches_since_sort=find_supernet(network)[1].batches_since_sort,
        )

    def load_checkpoint_state(
            self,
            state_dict: Dict[str, Any],
            task_state: Optional[Dict[str, Any]] = None,
            ema: bool = False,
            strict: bool = True,
    ) -> None:
        """Load the super-network from `task_state`. `state_dict` is a slice of it, and is not used.

        Raises:
            ValueError: The checkpoint is from a training without NetAug, or with another NetAug config.
            RuntimeError: An EMA is loaded before `setup_ema`, or a tensor has another shape.
        """
        module = self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('Cannot load EMA checkpoint state before setup_ema().')
        if not task_state:
            raise ValueError('The checkpoint holds no super-network, because it is from a training without NetAug.'
                             ' Start from its weights with --initial-checkpoint instead of resuming it.')
        here = self.netaug_fields()
        there = {k: v for c in split_fields(task_state['netaug']) for k, v in c.to_dict().items()}
        changed = [k for k in here if there[k] != here[k]]
        if changed:
            raise ValueError('The checkpoint is from a NetAug training with another config: ' + ', '.join(
                f'{k} is {there[k]} there and {here[k]} here' for k in changed) + '.')
        network = unwrap_model(module)
        network.load_state_dict(task_state['supernet'], strict=strict)
        find_supernet(network)[1].batches_since_sort = task_state['batches_since_sort']
