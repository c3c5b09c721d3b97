"""Writes any data set in chunks that data=streaming reads: python convert.py --help."""

from visiontasks.cli.convert import main

if __name__ == "__main__":
    main()
