"""`python -m manyicl`, also under `accelerate launch -m manyicl`."""

from manyicl.cli import main

if __name__ == "__main__":
    main()
