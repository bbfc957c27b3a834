#!/usr/bin/env python3
"""Write `docs/flags.md`: what every training flag does without and with `--netaug`, as runs on a few digits tell it.

    python docs/flags.py

Each cell is a run of `train.py` of two short epochs. It 'works' if it ends as it should and has done what it is for:
changed the weights, or something else that can be seen, against the same run without it.
"""
import atexit
import contextlib
import functools
import gc
import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import timm
import torch
from PIL import Image
from timm.layers import BatchNormAct2d, is_fast_norm
from timm.utils import unwrap_model

from timm_netaug import NetAugTask, augment
from timm_netaug.cli import train
from timm_netaug.cli.flags import all_flags
from timm_netaug.cli.train_flags import TRAIN_FLAGS
from timm_netaug.layers import ElasticBatchNorm
from timm_netaug.io.folder import export_folder
from timm_netaug.io.run import RunDescription

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_suffix('.md')
BASE = ('--model test_efficientnet --num-classes 10 -b 20 -j 0 --epochs 2 --warmup-epochs 0'
        ' --experiment run --device cpu')
NETAUG = '--netaug'
RULES = '## Values, and rules'
CRASHED, IGNORED, SPOILED = 'CRASHED', 'IGNORED', 'CHANGES THE WEIGHTS'
# What a flag does: change the weights, nothing in one process on a CPU, or something else that `_train` sees.
CHANGES, SAME = 'weights', 'nothing'

