"""The packages of the extras `[deploy]` and `[onnx]`, which nothing else of this project needs."""
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict

from ..errors import UserError

__all__ = ['require', 'versions']

_NEEDED = {
    'deploy': "`pip install -e '.[deploy]'` in the checkout installs it (about 1 GB beside PyTorch, and PyTorch must be"
              " older than 2.15)",
    'onnx': "`pip install -e '.[onnx]'` in the checkout installs it (about 125 MB beside PyTorch)",
}
_DISTRIBUTIONS = {
    'deploy': ('torch', 'timm', 'litert-torch', 'litert-converter', 'ai-edge-quantizer', 'ai-edge-litert',
               'tflite-micro'),
    'onnx': ('torch', 'timm', 'onnx', 'onnxscript', 'onnxruntime'),
}


def require(module: str, extra: str = 'deploy') -> Any:
    """Import a module of an extra.

    Args:
        module: Full name of the module.
        extra: Extra of this project that installs it.

    Raises:
        UserError: The module is not there; the sentence says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as e:
        package = module.partition('.')[0]
        raise UserError(f'The package {package} cannot be imported ({e}): {_NEEDED[extra]}.') from e


def versions(extra: str = 'deploy') -> Dict[str, str]:
    """Return the versions of the packages that a deployed file depends on, by the name of the package."""
    found = {}
    for name in _DISTRIBUTIONS[extra]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the sentence of `require` tells, where the package is needed
            continue
    return found
