"""The commands: `python -m timm_netaug COMMAND`, and `timm-netaug COMMAND` where the package is installed."""
import sys
from importlib import import_module
from typing import Optional, Sequence

__all__ = ['main', 'run_old_form']

_COMMANDS = {
    'export': 'write a checkpoint of train.py as a folder for timm.create_model',
    'convert': "write a .pth file of the NetAug authors as a folder for timm.create_model",
    'hub': 'push a model to the Hugging Face Hub, or pull one',
    'deploy': 'write an int8 file for microcontrollers, measured by running it',
    'info': 'show what a model costs on a microcontroller',
}
_HELP = '\n'.join([
    'usage: python -m timm_netaug COMMAND ... (COMMAND --help explains a command)',
    '',
    *(f'  {name:8}  {text}' for name, text in _COMMANDS.items()),
])


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a command, which is the first argument."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(_HELP)
    elif command in _COMMANDS:
        import_module(f'timm_netaug.cli.{command}').main(rest)
    else:
        sys.exit(f'timm_netaug: error: There is no command {command}.\n\n{_HELP}')


def run_old_form(command: str) -> None:
    """Run a command that was started as `python -m timm_netaug.COMMAND`."""
    print(f'`python -m timm_netaug.{command}` is now `python -m timm_netaug {command}`.', file=sys.stderr)
    main([command, *sys.argv[1:]])


if __name__ == '__main__':
    main()