# Flags that are there already, the flag that the row is about, and what it does to the weights. DIR is replaced.
ROWS: List[Tuple[str, str, str]] = [
    ('', '--netaug-width-mults 1 2', CHANGES),
    ('', '--netaug-expand-mults 1 2', CHANGES),
    ('', '--netaug-divisor 8', CHANGES),
    ('', '--netaug-from-stage 2', CHANGES),
    ('', '--netaug-init', CHANGES),
    ('', '--netaug-alpha 0.5', CHANGES),
    ('', '--netaug-stop-width-at 0', CHANGES),
    ('', '--netaug-no-sort', CHANGES),
    ('', '--netaug-distill 1', CHANGES),
    ('', '--netaug-batch-fraction 0.5', CHANGES),
    ('', '--netaug-every 2', CHANGES),
    ('', '--kd-model-name local-dir:DIR/teacher', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher', '--kd-temperature 1', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher', '--kd-loss-type kl', SAME),
    ('--kd-model-name local-dir:DIR/teacher', '--task-loss-weight 0.2', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher', '--distill-loss-weight 2', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher', '--kd-distill-type feature', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher --kd-distill-type feature',
     '--kd-student-feature-dim 256 --kd-teacher-feature-dim 96', SAME),
    ('--kd-model-name local-dir:DIR/teacher --model deit_tiny_distilled_patch16_224 --model-kwargs depth=2',
     '--kd-distill-type token', CHANGES),
    ('--kd-model-name local-dir:DIR/teacher --model deit_tiny_distilled_patch16_224 --model-kwargs depth=2'
     ' --kd-distill-type token', '--kd-token-distill-type hard', CHANGES),
    ('', '--model-ema', CHANGES),
    ('--model-ema', '--model-ema-decay 0.5', CHANGES),
    ('--model-ema', '--model-ema-warmup', CHANGES),
    ('--model-ema', '--model-ema-force-cpu', CHANGES),
    ('', '--amp', CHANGES),
    ('--amp', '--amp-dtype bfloat16', CHANGES),
    ('', '--model-dtype bfloat16', CHANGES),
    ('', '--channels-last', 'layout'),
    ('', '--fast-norm', 'norms'),
    ('', '--grad-accum-steps 2', CHANGES),
    ('', '--grad-checkpointing', 'calls'),
    ('', '--torchcompile eager', 'compiled'),
    ('--torchcompile inductor', '--torchcompile-mode default', SAME),
    ('', '--torchscript', 'scripted'),
    ('--torchscript', '--fuser old', 'scripted'),
    ('', '--sync-bn', CHANGES),
    ('', '--dist-bn broadcast', SAME),
    ('', '--bn-momentum 0.9', CHANGES),
    ('', '--bn-eps 0.1', CHANGES),
    ('', '--clip-grad 0.1', CHANGES),
    ('--clip-grad 0.1', '--clip-mode value', CHANGES),
    ('--clip-grad 0.1', '--clip-mode agc', CHANGES),
    ('', '--drop 0.3', CHANGES),
    ('--model netaug_mbv2_tiny', '--drop-path 0.3', CHANGES),
    ('--model netaug_mbv2_tiny', '--drop-connect 0.3', CHANGES),
    ('', '--drop-block 0.3', CHANGES),
    ('', '--smoothing 0', CHANGES),
    ('', '--mixup 0.5', CHANGES),
    ('', '--cutmix 0.5', CHANGES),
    ('', '--cutmix-minmax 0.2 0.8', CHANGES),
    ('--mixup 0.5', '--mixup-prob 0.1', CHANGES),
    ('--mixup 0.5 --cutmix 0.5', '--mixup-switch-prob 0', CHANGES),
    ('--mixup 0.5', '--mixup-mode elem', CHANGES),
    ('--mixup 0.5', '--mixup-off-epoch 1', CHANGES),
    ('', '--loss poly', CHANGES),
    ('--loss poly', '--poly-epsilon 1', CHANGES),
    ('--loss bce', '--loss-pos-weight 3', CHANGES),
    ('--loss bce', '--loss-class-weight 5,1,1,1,1,1,1,1,1,1', CHANGES),
    ('', '--bce-loss', CHANGES),
    ('--bce-loss', '--bce-sum', CHANGES),
    ('--bce-loss', '--bce-target-thresh 0.05', CHANGES),
    ('--bce-loss', '--bce-pos-weight 2', CHANGES),
    ('', '--aug-splits 2', CHANGES),
    ('--aug-splits 2', '--jsd-loss', CHANGES),
    ('--aug-splits 2', '--split-bn', CHANGES),
    ('--aug-splits 2', '--kd-model-name local-dir:DIR/teacher', CHANGES),
    ('', '--aug-repeats 2', CHANGES),
    ('', '--train-img-sizes 24 32', CHANGES),
    ('--train-img-sizes 24 32', '--train-batch-sizes 20 10', CHANGES),
    ('--train-img-sizes 24 32', '--train-size-probs 0.9 0.1', CHANGES),
    ('--train-img-sizes 24 32', '--train-size-schedule progressive', CHANGES),
    ('--train-img-sizes 16 24 32 --train-size-schedule progressive', '--train-size-schedule-spread 5', CHANGES),
    ('--train-img-sizes 16 24 32 --train-size-schedule progressive', '--train-size-random-mix 0.9', CHANGES),
    ('--train-img-sizes 24 32', '--train-batches-per-epoch 3', CHANGES),
    ('--train-img-sizes 24 32 --train-batch-sizes 20 10', '--variable-batch-loss-scale linear', CHANGES),
    ('', '--pretrained-path DIR/start/model.safetensors', CHANGES),
    ('', '--initial-checkpoint DIR/start/model.safetensors', CHANGES),
    ('--model netaug_mbv2_tiny', '--pretrained', CHANGES),
    ('', '--head-init-scale 0.5', CHANGES),
    ('', '--head-init-bias -2', CHANGES),
    ('', '--opt adamw', CHANGES),
    ('--opt adamw', '--opt-eps 0.1', CHANGES),
    ('--opt adamw', '--opt-betas 0.5 0.5', CHANGES),
    ('', '--opt-kwargs nesterov=False', CHANGES),
    ('', '--momentum 0.5', CHANGES),
    ('', '--weight-decay 0.1', CHANGES),
    ('', '--layer-decay 0.5', CHANGES),
    ('--layer-decay 0.5', '--layer-decay-min-scale 0.5', CHANGES),
    ('--layer-decay 0.5', '--layer-decay-no-opt-scale 0.3', CHANGES),
    ('', '--lr 0.01', CHANGES),
    ('', '--lr-base 0.2', CHANGES),
    ('', '--lr-base-size 128', CHANGES),
    ('', '--lr-base-scale sqrt', CHANGES),
    ('', '--sched step', CHANGES),
    ('', '--sched-on-updates', CHANGES),
    ('', '--lr-noise 0', CHANGES),
    ('--lr-noise 0', '--lr-noise-pct 0.1', CHANGES),
    ('--lr-noise 0', '--lr-noise-std 0.1', CHANGES),
    ('', '--lr-cycle-limit 2', CHANGES),
    ('--lr-cycle-limit 2', '--lr-cycle-mul 2', CHANGES),
    ('--lr-cycle-limit 2', '--lr-cycle-decay 0.1', CHANGES),
    ('', '--lr-k-decay 2', CHANGES),
    ('', '--warmup-epochs 1', CHANGES),
    ('--warmup-epochs 1', '--warmup-lr 0.001', CHANGES),
    ('--warmup-epochs 1', '--warmup-prefix', CHANGES),
    ('', '--min-lr 0.005', CHANGES),
    ('', '--epochs 1', CHANGES),
    ('', '--stop-epoch 1', CHANGES),
    ('', '--epoch-repeats 2', CHANGES),
    ('', '--start-epoch 1', CHANGES),
    ('--sched step', '--decay-epochs 1', CHANGES),
    ('--sched step --decay-epochs 1', '--decay-rate 0.5', CHANGES),
    ('--sched multistep', '--decay-milestones 1', CHANGES),
    ('', '--cooldown-epochs 1', CHANGES),
    ('--sched plateau --epochs 6 --lr 0.5', '--patience-epochs 0', CHANGES),
    ('', '--no-aug', CHANGES),
    ('', '--train-crop-mode rkrc', CHANGES),
    ('', '--scale 0.5 1', CHANGES),
    ('', '--ratio 1 1', CHANGES),
    ('', '--hflip 0', CHANGES),
    ('', '--vflip 0.5', CHANGES),
    ('', '--color-jitter 0', CHANGES),
    ('', '--color-jitter-prob 0.5', CHANGES),
    ('', '--grayscale-prob 0.5', CHANGES),
    ('', '--gaussian-blur-prob 0.5', CHANGES),
    ('', '--aa rand-m9', CHANGES),
    ('', '--reprob 0.5', CHANGES),
    ('--reprob 0.9', '--remode const', CHANGES),
    ('--reprob 0.9', '--recount 3', CHANGES),
    ('--reprob 0.9', '--resplit', CHANGES),
    ('', '--train-interpolation bilinear', CHANGES),
    ('--img-size 96', '--gp max', CHANGES),
    ('', '--img-size 48', CHANGES),
    ('', '--in-chans 1', CHANGES),
    ('', '--input-size 3 48 48', CHANGES),
    ('', '--mean 0.5 0.5 0.5', CHANGES),
    ('', '--std 0.5 0.5 0.5', CHANGES),
    ('', '--crop-pct 0.5', 'data'),
    ('', '--pretrained-cfg-overlay crop_pct=0.5', 'data'),
    ('', '--interpolation nearest', 'data'),
    ('', '--model-kwargs act_layer=relu', CHANGES),
    ('', '--seed 1', CHANGES),
    ('', '-j 1', CHANGES),
    ('-j 1 --aa rand-m9', '--worker-seeding part', CHANGES),
    ('-j 1', '--use-multi-epochs-loader', CHANGES),
    ('', '--no-prefetcher', 'layout'),
    ('', '--pin-mem', SAME),
    ('', '--no-ddp-bb', SAME),
    ('', '--synchronize-step', SAME),
    ('', '-vb 5', 'evaluated'),
    ('', '--val-interval 2', 'evaluated'),
    ('', '--eval-metric loss', 'ranked'),
    ('-b 10', '--log-interval 1', 'said'),
    ('', '--recovery-interval 1', 'files'),
    ('', '--checkpoint-hist 1', 'files'),
    ('', '--save-epochs 1', 'files'),
    ('', '--save-images', 'files'),
    ('', '--tta 2', SAME),
    ('', '--naflex-loader', CHANGES),
]
# Flags that NetAug has switched on, as these runs are.
ALWAYS = {'--channels-last': 'on a CPU it is always on'}
# Flags that say where, on what, or from where; and those that are refused as their group is.
ELSEWHERE = {
    'config', 'data', 'data_dir', 'dataset', 'dataset_download', 'class_map', 'input_img_mode', 'input_key',
    'target_key', 'dataset_trust_remote_code', 'train_split', 'val_split', 'train_num_samples', 'val_num_samples',
    'model', 'num_classes', 'batch_size', 'resume', 'no_resume_opt', 'device', 'local_rank', 'device_modules', 'output',
    'experiment', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'naflex_train_seq_lens', 'naflex_max_seq_len',
    'task', 'target_format', 'poly_gamma', 'class_stats', 'loss_weight_power',  # tests/test_multilabel.py
    'naflex_patch_sizes', 'naflex_patch_size_probs', 'naflex_loss_scale', 'naflex_patchify_channels_first', 'netaug',
}


