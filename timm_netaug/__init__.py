"""Network Augmentation (NetAug, arXiv 2110.08890) for tiny timm models. Importing it registers `netaug_*`."""
from . import tiny_models  # registers
from .config import NetAugConfig, NetAugTraining
from .layers import register_elastic
from .reference import checkpoint_filter_fn
from .supernet import SuperNet, augment, export, init_weights
from .task import NetAugTask

__version__ = '0.1.0'
__all__ = ['NetAugConfig', 'NetAugTask', 'NetAugTraining', 'SuperNet', 'augment', 'checkpoint_filter_fn', 'export',
           'init_weights', 'register_elastic']
