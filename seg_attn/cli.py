"""The command line. Each command's libraries are imported when it runs, so that `--help` answers at once.

Exit codes: 0 done; 1 some of many inputs failed; 2 bad input, said in one line; 130 and 143 stopped by a signal.
"""

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from seg_attn.errors import InputError
from seg_attn.parsing import readable

USAGE_ERROR = 2


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


@dataclass(frozen=True)
class Command:
    """One command: what it does in a line, and where it lives.

    Attributes:
        help: A line for `seg-attn --help`.
        module: Imported when the command runs.
        plain: The module has `add_arguments(parser)` and `run(args) -> int`; otherwise `run(argv)` parses for itself.
    """

    help: str
    module: str
    plain: bool = True


COMMANDS = {
    "fit": Command(
        "train a model (--config FILE, overrides such as --model.lr 0.02)", "seg_attn.training", plain=False
    ),
    "validate": Command("mIoU on the validation split", "seg_attn.training", plain=False),
    "test": Command(
        "mIoU and per-class table on the test split, also as JSON and CSV", "seg_attn.training", plain=False
    ),
    "predict": Command("masks for photographs, from a checkpoint alone", "seg_attn.commands.predict"),
    "compare": Command(
        "checkpoints, output strides and settings side by side, with intervals",
        "seg_attn.commands.compare",
        plain=False,
    ),
    "explain": Command("what attention and fusion look at, drawn over the photograph", "seg_attn.commands.explain"),
    "variants": Command(
        "train a recipe with each block and fusion, and compare", "seg_attn.commands.variants", plain=False
    ),
    "summary": Command("dilation plan, parameters and FLOPs per part", "seg_attn.commands.summary", plain=False),
    "prices": Command("what each attention block and fusion costs", "seg_attn.commands.prices"),
    "export": Command("ONNX or torch.export's .pt2, checked at a second size", "seg_attn.commands.export"),
    "import": Command("turn a checkpoint of torchvision, SMP or VainF into one of ours", "seg_attn.commands.importing"),
    "data": Command("make the sample data, fetch VOC, check a data set", "seg_attn.commands.data"),
    "benchmark": Command("ours against peers doing the same work", "seg_attn.commands.benchmark"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _fail(error, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail_unexpectedly(error, debug)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USAGE_ERROR
    if name == "--version":
        print(f"seg-attn {version('seg_attn')}")
        return 0
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{_closest(name)}; `seg-attn --help` lists them")
    _one_line_warnings()
    _show_log()
    command = COMMANDS[name]
    if not command.plain:
        return int(_run(command)(arguments) or 0)
    parser = _OneLineParser(prog=f"seg-attn {name}", description=command.help)
    module = importlib.import_module(command.module)
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments[1:])
    return int(parsed.run(parsed) if hasattr(parsed, "run") else module.run(parsed))


def _run(command: Command) -> Callable[..., Any]:
    run: Callable[..., Any] = importlib.import_module(command.module).run
    return run


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: seg-attn COMMAND ...",
            "",
            "DeepLabv3 semantic segmentation: output stride on a live model, attention fusion, honest numbers.",
            "",
            "commands:",
            *lines,
            "",
            "  -h, --help  this text; `seg-attn COMMAND --help` explains a command",
            "  --version   the version",
            "  --debug     with any command: show the traceback of an error",
        ]
    )


def _closest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _one_line_warnings() -> None:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"warning: {_one_line(str(message))}", file=sys.stderr)

    warnings.showwarning = show


def _show_log() -> None:
    """Print what the package has to say, such as which pretrained weights it found, to stderr."""
    import logging

    class Stderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(self.format(record), file=sys.stderr)

    log = logging.getLogger("seg_attn")
    log.setLevel(logging.INFO)
    log.handlers = [Stderr()]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(error: BaseException, debug: bool, said: str | None = None, code: int = USAGE_ERROR) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {_one_line(said or str(error)) or type(error).__name__}", file=sys.stderr)
    return code


def _fail_unexpectedly(error: Exception, debug: bool) -> int:
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):  # RunInterruptedError
        print(_one_line(str(error)), file=sys.stderr)
        return code
    if type(error).__name__ == "ArgumentError":
        return _fail(error, debug, readable(str(error)))
    if isinstance(error, OSError):
        return _fail(error, debug)
    if (check := _own_check(error)) is not None:
        return _fail(error, debug, str(check))
    hint = "" if debug else " (--debug shows where)"
    return _fail(error, debug, f"{type(error).__name__}: {error}{hint}", code=1)


def _own_check(error: BaseException | None) -> BaseException | None:
    """The argument check of ours that raised it, which says what is wrong and how to mend it.

    jsonargparse wraps what a constructor raises.
    """
    while error is not None and not _raised_here(error):
        error = error.__cause__
    return error


def _raised_here(error: BaseException) -> bool:
    if not isinstance(error, (ValueError, TypeError)) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return str(last.tb_frame.f_globals.get("__name__", "")).startswith("seg_attn.")
