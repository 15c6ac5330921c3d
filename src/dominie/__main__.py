"""`python -m dominie`, as `accelerate launch -m dominie` needs it."""

from dominie.cli import main

if __name__ == "__main__":
    main()
