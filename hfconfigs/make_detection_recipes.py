"""Write the recipes of detection, `ARCH.det_SET/train_detection.yaml` here: `python make_detection_recipes.py`.

The paper (section 4.1) tells the data, the number of GPUs, the batch and the epochs. All else is marked as ours.
"""
from pathlib import Path
from typing import Dict

MODELS = {'netaug_mbv2_035': ('MobileNetV2 w0.35', 256), 'netaug_mcunet': ('MCUNet', 256)}  # name, our input size
# Title, layout of DATA, splits, GPUs, images of an update, epochs, and the paper's figure.
SETS = {
    'voc': ('Pascal VOC 07+12', 'the folder VOCdevkit with VOC2007 and VOC2012', 'VOC2007/trainval+VOC2012/trainval',
            'VOC2007/test', 8, 64, 200, '41 % fewer MACs than the baseline at equal AP50'),
    'coco': ('COCO 2017', 'a folder with annotations/, train2017 and val2017', 'train2017', 'val2017', 16, 128, 120,
             '38 % fewer MACs than the baseline at equal AP50'),
}


def recipe(model: str, data: str) -> str:
    """Return the recipe of a model on a data set."""
    name, size = MODELS[model]
    title, layout, train, val, gpus, images, epochs, figure = SETS[data]
    file = f'-c hfconfigs/{model}.det_{data}/train_detection.yaml'
    return f'''\
# A detector on {name}, {title}: not yet run here.
# Written by hfconfigs/make_detection_recipes.py: change it there.
# DATA is {layout}. One process:
#   python train_detection.py {file} \\
#     --data-dir DATA
# P processes (the paper: {gpus} of {images // gpus} images): an update stays one of {images} images.
#   torchrun --nproc-per-node P train_detection.py {file} \\
#     --data-dir DATA -b {images}/P
# The paper's figure: {figure}; it does not say of which networks.
# Of the paper: the data, {images} images in an update, {epochs} epochs, and weights of ImageNet-1K with NetAug.
# The paper does not tell, so these are ours: detector, optimizer, learning rate, input size and augmentation.
# AP50 is COCO's (101 values of recall), not that of Pascal VOC 2007.
model: {model}
experiment: {model}.det_{data}
pretrained_path: output/train/{model}.netaug_in1k/model_best.pth.tar
train_split: {train}
val_split: {val}
img_size: {size}  # ours
batch_size: {images}
opt: adamw  # ours
weight_decay: 0.05  # ours
lr: {0.002 * (images / 16) ** 0.5:.4g}  # ours: 0.002 at 16 images, by the square root
sched: cosine  # ours
sched_on_updates: true
warmup_epochs: 3  # ours
epochs: {epochs}
crop_prob: 0.5  # ours
scale: [0.3, 1.0]  # ours
hflip: 0.5  # ours
color_jitter: 0.2  # ours
model_ema: true  # ours
model_ema_decay: 0.9998
val_interval: 10
workers: 8
'''


def recipes() -> Dict[str, str]:
    """Return the text of every recipe by the name of its folder."""
    return {f'{model}.det_{data}': recipe(model, data) for model in MODELS for data in SETS}


if __name__ == '__main__':
    for folder, text in recipes().items():
        file = Path(__file__).parent / folder / 'train_detection.yaml'
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
