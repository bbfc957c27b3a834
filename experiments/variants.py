#!/usr/bin/env python3
"""`train.py` with one thing done in another way, for ablations that are no flags of it.

    python experiments/variants.py VARIANT [flags of train.py]
"""
import itertools
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from in_memory import set_up_loaders as in_memory_loaders  # noqa: E402

import timm_netaug  # noqa: E402
from timm_netaug.cli import train  # noqa: E402
from timm_netaug.layers import ElasticBatchNorm  # noqa: E402
from timm_netaug.supernet import SuperNet  # noqa: E402


def momentum_stays() -> None:
    """Sort the weights, but not the optimizer's state, as the reference implementation does."""
    sort = SuperNet.sort_channels
    SuperNet.sort_channels = lambda self, optimizer=None: sort(self)


def bn_reference() -> None:
    """Let both passes write BatchNorm's running statistics, and estimate them anew, over 16,000 images of the training
    set, before every evaluation, as the reference implementation does."""
    ElasticBatchNorm.augmented = property(lambda self: False, lambda self, value: None)
    ElasticBatchNorm.since_sort = property(lambda self: None, lambda self, value: None)
    loaders, set_up_loaders = [], train.Classification.set_up_loaders
    get_eval_model = timm_netaug.NetAugTask.get_eval_model

    def capture(args, *rest):
        loaders[:] = [args, set_up_loaders(args, *rest)]
        return loaders[1]

    def estimated(self, *args, **kwargs):
        model = get_eval_model(self, *args, **kwargs)
        if model is None:  # no moving average
            return None
        flags, (loader, *_) = loaders
        with torch.random.fork_rng():
            update_bn(itertools.islice(loader, -(-16000 // flags.batch_size)), model)
        return model

    train.Classification.set_up_loaders = staticmethod(capture)
    timm_netaug.NetAugTask.get_eval_model = estimated


def in_memory() -> None:
    """Decode the images once and keep them in the memory of the device (in_memory.py). Draw no curves."""
    train.Classification.set_up_loaders = staticmethod(in_memory_loaders)
    train.write_curves = lambda *args: None  # half a second for each epoch


VARIANTS = {'momentum-stays': momentum_stays, 'bn-reference': bn_reference, 'in-memory': in_memory}


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f'variants.py: error: name one of {", ".join(VARIANTS)} first, then flags of train.py.')
    VARIANTS[sys.argv.pop(1)]()
    train.main()
