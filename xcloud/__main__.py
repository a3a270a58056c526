"""`python -m xcloud`: the same as the `xcloud` command."""

from xcloud.cli import main

if __name__ == "__main__":
    main()