class Outcome(NamedTuple):
    """How a run ended: with a sentence, or with what was seen of it by then."""
    seen: Dict[str, str]
    refusal: str = ''


def set_up(root: Path) -> None:
    """Write four digits of each class to train on, two to validate, a teacher, and weights to start from."""
    sys.path.insert(0, str(ROOT))
    import demo
    demo.write_digits(root / 'all')
    for split, count in (('train', 4), ('validation', 2)):
        for folder in sorted((root / 'all' / split).iterdir()):
            (root / 'digits' / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.move(file, root / 'digits' / split / folder.name)
    for name, folder in (('test_resnet', 'teacher'), ('test_efficientnet', 'start')):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=10).eval()
        config = timm.data.resolve_model_data_config(model)
        export_folder(model, root / folder, RunDescription.from_model(model, config, [str(i) for i in range(10)]))


def _watch(seen: Dict[str, Any], scripted: bool) -> None:
    """Count, in a process of its own, what a run does that its weights do not tell.

    Args:
        scripted: Whether the model is scripted: TorchScript cannot compile the functions that count passes.
    """
    seen.update(calls=0, layout='', evaluated=[], scripted=[])
    forward, one_epoch, evaluate = BatchNormAct2d.forward, train.train_one_epoch, train.evaluate

    def counted(module, x):
        seen['calls'] += module.training
        return forward(module, x)

    def loaded(epoch, **kwargs):
        model = unwrap_model(kwargs['task'].get_trainable_module())
        weight = next(p for p in model.parameters() if p.ndim == 4)
        seen['layout'] = f'{weight.is_contiguous()} {type(kwargs["loader"]).__name__}'
        fused = torch._C._jit_texpr_fuser_enabled() and torch._C._get_graph_executor_optimize()
        seen['scripted'] = [isinstance(model, torch.jit.ScriptModule), fused, torch._C._jit_can_fuse_on_cpu()]
        return one_epoch(epoch, **kwargs)

    def evaluated(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        seen['evaluated'].append((len(kwargs['loader']), metrics))
        return metrics

    train.train_one_epoch, train.evaluate = loaded, evaluated
    if scripted:
        return
    BatchNormAct2d.forward = counted
    elastic = ElasticBatchNorm.forward

    def counted_elastic(module, x):
        seen['calls'] += module.training
        return elastic(module, x)

    ElasticBatchNorm.forward = counted_elastic


def _train(argv: List[str], output: str, results) -> None:
    sys.argv = ['train.py', *argv]
    refusal, seen = '', {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        if '--torchcompile' not in argv:  # which would see the counting, too
            _watch(seen, '--torchscript' in argv)
        try:
            train.main()
        except SystemExit as e:
            refusal = (str(e.code) if isinstance(e.code, str) else said.getvalue()).partition('error: ')[2]
    run_folder = Path(output, 'run')
    if refusal:
        results.send(Outcome({}, f'{CRASHED} {refusal}' if run_folder.exists() else refusal))
        return
    checkpoint = torch.load(run_folder / 'last.pth.tar', weights_only=False)
    run_facts = checkpoint['args'].run
    digest = hashlib.sha256()
    for tensor in checkpoint['state_dict_ema' if run_facts['ema'] else 'state_dict'].values():
        digest.update(tensor.float().numpy().tobytes())
    seen.update(
        weights=digest.hexdigest(),
        compiled=torch._dynamo.utils.counters['stats']['unique_graphs'],
        data=run_facts['data_config'],
        files=sorted(p.name for p in run_folder.iterdir()),
        norms=is_fast_norm(),
        ranked=checkpoint['metric'],
        said=said.getvalue().count(' images/s '),
    )
    results.send(Outcome({k: str(v) for k, v in seen.items()}))


def _warm_up() -> None:
    """Do what every run would do anew: import Pillow's plugins, and generate the kernels of the runs' shapes."""
    Image.init()
    torch.manual_seed(0)
    supernet = augment(timm.create_model('test_efficientnet', num_classes=10)).to(memory_format=torch.channels_last)
    task = NetAugTask(supernet.train(), seed=42, verbose=False)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.01)
    x = torch.zeros(20, 3, 32, 32).to(memory_format=torch.channels_last)
    for update in range(4):
        task.start_epoch(update // 2, 2, optimizer)
        task.start_update(update)
        task(x, torch.zeros(20, dtype=torch.long))['loss'].backward()
        optimizer.step()


def _serve(requests) -> None:
    """Make a run for every request (arguments, output folder), each in a fork of this process."""
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the runs are on the CPU, and autograd's threads for GPUs cannot be forked
    torch.set_num_threads(1)  # nor can the threads of OpenMP: a fork would wait for them forever
    train.write_curves = lambda *args: None  # they take as long as the training
    _warm_up()
    gc.freeze()
    context = multiprocessing.get_context('fork')
    while True:
        try:
            argv, output = requests.recv()
        except EOFError:
            return
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_train, args=(argv, output, sending))
        process.start()
        sending.close()
        try:
            outcome = receiving.recv()
        except EOFError:
            outcome = Outcome({}, CRASHED)
        process.join()
        requests.send(outcome)


@functools.lru_cache(maxsize=None)
def _server():
    """Start the process that forks the runs; returns the connection to it."""
    context = multiprocessing.get_context('spawn')  # a fork of this process may have threads of autograd in it
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,))
    process.start()
    there.close()
    atexit.register(here.close)  # which ends the process
    return here


