"""Write the recipes of the paper's experiments, `ARCH.TAG/train.yaml` beside this file: `python make_recipes.py`.

The tables are the settings of the reference implementation. Rates are those of a GPU, to be multiplied by their number.
"""
from pathlib import Path
from typing import Dict

# Name, input size, --crop-pct, weight decay, width multipliers, top-1 on ImageNet-1K of the baseline and with NetAug.
# timm resizes to floor(size / crop_pct): the values give ceil(size / 0.875), where 0.875 would give a pixel less.
MODELS = {
    'netaug_mbv2_tiny': ('MobileNetV2-Tiny', 144, 0.8725, '4.0e-5', (1, 1.8, 2.6), 51.7, 53.3),
    'netaug_mbv2_035': ('MobileNetV2 w0.35', 160, 0.874, '4.0e-5', (1, 1.8, 2.6), 56.3, 57.8),
    'netaug_mbv3_035': ('MobileNetV3 w0.35', 160, 0.874, '3.0e-5', (1, 2, 3), 58.1, 60.3),
    'netaug_proxylessnas_035': ('ProxylessNAS w0.35', 160, 0.874, '4.0e-5', (1, 1.8, 2.6), 59.1, 60.8),
    'netaug_mcunet': ('MCUNet', 176, 0.871, '4.0e-5', (1, 1.6, 2.2), 61.5, 62.7),
}
EXPAND_MULTS = (1, 1.6, 2.2, 2.8)
# On ImageNet: GPUs, images and rate of each.
GPUS = {'netaug_mbv3_035': (16, 128, 0.1), 'netaug_mcunet': (32, 64, 0.0125)}
GPUS_ELSE = (16, 128, 0.025)
SETS = {'food101': ('Food101', 101), 'flowers102': ('Flowers102', 102), 'cars': ('Stanford Cars', 196),
        'cub200': ('CUB200', 200), 'pets': ('Oxford Pets', 37)}
TRANSFER = {  # dropout and rate for each of SETS, on 4 GPUs of 64 images
    'netaug_mbv2_tiny': ((0.1, 0.06), (0, 0.08), (0.2, 0.14), (0.5, 0.04), (0.1, 0.06)),
    'netaug_mbv2_035': ((0.2, 0.10), (0.3, 0.08), (0.5, 0.18), (0.7, 0.02), (0.4, 0.01)),
    'netaug_mbv3_035': ((0.2, 0.20), (0.6, 0.05), (0.7, 0.10), (0.8, 0.02), (0.8, 0.01)),
    'netaug_proxylessnas_035': ((0.2, 0.10), (0.2, 0.06), (0.2, 0.20), (0.7, 0.04), (0.8, 0.01)),
    'netaug_mcunet': ((0.1, 0.04), (0.4, 0.05), (0.1, 0.25), (0.6, 0.08), (0.6, 0.01)),
}
GAINS = {'food101': 1.0, 'flowers102': 1.6, 'cars': 2.9, 'pets': 0.4}  # of MobileNetV2 w0.35, off a bar chart
WARMUP = 5  # epochs, before those of the cosine


def recipe(model: str, tag: str, title: str, figure: str, notes: str, gpus: tuple, classes: int, epochs: int,
           own: str) -> str:
    """Return a recipe: what all have in common around the flags of its `own`."""
    name, size, crop_pct, weight_decay = MODELS[model][:4]
    num, images, rate = gpus
    file = f'-c hfconfigs/{model}.{tag}/train.yaml'
    nodes = f'--nnodes {num // 8} --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id RUN'
    where = f'{num // 8} machines of 8 GPUs, on each of them' if num > 8 else 'one machine'
    return f'''\
# {name} on {title}, by the paper's recipe: not yet run here.
# Written by hfconfigs/make_recipes.py: change it there.
# One process:
#   python train.py {file} \\
#     --data-dir DATA --grad-accum-steps {num}
# {num} processes of {images} images, the paper's {num * images} in an update ({where}):
#   torchrun {nodes if num > 8 else f'--nproc-per-node {num}'} train.py \\
#     {file} --data-dir DATA
# P processes: --grad-accum-steps {num}/P: an update stays one of {num * images} images; leave batch_size and lr.
# The paper's figure: {figure}
# Unlike the reference: --color-jitter is one factor of brightness, contrast and saturation; there 32/255, 0 and 0.5.
{notes}model: {model}
experiment: {model}.{tag}
num_classes: {classes}
img_size: {size}
{own}batch_size: {images}
opt: sgd  # Nesterov
momentum: 0.9
weight_decay: {weight_decay}
lr: {num * rate:.6}  # {num} x {rate:g}
sched: cosine
sched_on_updates: true
warmup_epochs: {WARMUP}
warmup_prefix: true  # {epochs} epochs after the warm-up's, {epochs + WARMUP} in all
warmup_lr: {rate:g}
min_lr: 0.0
epochs: {epochs}
smoothing: 0.1
scale: [0.08, 1.0]
hflip: 0.5
color_jitter: 0.1255  # 32/255
train_interpolation: bilinear
interpolation: bilinear
crop_pct: {crop_pct}  # resizes to {-(-size * 8 // 7)}
workers: 8
'''


