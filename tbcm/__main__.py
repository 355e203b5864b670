"""`python -m tbcm` is the `tbcm` command."""

from tbcm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