def run(flags: str, root: Path) -> Outcome:
    """Run `train.py` in a process of its own, which begins with all that takes long to import."""
    with tempfile.TemporaryDirectory() as output:
        size = '' if '--input-size' in flags else '--img-size 32'
        argv = f'{BASE} {size} --data-dir {root}/digits --output {output} {flags}'.replace('DIR', str(root)).split()
        _server().send((argv, output))
        outcome = _server().recv()
    return outcome._replace(refusal=outcome.refusal.replace(str(root), 'DIR').strip())


def cell(before: str, flag: str, effect: str, root: Path, known: Dict[str, Outcome]) -> str:
    """Tell what a flag does on top of others.

    Args:
        known: Runs made so far, by their flags.
    """
    with_flag = run(f'{before} {flag}', root)
    if with_flag.refusal:
        return with_flag.refusal if CRASHED in with_flag.refusal else f'refused: {with_flag.refusal}'
    if before not in known:
        known[before] = run(before, root)
    if effect == SAME:
        return 'works' if with_flag.seen == known[before].seen else SPOILED
    if with_flag.seen[effect] != known[before].seen[effect]:
        return 'works'
    return f'works: {ALWAYS[flag]}' if NETAUG in before and flag in ALWAYS else IGNORED


def title(before: str, flag: str) -> str:
    after = f' after `{before}`' if before else ''
    return f'| `{flag}`{after} |'.replace('local-dir:DIR/', 'local-dir:')