def pretraining(model: str, netaug: bool, data: str) -> str:
    """Return the recipe of a model on ImageNet-1K or ImageNet-21K-P, from scratch."""
    gpus, classes, epochs, notes = GPUS.get(model, GPUS_ELSE), 1000, 150, ''
    top1 = MODELS[model][5 + netaug]
    title, figure = 'ImageNet-1K', f'{top1} % top-1' + (f' (baseline {MODELS[model][5]} %).' if netaug else '.')
    if data == 'in21kp':
        title, figure, classes, epochs = 'ImageNet-21K-P (winter21)', 'none known to us.', 10450, 20
        gpus = (16, 128, GPUS.get(model, GPUS_ELSE)[2] * gpus[0] / 16)  # the same total: it is the same batch
        notes = '# Known of the original: classes, epochs, 16 GPUs and batch. All else is taken from ImageNet-1K.\n'
    own = 'drop: 0.0\n'
    if netaug:
        stop = (epochs // 2 + WARMUP) / (epochs + WARMUP)
        own += f'''\
netaug: true
netaug_width_mults: {list(MODELS[model][4])}
netaug_expand_mults: {list(EXPAND_MULTS)}
netaug_stop_width_at: {stop:.4g}  # widths are left alone in the last {epochs - epochs // 2} epochs
'''
    title += ', with NetAug' if netaug else ', without NetAug'
    return recipe(model, ('netaug_' if netaug else '') + data, title, figure, notes, gpus, classes, epochs, own)


def transfer(model: str, data: str) -> str:
    """Return the recipe that fine-tunes a model, the tiny one alone, from its ImageNet-1K weights."""
    title, classes = SETS[data]
    drop, rate = TRANSFER[model][list(SETS).index(data)]
    gain = GAINS.get(data) if model == 'netaug_mbv2_035' else None
    figure = 'none known to us.' if gain is None else \
        f'+{gain} points of top-1 over weights without NetAug (read off a bar chart).'
    notes = ('# Starts from the result of the recipe netaug_in1k; from other weights, the reference\'s .pth too, with\n'
             '# --pretrained-path FILE. A new classifier takes the place of the one for 1000 classes.\n')
    own = f'pretrained_path: output/train/{model}.netaug_in1k/model_best.pth.tar\ndrop: {drop:.1f}\n'
    return recipe(model, f'netaug_in1k_ft_{data}', f'{title}, from weights of ImageNet-1K with NetAug', figure, notes,
                  (4, 64, rate), classes, 50, own)


def recipes() -> Dict[str, str]:
    """Return the text of every recipe by the name of its folder, `ARCH.TAG`."""
    texts = {}
    for model in MODELS:
        for data in ('in1k', 'in21kp'):
            texts[f'{model}.{data}'] = pretraining(model, False, data)
            texts[f'{model}.netaug_{data}'] = pretraining(model, True, data)
        for data in SETS:
            texts[f'{model}.netaug_in1k_ft_{data}'] = transfer(model, data)
    return texts


if __name__ == '__main__':
    for folder, text in recipes().items():
        file = Path(__file__).parent / folder / 'train.yaml'
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
