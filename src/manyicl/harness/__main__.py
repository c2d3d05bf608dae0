"""The harness's own command line, which knows the model `manyicl`: it has no entry points for models of others."""

from __future__ import annotations

import sys
import traceback

from manyicl.errors import UserError

# Where lm_eval looks at its arguments: what it raises there itself is about a user's mistake. Packages, and functions.
_CHECKING_PACKAGES = ("lm_eval._cli", "lm_eval.config")
_CHECKING_FUNCTIONS = ("simple_evaluate", "get_model")
# The start of what lm_eval says -> the fix, which it does not say.
_FIXES = {
    "Tasks not found": "python -m manyicl.harness ls tasks lists those it knows, --include_path FOLDER adds your own",
    "No tasks specified": "name some with --tasks",
    "Need to specify task": "name some with --tasks",
}


def main() -> None:
    """Register the model, and hand over to lm_eval's command line; a user's mistake is one line and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import manyicl.harness.model  # noqa: F401  # registers it
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: {error.name} is not installed; pip install 'lm_eval[hf]'\n")
        sys.exit(2)
    try:
        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except (ValueError, TypeError, OSError) as error:
        if not is_about_arguments(error):
            raise
        sys.stderr.write(f"error: {tell_mistake(str(error))}\n")
        sys.exit(2)


def is_about_arguments(error: BaseException) -> bool:
    """Return whether the code that raised an error is lm_eval's own check of its arguments."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    module = str(frame.f_globals.get("__name__"))
    is_check = module.startswith("lm_eval.") and frame.f_code.co_name in _CHECKING_FUNCTIONS
    return is_check or module.startswith(_CHECKING_PACKAGES)


def tell_mistake(said: str) -> str:
    """Return what lm_eval says about an argument, on one line, with the fix if it does not name one."""
    line = " ".join(said.split()).rstrip(".")
    return next((f"{line}; {fix}" for start, fix in _FIXES.items() if line.startswith(start)), line)


if __name__ == "__main__":
    main()