def row(before: str, flag: str, effect: str, root: Path, known: Dict[str, Outcome], without: str = '') -> str:
    """Return a row of the table: the flag, and its cells without (where it is not given) and with NetAug."""
    without = without or cell(before, flag, effect, root, known)
    # Where channels have been sorted, the first batches are not compiled, and there are no others here.
    netaug = f'{NETAUG} --netaug-no-sort' if effect == 'compiled' else NETAUG
    return f'{title(before, flag)} {without} | {cell(f"{netaug} {before}", flag, effect, root, known)} |'


def rules() -> List[str]:
    """Return the rows of the second table, of all flags that are not always refused."""
    shown = [flag for flag in all_flags(TRAIN_FLAGS) if not flag.refused]
    return [f'| `{flag.name}` | {flag.values_text() or ("switch" if flag.type is None else "")} |'
            f' {flag.default_text() or ""} | {flag.needs.replace(" ", ", ")} | {"yes" if flag.free else ""} |'
            for flag in shown]


def page(rows: List[str]) -> str:
    return '\n'.join([
        '# Training flags, without and with `--netaug`',
        '',
        f'Written by `python docs/flags.py`, with PyTorch {torch.__version__.partition("+")[0]} and timm'
        f' {timm.__version__}. Each cell is a run of `train.py` on a few',
        'digits, on the CPU, of `test_efficientnet` for two epochs of two updates.',
        '',
        '- works: the run ended as it should, and against the run without the flag something is different that shows',
        '  the flag at work: the weights; or graphs that were compiled, memory format, passes made, files, the log. Of',
        '  flags that one process on a CPU has no use for (such as `--pin-mem`): all of that is the same.',
        '- refused: before anything was trained or written, with this sentence.',
        '',
        '| flag | without `--netaug` | with `--netaug` |',
        '|---|---|---|',
        *rows,
        '',
        RULES,
        '',
        'What `timm_netaug/cli/train_flags.py` says of each flag. A run that is resumed warns of flags that have changed,',
        'unless they may.',
        '',
        '| flag | values | default | does nothing without | may change on resume |',
        '|---|---|---|---|---|',
        *rules(),
        '',
    ])


def main() -> None:
    known: Dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        set_up(Path(folder))
        rows = []
        for i, (before, flag, effect) in enumerate(ROWS):
            rows.append(row(before, flag, effect, Path(folder), known))
            print(f'[{i + 1}/{len(ROWS)}] {rows[-1]}', flush=True)
    PAGE.write_text(page(rows))
    wrong = [r for r in rows if any(word in r for word in (CRASHED, IGNORED, SPOILED))]
    if wrong:
        sys.exit('\n'.join(['These flags do not what they should:', *wrong]))


if __name__ == '__main__':
    main()
