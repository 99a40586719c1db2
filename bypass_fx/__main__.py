"""`python -m bypass_fx` is the command `bypass-fx`."""

from bypass_fx.cli import main

if __name__ == "__main__":
    main()
