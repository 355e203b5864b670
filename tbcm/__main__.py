"""`python -m tbcm` is the `tbcm` command."""

import sys


def main() -> int:
    """Run the command, or say what it lacks: the kernels alone install no trainer."""
    try:
        from tbcm.cli import main as run

        return run()
    except ModuleNotFoundError as error:
        name = (error.name or "tbcm").partition(".")[0]
        if name in ("tbcm", "tbcm_kernels"):
            raise
        print(
            f"tbcm: error: {name} is not installed; pip install 'tbcm-kernels[train]', or "
            f"'.[train]' in a checkout, brings what the trainer needs.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
