"""The `ptq` command. One small file per verb; what is heavy is imported inside the verb that needs it."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
from argparse import Namespace

from ptq.errors import LostProcess, PtqError, UnsupportedModel

DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: "choose a place you may read and write",
    errno.EPERM: "choose a place you may read and write",
    errno.EROFS: "choose a place that is not read-only",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 ok, 2 bad input, 3 unsupported model, 4 numerical failure, 130 interrupted by Ctrl-C or SIGTERM.
    argparse leaves by SystemExit (0 after --help, 2 after a bad option); an unforeseen exception keeps its traceback.
    """
    from ptq.cli.options import set_environment
    from ptq.cli.parser import parse

    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    set_environment(args)
    try:
        return _run(args)
    except LostProcess as err:
        return _fail(f"{err}{_resume_hint(args, argv, '; resume with: ')}", err.exit_code)
    except PtqError as err:
        return _fail(_message(err), err.exit_code)
    except KeyboardInterrupt:
        return _fail(_interrupted(args, argv), 130)
    except BrokenPipeError:
        # the reader (head, less) left; point stdout elsewhere so that the interpreter's last flush does not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        code = disk_errno(err)
        if code not in DISK:
            raise
        mend = DISK[code] + _resume_hint(args, argv, ", then continue with: ")
        return _fail(f"{' '.join(str(err).split())}; {mend}", 2)


def _run(args: Namespace) -> int:
    if not hasattr(args, "resume"):
        return args.main(args) or 0
    # a scheduler's SIGTERM is as resumable as Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not _one_of_several():
            return args.main(args) or 0
        from ptq import distributed

        distributed.start()
        code = args.main(args) or 0
        distributed.stop()
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_of_several() -> bool:
    """Whether torchrun started this process and others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def disk_errno(err: BaseException) -> int | None:
    """The system's error number. safetensors hides it in its message: "I/O error: ... (os error 28)"."""
    if isinstance(err, OSError):
        return err.errno
    found = re.search(r"\(os error (\d+)\)", str(err)) if type(err).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _message(err: PtqError) -> str:
    # an unsupported model's error goes on with the module tree and a spec to edit
    return str(err) if isinstance(err, UnsupportedModel) else " ".join(str(err).split())


def _interrupted(args: Namespace, argv: list[str]) -> str:
    return f"interrupted{_resume_hint(args, argv, '; resume with: ')}"


def _resume_hint(args: Namespace, argv: list[str], lead: str) -> str:
    if not hasattr(args, "resume"):
        return ""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    command = ["torchrun", "--nproc-per-node", count, "-m", "ptq"] if _one_of_several() else ["ptq"]
    return lead + shlex.join([*command, *argv, *([] if args.resume else ["--resume"])])


def _fail(message: str, code: int) -> int:
    if _one_of_several():
        from ptq import distributed

        first, code = distributed.fail(code)
        if not first:
            return code
    print(f"ptq: error: {message}", file=sys.stderr)
    return code
