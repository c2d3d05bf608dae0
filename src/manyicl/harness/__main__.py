"""The harness's own command line, which knows the model `manyicl`: it has no entry points for models of others."""

from __future__ import annotations

import sys

from manyicl.errors import UserError


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


if __name__ == "__main__":
    main()
