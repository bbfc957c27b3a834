"""Network Augmentation (NetAug, arXiv 2110.08890) for tiny timm models. Importing it registers `netaug_*`."""
from . import tiny_models  # registers
from .config import NetAugConfig
from .export import export
from .reference import checkpoint_filter_fn
from .supernet import SuperNet, augment
from .task import NetAugTask

__version__ = '0.1.0'
__all__ = ['NetAugConfig', 'NetAugTask', 'SuperNet', 'augment', 'checkpoint_filter_fn', 'export']
