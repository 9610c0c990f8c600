"""python -m cakd_cli."""

from cakd_cli.process import main

if __name__ == "__main__":
    main()
