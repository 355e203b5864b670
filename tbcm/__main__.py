"""`python -m tbcm` is the `tbcm` command."""

import sys


def main() -> int:
    """Run the command, or say what it lacks: the kernels alone install no trainer."""
    try:
        from tbcm.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"tbcm: error: {error.name} is not installed; pip install 'tbcm-kernels[train]', or "
            f"'.[train]' in a checkout, brings what the trainer needs.",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
