"""`python -m dispec`, the same as the `dispec` command."""

from dispec.serving.cli.commands import main

if __name__ == "__main__":
    main()
